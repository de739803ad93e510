"""BoNBoN: the target by order statistics, the equation by hand, the optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, pair, slopes
from oracles import losses as oracle

from alignax.batch import Scores, from_pairs
from alignax.configs import bonbon as bonbon_config
from alignax.losses import bonbon
from alignax.training import build

loss = bonbon.loss


@pytest.mark.parametrize(("n", "want"), [(2, 1.0), (4, 5.5), (8, 18.15)])
def test_the_target_is_the_mean_margin_of_best_of_n(n, want):
    assert float(bonbon.target(n)) == pytest.approx(want, rel=1e-5)
    # log f(u) = log n + (n - 1) log u at the largest and smallest of n uniform quantiles
    u = np.random.default_rng(n).random((200_000, n))
    h = (n - 1) * (np.log(u.max(1)) - np.log(u.min(1)))
    assert h.mean() == pytest.approx(
        want, rel=0.01
    )  # the standard error is below 0.3 %


def test_golden_number():
    """h = 2 - (-1) = 3, the target 5.5; log π(best) is 2 - 3 = -1."""
    got = cost(loss, 2.0, -1.0, n=4, alpha=0.1)
    assert got == pytest.approx(0.1 * 1 + 0.9 * 2.5**2, rel=1e-6)


def test_at_the_target_only_the_likelihood_pulls():
    up, down = slopes(loss, 3.5, -2.0, n=4, alpha=0.2)
    assert up == pytest.approx(-0.2, rel=1e-5)
    assert down == pytest.approx(0, abs=1e-5)


def test_beyond_the_target_the_margin_is_reduced():
    up, down = slopes(loss, 9.0, 0.0, n=4, alpha=0.0)
    assert up == pytest.approx(2 * 3.5, rel=1e-5)
    assert down == pytest.approx(-2 * 3.5, rel=1e-5)


def test_alone_the_likelihood_is_that_of_the_whole_response():
    """Sums, not means: four tokens of -1 nat are -4."""
    got = cost(loss, 0.0, 0.0, lengths=(4, 2), ref=(-4.0, -9.0), alpha=1.0)
    assert got == pytest.approx(4.0, rel=1e-6)


def test_metrics_hold_the_target_of_the_margin():
    metrics = loss(*pair(2.0, -1.0), n=4)[1]
    assert float(metrics["target"][0]) == pytest.approx(5.5, rel=1e-6)
    assert float(metrics["margin"][0]) == pytest.approx(3.0, rel=1e-6)
    assert float(metrics["nll"][0]) == pytest.approx(1.0, rel=1e-6)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(loss, oracle.bonbon, make_batch, n=5, alpha=0.3)


def best_of(ref: np.ndarray, n: int) -> np.ndarray:
    """The distribution of the best of n, outcomes in order of reward."""
    below = np.concatenate([[0.0], np.cumsum(ref)])
    return below[1:] ** n - below[:-1] ** n


def best_and_worst(ref: np.ndarray, n: int) -> np.ndarray:
    """[i, j]: how likely i is the best of n and j the worst, by the inclusion of ranges."""
    below = np.concatenate([[0.0], np.cumsum(ref)])

    def within(low, high):  # all n in low..high
        return max(below[high + 1] - below[low], 0.0) ** n if low <= high else 0.0

    out = np.zeros((len(ref), len(ref)))
    for i in range(len(ref)):
        for j in range(i):
            out[i, j] = (
                within(j, i)
                - within(j + 1, i)
                - within(j, i - 1)
                + within(j + 1, i - 1)
            )
    return out


def optimum(ref: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """The optimum of the loss, weighted over all pairs of one-token responses."""
    joint = best_and_worst(ref, n)
    best, worst = np.nonzero(joint)
    weight = jnp.asarray(joint[best, worst])
    batch = from_pairs(
        [[0]] * len(best), [[int(i)] for i in best], [[int(j)] for j in worst], length=2
    )
    tokens = jnp.asarray(batch.tokens)
    batch = jax.tree.map(jnp.asarray, batch)

    def place(logits):
        return jnp.where(batch.mask, jax.nn.log_softmax(logits)[tokens], 0.0)

    start = jnp.log(jnp.asarray(ref, jnp.float32))
    batch = batch._replace(ref_logps=place(start))

    def total(logits):
        value = loss(Scores(place(logits)), batch, n=n, alpha=alpha)[0]
        return (weight * value).sum()

    # Newton's method; the ridge is for the constant that changes no probability
    step = jax.jit(lambda x: (jax.grad(total)(x), jax.hessian(total)(x)))
    logits = start
    for _ in range(12):
        slope, bend = step(logits)
        logits = logits - jnp.linalg.solve(bend + 1e-4 * jnp.eye(len(ref)), slope)
    assert float(jnp.abs(step(logits)[0]).max()) < 1e-3
    return np.asarray(jax.nn.softmax(logits), np.float64)


@pytest.mark.parametrize(("alpha", "near"), [(0.005, 0.1), (1.0, 0.002)])
def test_the_population_optimum_is_close_to_best_of_n(alpha, near):
    """The likelihood alone leads there; the margin's square close to it."""
    ref = np.random.default_rng(0).dirichlet(np.full(24, 8.0))
    want = best_of(ref, 4)
    apart = np.abs(optimum(ref, 4, alpha) - want).sum() / 2
    assert np.abs(ref - want).sum() / 2 > 0.45
    assert apart < near


def test_ties_count_in_no_pair():
    """All of n the same outcome: those groups are left out, the other pairs are all."""
    ref = np.array([0.5, 0.3, 0.2])
    joint = best_and_worst(ref, 4)
    assert joint.sum() == pytest.approx(1 - (ref**4).sum())
    draws = np.random.default_rng(0).choice(3, (200_000, 4), p=ref)
    seen = np.mean((draws.max(1) == 2) & (draws.min(1) == 0))
    assert joint[2, 0] == pytest.approx(seen, abs=0.005)  # four standard errors


def test_another_n_than_that_of_the_rollouts_is_refused(tmp_path):
    config = bonbon_config.get_config("smoke")
    config.loss.n = 4
    message = r"rollout\.group is 8, expected 4, which is loss\.n"
    with pytest.raises(ValueError, match=message):
        build.build(config, str(tmp_path))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("policy", "", "rollout.policy is , expected ref"),
        ("temperature", 0.7, r"rollout.temperature is 0.7, expected 1"),
        ("truncated", "drop", "rollout.truncated is drop, expected keep or punish"),
    ],
)
def test_pairs_that_are_not_of_n_of_the_reference_are_refused(
    key, value, message, tmp_path
):
    config = bonbon_config.get_config("smoke")
    config.rollout[key] = value
    with pytest.raises(ValueError, match=f"losses.bonbon.*{message}"):
        build.build(config, str(tmp_path))
