"""Transfer Q*: the distribution of a step against enumeration, its keys, and the paper's bounds."""

import itertools

import jax
import numpy as np
import pytest
from small_lms import (
    KEY,
    LENGTHS,
    NEW,
    PROMPTS,
    V,
    distribution,
    models,
    responses,
    softmax,
    steps,
)

from alignax.batch import check
from alignax.decoders import transfer_q

pytestmark = pytest.mark.slow

REWARDS = np.random.default_rng(5).normal(size=(V, V, V))


def judge(batch):
    """A table of the response's three tokens, with 0s where it is shorter."""
    out = np.zeros(batch.tokens.shape[:2])
    for b, g in np.ndindex(out.shape):
        y = batch.tokens[b, g][batch.mask[b, g]]
        out[b, g] = REWARDS[tuple([*y, 0, 0, 0][:3])]
    return out


def of_two(batch):
    """Of the first two tokens alone: after them, rollouts have nothing to say."""
    out = np.zeros(batch.tokens.shape[:2])
    for b, g in np.ndindex(out.shape):
        y = batch.tokens[b, g][batch.mask[b, g]]
        out[b, g] = REWARDS[y[0], y[1], 0] if len(y) > 1 else 0.0
    return out


@pytest.fixture(scope="module")
def lms(tiny_config, make_lm):
    return models(tiny_config, make_lm, "base", "ref")


def search(lms, prompts=PROMPTS, lengths=LENGTHS, key=KEY, **settings):
    settings = dict(max_new=NEW, judge=judge, candidates=V) | settings
    out = transfer_q.search(lms["base"], lms, prompts, lengths, key, **settings)
    check(jax.tree.map(np.asarray, out.batch))
    return jax.tree.map(np.asarray, out)


def continuations(lm, ids, many):
    """(tokens, probability) of every continuation of that length."""
    if not many:
        yield (), 1.0
        return
    for v, p in enumerate(distribution(lm, ids)):
        for tail, rest in continuations(lm, [*ids, v], many - 1):
            yield (v, *tail), p * rest


def value(lms, start, ids, beta=None):
    """E r of the responses that go on from ids: under ρ_BL, or ρ_ref e^{r / β}."""
    lm = lms["base"] if beta is None else lms["ref"]
    tails = list(continuations(lm, ids, NEW - (len(ids) - start)))
    r = np.array([REWARDS[tuple([*ids, *tail][start:])] for tail, _ in tails])
    p = np.array([p for _, p in tails]) * (1 if beta is None else np.exp(r / beta))
    return (p * r).sum() / p.sum()


