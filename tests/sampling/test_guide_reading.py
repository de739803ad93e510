"""A guide that reads another prompt than the target, against float64 enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob
from alignax.decoders import contrastive
from alignax.sampling import decode, guides
from alignax.sampling.speculate import speculate

KEY = jax.random.key(3)
PROMPTS = np.array([[5, 9, 2, 0, 0], [7, 1, 8, 30, 4]], np.int32)
LENGTHS = np.array([3, 5])
OTHERS = np.array([[9, 3, 2, 6], [4, 0, 0, 0]], np.int32)
SIZES = np.array([4, 1])
WEIGHT = 1.5
NEW = 5


@pytest.fixture(scope="module")
def guide(tiny_lm):
    return contrastive.guide({"amateur": tiny_lm}, weight=WEIGHT, plausible=0.0)


def next_logps(lm, ids):
    """Log-probabilities of the next token after a whole text, read anew, in float64."""
    tokens = np.zeros((1, 12), np.int32)
    tokens[0, : len(ids)] = ids
    h = logprob.transformer.hidden(lm, jnp.asarray(tokens))[0][:, len(ids) - 1]
    return np.asarray(logprob.rows(lm, h[:, None])[0, 0], np.float64)


def tilted(lm, prompt, other, response):
    """log π* of the next token: (1 + w) log p(· | prompt) - w log p(· | other)."""
    here, there = (next_logps(lm, [*x, *response]) for x in (prompt, other))
    z = (1 + WEIGHT) * here - WEIGHT * there
    return z - np.log(np.exp(z - z.max()).sum()) - z.max()


def asked(guide, **more):
    return dict(
        max_new=NEW, guide=guide, guide_prompts=OTHERS, guide_lengths=SIZES, **more
    )


def check(lm, out):
    for b in range(2):
        ids = np.asarray(out.batch.tokens)[b, 0]
        response = ids[LENGTHS[b] : LENGTHS[b] + NEW].tolist()
        logps = np.asarray(out.batch.old_logps)[b, 0]
        for i, token in enumerate(response):
            want = tilted(
                lm, PROMPTS[b, : LENGTHS[b]], OTHERS[b, : SIZES[b]], response[:i]
            )
            got = logps[LENGTHS[b] + i]
            np.testing.assert_allclose(got, want[token], atol=2e-4)


def test_sampled_log_probabilities_are_those_of_both_prompts(tiny_lm, guide):
    out = decode.generate(tiny_lm, PROMPTS, LENGTHS, KEY, **asked(guide))
    check(tiny_lm, out)


def test_drafts_are_verified_under_both_prompts(tiny_lm, guide):
    out = speculate(
        tiny_lm, tiny_lm, PROMPTS, LENGTHS, KEY, draft_length=2, **asked(guide)
    )
    check(tiny_lm, out)


def test_a_scalar_guide_reads_its_own_prompt(tiny_lm):
    """Its value is the sum of all tokens: of its own prompt, and of the response."""

    def init(tokens, lengths, length):
        del length
        real = jnp.arange(tokens.shape[1]) < lengths[:, None] - 1
        return jnp.where(real, tokens, 0).sum(1)

    def update(state, tokens, start, logits):
        del start, logits
        after = state[:, None] + tokens.cumsum(1)
        states = jnp.concatenate([state[:, None], after], 1)
        # a response whose total is a multiple of 3 is e^20 times as likely
        return 20.0 * (after % 3 == 0), states

    guide = guides.Guide(init, update, "scalar")
    out = decode.generate(tiny_lm, PROMPTS, LENGTHS, KEY, candidates=12, **asked(guide))
    for b in range(2):
        ids = np.asarray(out.batch.tokens)[b, 0][LENGTHS[b] :][:NEW]
        totals = OTHERS[b, : SIZES[b]].sum() + ids.cumsum()
        assert (totals % 3 == 0).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guide": None}, r"guide_prompts need a guide"),
        ({"guide_prompts": OTHERS[:1]}, r"guide_prompts has shape \(1, 4\)"),
        ({"guide_prompts": OTHERS + 40}, r"guide_prompts have ids 40..49"),
        ({"guide_lengths": SIZES + 1}, r"lengths span 2..5, expected 1..4"),
    ],
)
def test_wrong_prompts_are_named(tiny_lm, guide, changes, told):
    with pytest.raises(ValueError, match=told):
        decode.generate(tiny_lm, PROMPTS, LENGTHS, KEY, **{**asked(guide), **changes})
