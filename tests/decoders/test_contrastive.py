"""Contrastive decoding against the plain twins, alone and with its amateur as the draft."""

import numpy as np
import pytest
from small_lms import distribution, models, responses, run, steps

from alignax.decoders import contrastive
from alignax.sampling import decode
from alignax.sampling.speculate import speculate


@pytest.fixture(scope="module")
def lms(tiny_config, make_lm):
    return models(tiny_config, make_lm, "target", "amateur")


def wanted(lms, ids, weight, plausible, temperature=1.0, amateur=1.0):
    """p^{1+b} / p_amateur^b in products, on the plausible."""
    p = distribution(lms["target"], ids) ** (1 / temperature)
    p = p / p.sum()
    q = distribution(lms["amateur"], ids) ** (1 / amateur)
    out = np.where(p >= plausible * p.max(), p ** (1 + weight) / q**weight, 0)
    return out / out.sum()


@pytest.mark.parametrize(
    ("weight", "plausible", "amateur", "temperature"),
    [(0.8, 0.3, 1.0, 1.0), (2.0, 0.0, 1.0, 1.3), (0.8, 0.3, 0.5, 1.0)],
)
def test_the_distribution_is_the_contrast_on_the_plausible(
    lms, weight, plausible, amateur, temperature
):
    guide = contrastive.guide(
        lms, weight=weight, plausible=plausible, amateur_temperature=amateur
    )
    out = run(decode.generate, lms["target"], guide=guide,
              temperature=temperature)  # fmt: skip
    for ids, token, logp in steps(out):
        want = wanted(lms, ids, weight, plausible, temperature, amateur)
        assert want[token] > 0
        assert logp == pytest.approx(np.log(want[token]), abs=1e-4)


def test_without_weight_and_cut_it_is_the_target(lms):
    guide = contrastive.guide(lms, weight=0.0, plausible=0.0)
    off = run(decode.generate, lms["target"], guide=guide)
    plain = run(decode.generate, lms["target"])
    np.testing.assert_array_equal(off.batch.tokens, plain.batch.tokens)
    np.testing.assert_allclose(off.batch.old_logps, plain.raw_logps, atol=1e-5)


def test_only_the_best_is_plausible_at_one(lms):
    guide = contrastive.guide(lms, weight=5.0, plausible=1.0)
    out = run(decode.generate, lms["target"], guide=guide)
    for ids, token, logp in steps(out):
        assert token == distribution(lms["target"], ids).argmax()
        assert logp == pytest.approx(0, abs=1e-6)


def test_greedy_with_the_amateur_as_draft_is_plain_guided_greedy(lms):
    guide = contrastive.guide(lms, weight=0.8, plausible=0.1)
    plain = run(decode.generate, lms["target"], guide=guide, temperature=0.0)
    fast = run(speculate, lms["target"], lms["amateur"], guide=guide, temperature=0.0,
               draft_length=2)  # fmt: skip
    assert responses(fast) == responses(plain)


def test_an_unknown_amateur_is_named(lms):
    with pytest.raises(ValueError, match=r"no LM 'weak'"):
        contrastive.guide(lms, amateur="weak")