@pytest.mark.parametrize(("variant", "beta"), [("direct", None), ("indirect", 0.7)])
def test_many_rollouts_give_the_distribution_of_the_exact_value(lms, variant, beta):
    """TQ's error is that of a mean of 1500, at α = 1: some hundredths of a nat."""
    out = search(lms, rollouts=1500, variant=variant, beta=beta or 1.0)
    for b in range(2):
        start = LENGTHS[b]
        for t in range(start, start + NEW):
            ids = out.batch.tokens[b, 0, :t].tolist()
            q = [value(lms, start, [*ids, v], beta) for v in range(V)]
            z = np.log(distribution(lms["base"], ids)) + np.array(q)
            want = np.log(softmax(z)[out.batch.tokens[b, 0, t]])
            assert out.batch.old_logps[b, 0, t] == pytest.approx(want, abs=0.15)
    direct = [value(lms, 3, [*PROMPTS[0], v]) for v in range(V)]
    indirect = [value(lms, 3, [*PROMPTS[0], v], 0.7) for v in range(V)]
    assert np.ptp(np.array(direct) - indirect) > 0.3, (
        "the two distributions should differ"
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_where_nothing_is_left_to_chance_the_distribution_is_exact(lms, temperature):
    """The second and the third token; the third has nothing to gain."""
    out = search(lms, judge=of_two, rollouts=1, alpha=0.5, temperature=temperature,
                 candidates=3)  # fmt: skip
    for b in range(2):
        n = LENGTHS[b]
        for t in (n + 1, n + 2):
            ids = out.batch.tokens[b, 0, :t].tolist()
            z = np.log(distribution(lms["base"], ids)) / temperature
            best = np.argsort(-z)[:3]
            if t == n + 1:
                z = z + REWARDS[ids[n], :, 0] / 0.5
            want = np.log(softmax(z[best]))[best == out.batch.tokens[b, 0, t]]
            assert out.batch.old_logps[b, 0, t] == pytest.approx(want[0], abs=1e-4)
    np.testing.assert_allclose(out.batch.feedback, of_two(out.batch), rtol=1e-6)


def test_released_takes_the_best_of_logit_and_reward_after_one_rollout(lms):
    out = search(lms, judge=of_two, variant="released", alpha=0.5, rollouts=7)
    assert not out.batch.old_logps.any()
    for b in range(2):
        n = LENGTHS[b]
        ids = out.batch.tokens[b, 0, : n + 1].tolist()
        score = np.log(distribution(lms["base"], ids)) + REWARDS[ids[n], :, 0] / 0.5
        assert out.batch.tokens[b, 0, n + 1] == score.argmax()
    judged = 2 * V * NEW + 2
    assert out.stats["judge_calls"] == judged  # one a candidate, and the responses
    # two, one and no tokens of a rollout at the three steps, and the responses
    assert out.stats["tokens_sampled"] == 2 * V * (2 + 1 + 0) + 2 * NEW


def test_rollouts_are_a_function_of_the_prefix_alone(lms):
    """Neighbours, rows and steps do not matter, another key does."""
    a = search(lms, temperature=0.0, rollouts=1)
    b = search(lms, PROMPTS[::-1].copy(), LENGTHS[::-1].copy(), temperature=0.0,
               rollouts=1)  # fmt: skip
    assert responses(a) == responses(b)[::-1]
    others = [
        search(lms, key=jax.random.key(i), temperature=0.0, rollouts=1)
        for i in range(1, 5)
    ]
    assert any(responses(a) != responses(o) for o in others)


def test_it_earns_more_than_its_baseline(lms):
    """100 rows of one prompt; the baseline's mean and spread are enumerated."""
    many = 100
    out = search(lms, np.repeat(PROMPTS[:1], many, 0), np.repeat(LENGTHS[:1], many),
                 rollouts=4, alpha=0.3)  # fmt: skip
    ids = PROMPTS[0].tolist()
    base = value(lms, 3, ids)
    square = sum(
        p * (REWARDS[tail] - base) ** 2
        for tail, p in continuations(lms["base"], ids, NEW)
    )
    assert out.batch.feedback.mean() > base + 4 * np.sqrt(square / many)


def test_eos_ends_a_candidate_and_a_response(lms):
    out = search(lms, eos_ids=(2,), rollouts=2)
    for b in range(2):
        (y,) = responses(out)[b]
        assert 2 not in y[:-1]
        assert bool(out.truncated[b, 0]) == (2 not in y)
    all_end = search(lms, eos_ids=tuple(range(V)), rollouts=2)
    assert (
        all_end.stats["tokens_sampled"] == 2
    )  # no candidate leaves room for a rollout
    for ids, token, logp in steps(all_end):
        r = REWARDS[:, 0, 0]
        z = np.log(distribution(lms["base"], ids)) + r
        assert logp == pytest.approx(np.log(softmax(z)[token]), abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (dict(variant="best"), "direct, indirect, released"),
        (dict(rollouts=0), "rollouts=0"),
        (dict(variant="indirect", reference="gpt"), "no LM 'gpt'"),
        (dict(variant="indirect", rollout_temperature=0.0), "rollout_temperature=0"),
        (dict(judge=None), "judge is None"),
    ],
)
def test_bad_input_is_named(lms, settings, word):
    with pytest.raises(ValueError, match=word):
        search(lms, **settings)


