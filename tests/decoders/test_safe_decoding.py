"""SafeDecoding against sets and loops: the first tokens, and those after them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_lms import LENGTHS, V, distribution, models, responses, run, steps

from alignax.decoders import safe_decoding
from alignax.sampling import decode
from alignax.sampling.speculate import speculate


@pytest.fixture(scope="module")
def lms(tiny_config, make_lm):
    return models(tiny_config, make_lm, "target", "expert")


def sample_space(p, q, common):
    """The intersection of the k best of both, at the smallest k with enough in it."""
    for k in range(1, len(p) + 1):
        both = set(np.argsort(-p)[:k]) & set(np.argsort(-q)[:k])
        if len(both) >= common:
            return both
    return set(range(len(p)))


def wanted(lms, ids, alpha, common, temperature=1.0):
    p, q = (
        distribution(lms[name], ids) ** (1 / temperature)
        for name in ("target", "expert")
    )
    p, q = p / p.sum(), q / q.sum()
    space = sample_space(p, q, common)
    moved = np.maximum(p + alpha * (q - p), 1e-8)
    out = np.array([moved[v] if v in space else 0 for v in range(V)])
    return out / out.sum()


@pytest.mark.parametrize(
    ("alpha", "common", "first"), [(3.0, 2, 2), (1.0, 4, 2), (0.5, 1, 3), (3.0, 99, 0)]
)
def test_the_first_tokens_move_and_the_others_do_not(lms, alpha, common, first):
    guide = safe_decoding.guide(lms, alpha=alpha, common=common, first=first)
    out = run(decode.generate, lms["target"], guide=guide)
    starts = {tuple(out.batch.tokens[b, 0, :n]): n for b, n in enumerate(LENGTHS)}
    for ids, token, logp in steps(out):
        (start,) = (n for s, n in starts.items() if tuple(ids[:n]) == s)
        want = distribution(lms["target"], ids)
        if len(ids) - start < first:
            want = wanted(lms, ids, alpha, common)
        assert logp == pytest.approx(np.log(want[token]), abs=1e-4)


def test_both_distributions_may_have_the_temperature_of_the_call(lms):
    guide = safe_decoding.guide(lms, common=3, first=9, expert_temperature=0.7)
    out = run(decode.generate, lms["target"], guide=guide, temperature=0.7)
    for ids, token, logp in steps(out):
        want = wanted(lms, ids, 3.0, 3, temperature=0.7)
        assert logp == pytest.approx(np.log(want[token]), abs=1e-4)


def test_the_sample_space_is_the_smallest_that_has_enough():
    """Of random orders, against the loop; two tokens may enter at once."""
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(50):
        p, q = rng.random((2, 9))
        worse = np.maximum(safe_decoding._ranks(p), safe_decoding._ranks(q))
        most = np.sort(worse)[3 - 1]
        got = set(np.nonzero(worse <= most)[0])
        assert got == sample_space(p, q, 3)
        sizes.append(len(got))
    assert set(sizes) == {3, 4}


def test_what_is_forbidden_stays_so(lms):
    """Even of a sample space that has room for it; at the floor it would be drawn."""
    guide = safe_decoding.guide(lms, common=5, first=3)
    logits = jnp.log(jnp.array([[[0.0, 0.2, 0.0, 0.5, 0.3]]]))

    @jax.jit
    def tilt(prompt, logits):
        two = jnp.full(1, 2)
        state = guide.init(prompt, two, 4)
        return guide.update(state, prompt[:, 1:], two - 1, logits)[0]

    out = tilt(jnp.array([[2, 4]]), logits)
    np.testing.assert_array_equal(np.isneginf(out), np.isneginf(logits))


def test_greedy_with_the_expert_as_draft_is_plain_guided_greedy(lms):
    """A block that the first tokens end in has both distributions in it."""
    guide = safe_decoding.guide(lms, common=3, first=1)
    plain = run(decode.generate, lms["target"], guide=guide, temperature=0.0)
    fast = run(speculate, lms["target"], lms["expert"], guide=guide, temperature=0.0,
               draft_length=2)  # fmt: skip
    assert responses(fast) == responses(plain)
