"""Responses drawn and scored: the overlong penalty, and which groups have a difference."""

import jax
import numpy as np
import pytest

from alignax import plugin
from alignax.batch import LM, Batch, from_groups
from alignax.inputs.prompts import PromptBatch
from alignax.rollouts import sampler
from alignax.sampling.decode import Generated
from alignax.text import tokenizer

LENGTHS = [[1, 3, 4, 5], [2, 2, 3, 1]]  # tokens of responses; 5 are all there may be


TK = tokenizer.load("bytes")
(X,) = (i for i in range(TK.vocab_size) if TK.decode([i]) == "x")


def responses(lengths) -> Batch:
    return from_groups(
        [[1]] * len(lengths), [[[X] * n for n in row] for row in lengths], length=6
    )


def generate(lm, prompts, lengths, key, *, max_new, group, temperature):
    batch = responses(LENGTHS)
    cut = np.asarray(batch.mask).sum(-1) == max_new
    return Generated(batch, np.zeros(batch.mask.shape, np.float32), cut, {})


def make(reward=lambda text: 1.0, **more) -> sampler.Sampler:
    return sampler.Sampler(generate, plugin.bind(reward), {}, TK, 5, **more)


def draw(s: sampler.Sampler) -> sampler.Drawn:
    prompts = PromptBatch(
        np.ones((2, 1), np.int32), np.ones(2, np.int32), np.ones(2, bool),
        ["a", "b"], ["a", "b"], {},
    )  # fmt: skip
    return s.draw(LM(None, {}), prompts, jax.random.key(0), 4)


def test_the_penalty_is_linear_from_the_buffer_to_the_limit():
    """A buffer of 2 of 5 tokens: 3 cost nothing, 4 half, 5 all of 1.5."""
    got = draw(make(overlong_buffer=2, overlong_penalty=1.5)).batch.feedback
    assert got.tolist() == [[1, 1, 0.25, -0.5], [1, 1, 1, 1]]


def test_without_a_buffer_nothing_is_late():
    assert (draw(make()).batch.feedback == 1).all()


def test_the_length_is_no_difference_in_reward():
    drawn = draw(make(overlong_buffer=5))
    assert np.ptp(drawn.batch.feedback, axis=1).all()
    assert drawn.differs.tolist() == [False, False]
    drawn = draw(make(lambda text: float(len(text) > 3)))
    assert drawn.differs.tolist() == [True, False]


def test_a_truncated_response_is_punished_and_no_more():
    s = make(truncated="punish", punishment=-7.0, overlong_buffer=2)
    drawn = draw(s)
    assert drawn.batch.feedback.tolist() == [[1, 1, 0.5, -7], [1, 1, 1, 1]]
    assert drawn.differs.tolist() == [True, False]


def test_what_is_dropped_is_no_difference():
    drawn = draw(make(lambda text: 1.0 + (len(text) > 4), truncated="drop"))
    assert drawn.batch.valid.tolist() == [[True] * 3 + [False], [True] * 4]
    assert drawn.differs.tolist() == [False, False]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"overlong_buffer": 6}, r"overlong_buffer is 6, expected 0 to rollout\.max_new=5"),
        ({"overlong_buffer": -1}, "overlong_buffer is -1"),
        ({"overlong_penalty": -1.0}, "overlong_penalty is -1.0"),
        ({"truncated": "cry"}, "truncated is 'cry'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        make(**more).check()


def test_the_penalty_is_part_of_what_rewards_depend_on():
    assert make().identity() != make(overlong_buffer=1).identity()
