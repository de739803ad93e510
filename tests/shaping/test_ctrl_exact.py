"""CTRL on a language model that can be enumerated: 8 tokens, 4 steps, 4096 responses.

The reference's probabilities are whole sixteenths, so that 65,536 reference samples can
hold every response exactly as often as it is drawn: calibration is exact. Rewards are
random and tie. What RL should find is known: π ∝ π_ref exp(Φ(C)/β).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax.batch import Batch, Scores
from alignax.losses import policy_gradient
from alignax.shaping import ctrl, kl, rloo
from alignax.theory import infalign

pytestmark = pytest.mark.slow

V, L, PARTS = 8, 4, 16
CASES = {  # how the transform is named, and the KL strength
    "identity": ({"transform": "identity"}, 0.2),
    "best": ({"transform": "exp", "t": 10.0}, 0.2),
    "worst": ({"transform": "exp", "t": -10.0}, 0.1),
    "optimal": ({"transform": "optimal", "n": 4, "beta": 0.2}, 0.2),
}


class Toy:
    """A random language model of v tokens and l steps, enumerated.

    Attributes:
      responses: [N, l] all of them.
      prefixes: [N, l] which prefix each token comes after.
      reference: [prefixes, v] probabilities of the next token, whole parts of `parts`.
      probs: [N] of the reference.
      reward: [N], with ties.
      samples: rewards of parts^l reference samples, each response as often as is due.
    """

    def __init__(self, v: int, l: int, parts: int, seed: int = 0):  # noqa: E741
        rng = np.random.default_rng(seed)
        self.responses = np.array(list(itertools.product(range(v), repeat=l)))
        starts = np.cumsum([0, *[v**t for t in range(l)]])
        places = np.zeros((v**l, l), int)
        for t in range(1, l):
            places[:, t] = places[:, t - 1] * v + self.responses[:, t - 1]
        self.prefixes = places + starts[:l]
        extra = rng.multinomial(parts - v, np.ones(v) / v, size=starts[-1])
        self.reference = (1 + extra) / parts
        self.probs = np.exp(self.logps(np.log(self.reference)).sum(1))
        self.reward = rng.normal(size=v**l).round(2)
        times = np.rint(self.probs * parts**l).astype(int)
        self.samples = np.repeat(self.reward, times)
        assert len(self.samples) == parts**l

    def logps(self, table):
        """[N, l] of the tokens of all responses under a table of [prefixes, v] log-probs."""
        return table[self.prefixes, self.responses]

    def quantile(self) -> np.ndarray:
        """C [N] by definition: against every response, one at a time."""
        wins = np.zeros(len(self.probs))
        for r, p in zip(self.reward, self.probs, strict=True):
            wins += p * ((self.reward > r) + 0.5 * (self.reward == r))
        return wins

    def tilted(self, phi, beta) -> np.ndarray:
        """π [N] ∝ π_ref exp(Φ/β)."""
        weights = self.probs * np.exp((phi - phi.max()) / beta)
        return weights / weights.sum()

    def batch(self, rows) -> Batch:
        """Responses [B, G] by number: their rewards, every token scored, no prompt."""
        ones = jnp.ones((*rows.shape, self.responses.shape[1]), bool)
        return Batch(
            jnp.asarray(self.responses)[rows], ones, ones.sum(-1),
            jnp.float32(self.reward)[rows], ones[..., 0],
            ref_logps=jnp.float32(self.logps(np.log(self.reference)))[rows],
        )  # fmt: skip

    def outcomes(self, *distributions):
        """Laws of the reward: one outcome a value, lowest first."""
        values, index = np.unique(self.reward, return_inverse=True)
        return [np.bincount(index, probs, len(values)) for probs in distributions]


@pytest.fixture(scope="module")
def toy():
    return Toy(V, L, PARTS)


def transformed(u, hyper):
    """Φ in float64, by the theory."""
    how, rest = hyper["transform"], {k: v for k, v in hyper.items() if k != "transform"}
    if how == "optimal":
        table, _ = infalign.optimal(infalign.best_of(rest["n"]), rest["beta"])
        return np.interp(u, infalign.GRID, table)
    return infalign.exponential(u, t=rest["t"]) if how == "exp" else u


def exact(toy, case):
    hyper, beta = CASES[case]
    return toy.tilted(transformed(toy.quantile(), hyper), beta)


def duel(a, b, beats, ties):
    """Laws [P, N] of the better of a draw of a and one of b; of equals, that of a."""
    return a * (b @ (beats + ties).T) + b * (a @ beats.T)


def total_variation(p, q):
    return 0.5 * np.abs(np.asarray(p, float) - q).sum()


@pytest.mark.parametrize("case", CASES)
def test_what_a_response_earns_is_exact(toy, case):
    hyper, _ = CASES[case]
    got = ctrl.shape(
        toy.batch(np.arange(len(toy.probs))[None]),
        jnp.float32(toy.samples)[None],
        **hyper,
    )
    want = transformed(toy.quantile(), hyper)
    np.testing.assert_allclose(got[0, :, -1], want, atol=2e-6 * np.abs(want).max())
    np.testing.assert_array_equal(got[..., :-1], 0)


@pytest.mark.parametrize("best", [True, False], ids=["best", "worst"])
def test_win_rates_of_the_exact_policies_are_the_discrete_formula(toy, best):
    """Best of 1, 2 and 4 from all pairs: of draws, then of winners, then of both sides."""
    distributions = np.stack([toy.probs, *(exact(toy, case) for case in CASES)])
    reference, *policies = toy.outcomes(*distributions)
    beats = (toy.reward[:, None] > toy.reward).astype(float)  # [N, N]
    ties = (toy.reward[:, None] == toy.reward).astype(float)
    for n in (1, 2, 4):
        if n > 1:
            distributions = duel(
                distributions, distributions, beats if best else beats.T, ties
            )
        found = distributions[1:] @ (beats + ties / 2) @ distributions[0]
        for p, want in zip(policies, found, strict=True):
            got = infalign.discrete_win_rate(p, reference, n, best=best)
            assert got == pytest.approx(want, abs=1e-10)


def test_no_policy_has_more_best_of_4_wins_for_its_kl_than_the_optimum(toy):
    """β = 0.2; the table is that of continuous rewards, so almost the discrete optimum."""
    probs, *policies = toy.outcomes(toy.probs, *(exact(toy, case) for case in CASES))
    optimum = infalign.discrete_optimal(probs, 4, 0.2)

    def value(p):
        divergence = np.sum(p * np.log(p / probs))
        return infalign.discrete_win_rate(p, probs, 4, best=True) - 0.2 * divergence

    values = dict(zip(CASES, map(value, policies), strict=True))
    assert max(values.values()) <= value(optimum) + 1e-12
    assert values["optimal"] == pytest.approx(value(optimum), abs=1e-5)
    assert values["identity"] < values["optimal"] - 0.01


def learn(toy, case, rows, weigh, *, steps, lr):
    """The distribution that gradient descent ends with, through the shapings and the loss.

    Args:
      rows: key, [N] the policy -> the responses [B, G] of a step, by number.
      weigh: [B, G, L] probabilities of the responses -> weights of their tokens.
    """
    hyper, beta = CASES[case]
    tx = optax.adam(optax.cosine_decay_schedule(lr, steps))
    everything, samples = (
        np.arange(len(toy.probs))[None],
        jnp.float32(toy.samples)[None],
    )
    earned = ctrl.shape(toy.batch(everything), samples, **hyper)[0]

    def logps(table):
        return toy.logps(jax.nn.log_softmax(table))

    def step(carry, key):
        table, state = carry
        chosen = rows(key, logps(table).sum(1))
        batch = toy.batch(chosen)
        old = logps(table)[chosen]
        batch = batch._replace(
            old_logps=old, extra={"token_weights": weigh(jnp.exp(old.sum(-1)), old)},
            advantages=earned[chosen],
        )  # fmt: skip
        for shaping in (functools.partial(kl.shape, beta=beta), rloo.shape):
            batch = batch._replace(advantages=shaping(batch, None))

        def objective(table):
            return policy_gradient.loss(Scores(logps(table)[chosen]), batch)[0].mean()

        updates, state = tx.update(jax.grad(objective)(table), state)
        return (table + updates, state), None

    table = jnp.float32(np.log(toy.reference))
    keys = jax.random.split(jax.random.key(0), steps)
    run = jax.jit(lambda table: jax.lax.scan(step, (table, tx.init(table)), keys)[0][0])
    return np.exp(np.asarray(logps(run(table)).sum(1), float))


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("case", CASES)
def test_rl_in_expectation_converges_to_the_exact_policy(toy, case):
    """The group holds every response, each weighted as often as the policy draws it."""
    everything = jnp.arange(len(toy.probs))[None]
    got = learn(
        toy, case, lambda key, probs: everything,
        lambda p, old: jnp.broadcast_to(p[..., None], old.shape),
        steps=400, lr=0.1,
    )  # fmt: skip
    want = exact(toy, case)
    assert total_variation(toy.probs, want) > 0.2
    assert total_variation(got, want) < 0.02
    distributions = toy.outcomes(got / got.sum(), want, toy.probs)
    for best in (True, False):
        found, right = (
            infalign.discrete_win_rate(p, distributions[2], 4, best=best)
            for p in distributions[:2]
        )
        assert found == pytest.approx(right, abs=2e-3)


@pytest.mark.usefixtures("optimised")
def test_rl_on_sampled_groups_converges_to_the_exact_policy():
    """27 responses, groups of 8 for 64 prompts that are one prompt.

    All the way: where Φ - β log π/π_ref is the same for every response, no sample pulls.
    """
    small = Toy(3, 3, 8, seed=1)

    def draw(key, logps):
        return jax.random.categorical(key, logps, shape=(64, 8))

    got = learn(
        small, "best", draw, lambda p, old: jnp.full_like(old, 1 / 8), steps=600, lr=0.1,
    )  # fmt: skip
    want = exact(small, "best")
    assert total_variation(small.probs, want) > 0.2
    assert total_variation(got, want) < 0.02