def test_the_bias_of_the_tilt_falls_as_one_over_the_rollouts():
    """E e^{mean of M rewards} over its limit, exactly, for rewards 0 and 1."""
    bias = {}
    for m in (4, 16, 64):
        ones = np.arange(m + 1)
        rows = (np.arange(m) < ones[:, None]).astype(float)
        ways = np.exp(
            np.array([np.log(np.arange(1, m + 1)).sum()])
            - np.array([np.log(np.arange(1, k + 1)).sum() for k in ones])
            - np.array([np.log(np.arange(1, m - k + 1)).sum() for k in ones])
        )
        p = ways * 0.3**ones * 0.7 ** (m - ones)
        bias[m] = p @ np.exp(transfer_q.mean(rows)) / np.exp(0.3) - 1
    assert bias[4] > 0
    for m, gain in bias.items():  # half the variance of a mean, to the next order
        assert gain * m == pytest.approx(0.3 * 0.7 / 2, rel=1 / m)


def test_weights_of_rollouts_are_normalised():
    r = np.array([[1.0, 2.0, 4.0]] * 2)
    log_weights = np.array([np.log([1.0, 1.0, 2.0]), [0.0, 1e4, 0.0]])
    assert transfer_q.mean(r, log_weights) == pytest.approx([11 / 4, 2])


# -- the paper's claims on a world that is enumerated

DEPTH, WIDTH, ALPHA, BETA = 3, 3, 0.3, 0.5


class World:
    """A random distribution of sequences, its tilts by a reward, and what each is worth."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        shape = (WIDTH,) * DEPTH
        self.sft = rng.dirichlet(np.ones(WIDTH**DEPTH)).reshape(shape)
        self.r = rng.random(shape)
        self.best = self.tilted(self.r / BETA)
        # a baseline that was aligned with the reward, half as far
        self.base = self.tilted(self.r / (2 * BETA))
        self.alg = self.decoded(self.base)

    def tilted(self, g):
        p = self.sft * np.exp(g)
        return p / p.sum()

    def given(self, p, s):
        """E r of the sequences that begin with s."""
        return (p[s] * self.r[s]).sum() / p[s].sum()

    def rows(self, p):
        """(prefix, p(. | prefix), TQ(prefix, .)) of every prefix."""
        for n in range(DEPTH):
            for s in itertools.product(range(WIDTH), repeat=n):
                row = np.array([p[(*s, v)].sum() for v in range(WIDTH)])
                q = np.array([self.given(p, (*s, v)) for v in range(WIDTH)])
                yield s, row / row.sum(), q

    def decoded(self, p):
        """The distribution of tilting p token by token by its own values."""
        out = np.ones_like(p)
        for s, row, q in self.rows(p):
            new = softmax(np.log(row) + q / ALPHA)
            for v in range(WIDTH):
                out[(*s, v)] *= new[v]
        return out

    def worth(self, p):
        return (p * self.r).sum()


def kl(p, q):
    return (p * np.log(p / q)).sum()


def test_the_values_are_in_order_and_the_gain_is_two_divergences():
    for seed in range(10):
        w = World(seed)
        v_sft, v_base, v_alg = map(w.worth, (w.sft, w.base, w.alg))
        assert v_sft < v_base <= v_alg
        gain = 0.0
        for s, row, q in w.rows(w.base):
            new = softmax(np.log(row) + q / ALPHA)
            gain += w.alg[s].sum() * ALPHA * (kl(new, row) + kl(row, new))
        assert v_alg - v_base == pytest.approx(gain, abs=1e-12)


def test_what_it_may_lose_and_how_far_it_may_go():
    """The value's gap to any other distribution; the divergence from where it started, r in [0, 1]."""
    for seed in range(10):
        w = World(seed)
        base = w.tilted(w.r / BETA)
        alg = w.decoded(base)
        gap = w.worth(w.best) - w.worth(alg)
        assert gap <= BETA * kl(w.best, w.sft) - ALPHA * kl(alg, base) + 1e-12
        assert kl(alg, w.sft) <= 1 / BETA + DEPTH / ALPHA
