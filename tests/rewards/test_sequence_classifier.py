"""A classifier of transformers scores what transformers scores."""

import json

import numpy as np
import pytest
import tiny

from alignax import rewards
from alignax.batch import Batch, Example
from alignax.models import load
from alignax.rewards import sequence_classifier
from alignax.text import tokenizer

GOLDEN = tiny.ROOT / "tests/golden/classifier"
CASES = json.loads((GOLDEN / "golden.json").read_text())
BEHIND = {"chatml": "\n", "qwen25": "\n", "llama3": ""}


def made(shape, invalid=()):
    valid = np.ones(shape, bool)
    for at in invalid:
        valid[at] = False
    mask = np.ones((*shape, 2), bool) & (np.arange(2) > 0)
    zeros = np.zeros(shape, np.float32)
    return Batch(np.zeros((*shape, 2), np.int32), mask, np.full(shape, 2, np.int32), zeros, valid)  # fmt: skip


@pytest.mark.parametrize("name", BEHIND)
def test_scores_are_those_of_transformers(name, tmp_path):
    text = tokenizer.load(str(tiny.family(name, tmp_path)))
    lm = load.load(GOLDEN)
    cases = [case for case in CASES if case["template"] == name]
    assert len(cases) == 3
    behind = sequence_classifier.after_turn(text)
    assert text.decode(behind) == BEHIND[name]

    def scores(responses, invalid=()):
        return rewards.call(
            rewards.load("sequence_classifier"), made((3, 2), invalid), responses,
            {"reward": lm}, tokenizer=text,
            examples=[Example("", case["prompt"], []) for case in cases],
        )  # fmt: skip

    want = [case["score"] for case in cases]
    got = scores([[case["response"], "other"] for case in cases])
    np.testing.assert_allclose(got[:, 0], want, atol=2e-5)
    assert (np.abs(got[:, 1] - want) > 1e-3).all()
    got = scores([["other", case["response"]] for case in cases], [(0, 0), (2, 1)])
    np.testing.assert_allclose(got[:, 1], [*want[:2], 0], atol=2e-5)
    assert got[0, 0] == 0


def test_a_classifier_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"rewards\.sequence_classifier needs an LM 'reward'; there are \[\]"):  # fmt: skip
        rewards.call(
            rewards.load("sequence_classifier"), made((1, 1)), [["a"]], {},
            examples=[Example("", "x", [])],
        )  # fmt: skip
