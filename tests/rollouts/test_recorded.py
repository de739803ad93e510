"""Responses of another sampler: what a line may be, and how they become a batch."""

import json

import jax
import numpy as np
import pytest

from alignax.inputs.prompts import PromptBatch
from alignax.rollouts import recorded

LINES = [
    {"id": "a", "ids": [5, 6, 2], "logps": [-1.0, -0.5, -0.25]},
    {"id": "b", "ids": [7], "logps": [-2.0]},
    {"id": "a", "ids": [6], "logps": [-3.0], "truncated": False},
    {"id": "a", "ids": [9, 9], "logps": [0, -1]},
]


def read(folder, lines):
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return recorded.read(str(path), eos_ids=(2,), vocab_size=10)


def prompts(*names):
    tokens = np.array([[1, 3, 4], [8, 0, 0]], np.int32)
    return PromptBatch(
        tokens, np.array([3, 1], np.int32), np.ones(2, bool), ["", ""], [*names], {}
    )  # fmt: skip


def generated(found, group, *, key=0, names=("a", "b"), max_new=4):
    return recorded.generated(
        found, prompts(*names), jax.random.key(key), group=group, max_new=max_new
    )


def test_a_batch_has_the_responses_of_its_prompts(tmp_path):
    out = generated(read(tmp_path, LINES), 3)
    batch = out.batch
    assert batch.tokens.shape == (2, 3, 7)
    assert batch.tokens[0, 0].tolist() == [1, 3, 4, 5, 6, 2, 0]
    assert batch.mask[0, 0].tolist() == [False] * 3 + [True] * 3 + [False]
    assert batch.lengths.tolist() == [[6, 4, 5], [2, 1, 1]]
    assert batch.valid.tolist() == [[True] * 3, [True, False, False]]
    np.testing.assert_array_equal(batch.old_logps[0, 0, 3:6], [-1, -0.5, -0.25])
    assert not np.asarray(batch.old_logps)[~np.asarray(batch.mask)].any()
    # the end of a response is its last id, or what its line says
    assert out.truncated.tolist() == [[False, False, True], [True, False, False]]


def test_some_of_more_responses_are_taken_by_the_key(tmp_path):
    found = read(tmp_path, LINES)
    taken = {
        tuple(generated(found, 2, key=k).batch.lengths[0].tolist()) for k in range(20)
    }
    assert taken == {(6, 4), (6, 5), (4, 5)}  # in the order of the file
    again = generated(found, 2, key=7).batch
    jax.tree.map(np.testing.assert_array_equal, again, generated(found, 2, key=7).batch)


def test_a_group_that_no_prompt_fills_has_empty_places(tmp_path):
    batch = generated(read(tmp_path, LINES), 5).batch
    assert batch.valid.sum(1).tolist() == [3, 1]
    assert batch.tokens[0, 4, :3].tolist() == [1, 3, 4]
    assert batch.lengths[0, 4] == 3


WRONG = {
    "no ids": ({"id": "a", "logps": []}, "no 'ids'"),
    "text": ({"id": "a", "ids": "abc", "logps": [-1]}, "'ids' is 'abc'"),
    "none": ({"id": "a", "ids": [], "logps": []}, "at least one"),
    "unknown id": ({"id": "a", "ids": [10], "logps": [-1]}, r"expected 0\.\.9"),
    "another length": ({"id": "a", "ids": [5, 6], "logps": [-1]}, "'logps' has 1, expected 2"),
    "positive": ({"id": "a", "ids": [5], "logps": [0.5]}, "holds 0.5"),
    "infinite": ({"id": "a", "ids": [5], "logps": [-1e999]}, "finite numbers|Infinity"),
    "words": ({"id": "a", "ids": [5], "logps": [-1], "truncated": "no"}, "'truncated' is 'no'"),
    "a list": ([1], "expected 'id'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_line_that_is_no_response_is_named(name, tmp_path):
    line, message = WRONG[name]
    with pytest.raises(ValueError, match=rf"responses\.jsonl:2: .*({message})"):
        read(tmp_path, [LINES[0], line])


def test_what_does_not_fit_the_prompts_is_an_error(tmp_path):
    found = read(tmp_path, LINES)
    recorded.check(found, ["a", "b"])
    with pytest.raises(ValueError, match=r"no response to 1 of 2 prompts.*'c'"):
        recorded.check(found, ["a", "c"])
    with pytest.raises(ValueError, match=r"3 tokens, expected at most .*max_new=2"):
        generated(found, 3, max_new=2)
    with pytest.raises(ValueError, match="holds no responses"):
        read(tmp_path, [])
    with pytest.raises(FileNotFoundError):
        recorded.read(str(tmp_path / "none.jsonl"), eos_ids=(), vocab_size=9)
