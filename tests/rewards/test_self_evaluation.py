"""A model's evaluation of its own responses: votes of both orders, and RAIN on them."""

import dataclasses

import jax
import numpy as np
import pytest
from test_judge import BIAS, TEXTS, TK, WORTH, call, lms, opinion

from alignax import rewards
from alignax.batch import Example
from alignax.decoders import rain
from alignax.sampling import decode

__all__ = ["lms"]  # a fixture


def tells(question):
    """The letter of what is true, by the worth of the answer."""
    text = question.split("as it goes:\n\n")[1].split("\n\nWhat")[0]
    sign = 1 if "(A) It is harmless." in question else -1
    return BIAS * 0.5 + sign * WORTH[text]


def test_votes_of_both_orders_have_both_signs_and_zero(lms):
    got = call("self_evaluation", TEXTS, lms, opinion(tells))
    # the bias of 1.5 nats outweighs a worth of -1 or 0.5 in one of the orders
    np.testing.assert_array_equal(got, [[1, 0, 0], [0, 1, 1]])
    got = call("self_evaluation", [["bad"], ["good"]], lms, opinion(lambda q: tells(q) - BIAS * 0.5))  # fmt: skip
    np.testing.assert_array_equal(got, [[-1], [1]])


def test_without_votes_the_probabilities_count(lms):
    got = call("self_evaluation", TEXTS, lms, opinion(tells), votes=False)

    def want(worth):
        both = [1 / (1 + np.exp(-(worth + s * BIAS * 0.5))) for s in (1, -1)]
        return 2 * np.mean(both) - 1

    np.testing.assert_allclose(
        got, [[want(WORTH[t]) for t in g] for g in TEXTS], atol=1e-5
    )


def test_a_question_and_its_answers_can_be_other_ones(lms):
    seen = []
    call(
        "self_evaluation", TEXTS, lms, opinion(lambda q: seen.append(q) or 0.0),
        question="{prompt}|{response}|{first}|{second}", good="yes", bad="no",
    )  # fmt: skip
    assert "User: Say hi|good|yes|no" in seen[0]
    assert "User: Say hi|good|no|yes" in seen[2]
    for question in ("{prompt} {answer}", "{prompt", "{} {prompt}"):
        with pytest.raises(ValueError, match="has something in braces that is none of prompt,"):  # fmt: skip
            call("self_evaluation", TEXTS, lms, None, question=question)


def test_rain_searches_by_the_models_own_evaluation(tiny_config, make_lm):
    """Values are on both sides of zero, as its rules for early decisions assume."""
    config = dataclasses.replace(tiny_config, vocab_size=TK.vocab_size, max_length=512)
    lm = make_lm(config, 3)
    reward = rewards.load({"name": "self_evaluation", "votes": False})
    seen = []

    def value(batch):
        texts = [[TK.decode(t[m].tolist()) for t, m in zip(*g, strict=True)] for g in zip(np.asarray(batch.tokens), np.asarray(batch.mask), strict=True)]  # fmt: skip
        found = rewards.call(
            reward, batch, texts, {"judge": lm}, tokenizer=TK,
            examples=[Example("", "Hi", [])],
        )  # fmt: skip
        seen.extend(found.ravel().tolist())
        return found

    prompt = np.array([TK.prompt(Example("", "Hi", []))], np.int32)
    out = rain.search(
        lm, {}, prompt, np.array([prompt.shape[1]]), jax.random.key(0), max_new=4,
        judge=value, simulations=6, extra=2, rollout=2, sets=3, sizes=(1, 2),
    )  # fmt: skip
    assert isinstance(out, decode.Generated)
    assert min(seen) >= -1
    assert max(seen) <= 1
    assert len(set(seen)) > 3
