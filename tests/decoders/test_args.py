"""ARGS against the plain twins: the distribution on every prefix, greedy and not."""

import numpy as np
import pytest
from small_lms import (
    LENGTHS,
    PROMPTS,
    V,
    distribution,
    models,
    responses,
    run,
    softmax,
    steps,
    value,
)

from alignax.decoders import args
from alignax.sampling import decode

K, W = 3, 2.0


@pytest.fixture(scope="module")
def lms(tiny_config, make_lm):
    return models(tiny_config, make_lm, "target", "reward", value_head=True)


def tilted(lms, ids, temperature=1.0, weight=W, k=K):
    """Scores of the k best tokens, -inf of the others."""
    logps = np.log(distribution(lms["target"], ids)) / temperature
    best = np.argsort(-logps)[:k]
    out = np.full(V, -np.inf)
    out[best] = [logps[v] + weight * value(lms["reward"], [*ids, v]) for v in best]
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_distribution_is_the_tilted_one_on_the_best_tokens(lms, temperature):
    guide = args.guide(lms, weight=W)
    out = run(decode.generate, lms["target"], guide=guide, candidates=K,
              temperature=temperature)  # fmt: skip
    for ids, token, logp in steps(out):
        want = np.log(softmax(tilted(lms, ids, temperature))[token])
        assert logp == pytest.approx(want, abs=1e-4)


def test_the_papers_temperature_divides_the_reward_too(lms):
    """softmax((logit + w r) / τ) is ours with the weight w / τ."""
    tau = 0.7
    guide = args.guide(lms, weight=W / tau)
    out = run(decode.generate, lms["target"], guide=guide, candidates=K,
              temperature=tau)  # fmt: skip
    for ids, token, logp in steps(out):
        want = np.log(softmax(tilted(lms, ids) / tau)[token])
        assert logp == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("k", [1, K])
def test_greedy_takes_the_best_of_the_candidates(lms, k):
    guide = args.guide(lms, weight=W)
    out = run(decode.generate, lms["target"], guide=guide, candidates=k,
              temperature=0.0)  # fmt: skip
    for b in range(2):
        ids = PROMPTS[b, : LENGTHS[b]].tolist()
        for token in responses(out)[b][0]:
            assert token == int(tilted(lms, ids, k=k).argmax())
            ids.append(token)


def test_no_weight_leaves_the_best_tokens_alone(lms):
    none = run(decode.generate, lms["target"], guide=args.guide(lms, weight=0.0),
               candidates=V)  # fmt: skip
    plain = run(decode.generate, lms["target"])
    np.testing.assert_array_equal(none.batch.tokens, plain.batch.tokens)
    np.testing.assert_allclose(none.batch.old_logps, plain.raw_logps, atol=1e-5)


def test_it_has_no_bounds_unless_it_is_off(lms):
    assert args.guide(lms).lo == -np.inf
    assert args.guide(lms).hi == np.inf
    off = args.guide(lms, weight=0.0)
    assert (off.lo, off.hi) == (0.0, 0.0)


def test_bad_models_are_named(lms, tiny_lm):
    with pytest.raises(ValueError, match=r"no LM 'rm'; there are \['reward', 'target'"):
        args.guide(lms, reward="rm")
    with pytest.raises(ValueError, match="LM 'tiny' has no scalar head"):
        args.guide({"tiny": tiny_lm}, reward="tiny")
