"""Batch: what `check` refuses, and what the builders make of lists of ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import check, flatten, from_groups, from_pairs, num_rows


def pairs():
    return from_pairs([[1, 2], [3]], [[4], [5, 6]], [[7, 8], [9]], length=5, pad=36)


def test_from_pairs_joins_before_it_pads():
    batch = pairs()
    np.testing.assert_array_equal(
        batch.tokens,
        [
            [[1, 2, 4, 36, 36], [1, 2, 7, 8, 36]],
            [[3, 5, 6, 36, 36], [3, 9, 36, 36, 36]],
        ],
    )
    np.testing.assert_array_equal(batch.lengths, [[3, 4], [3, 2]])
    np.testing.assert_array_equal(batch.mask[0, 1], [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(batch.mask[1, 0], [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(batch.feedback, [[1, 0], [1, 0]])
    assert batch.valid.all()
    assert check(batch) is batch


def test_mask_does_not_look_at_pad_ids():
    """A response that ends in the id which also pads is scored to its end."""
    batch = from_pairs([[1]], [[5, 0]], [[0]], length=4, pad=0)
    np.testing.assert_array_equal(batch.mask[0, 0], [0, 1, 1, 0])
    np.testing.assert_array_equal(batch.mask[0, 1], [0, 1, 0, 0])


def test_smaller_groups_are_filled_with_invalid_rows():
    batch = from_groups([[1], [2]], [[[3], [4], [5]], [[6]]], length=3)
    assert batch.tokens.shape == (2, 3, 3)
    np.testing.assert_array_equal(batch.valid, [[1, 1, 1], [1, 0, 0]])
    assert not batch.mask[1, 1:].any()
    check(batch)


def test_scored_picks_the_turns():
    batch = from_groups([[1]], [[[2, 3, 4, 5]]], length=6,
                        scored=[[[True, False, False, True]]])  # fmt: skip
    np.testing.assert_array_equal(batch.mask[0, 0], [0, 1, 0, 0, 1, 0])


def test_a_response_with_nothing_to_score_is_not_valid():
    batch = from_groups([[1]], [[[2, 3]]], length=4, scored=[[[False, False]]])
    assert not batch.valid.any()
    check(batch)


def test_feedback_is_kept_raw():
    batch = from_groups([[1]], [[[2], [3]]], length=3, feedback=[[-2.5, 7.0]])
    np.testing.assert_array_equal(batch.feedback, [[-2.5, 7.0]])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[1]], [[2]], []), "1 prompts, 1 chosen and 0 rejected"),
        (([[1]], [[]], [[2]]), r"row \[0, 0\] has 1 prompt and 0 response"),
        (([[]], [[2]], [[2]]), r"row \[0, 0\] has 0 prompt and 1 response"),
        (([[1, 1, 1]], [[2]], [[2, 3]]), r"row \[0, 1\] has 5 tokens, but length is 4"),
    ],
)
def test_from_pairs_names_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_pairs(*arguments, length=4)


def test_from_groups_wants_a_group_for_every_prompt():
    with pytest.raises(ValueError, match="2 prompts and 1 groups"):
        from_groups([[1], [2]], [[[3]]], length=4)


def corrupt(field, value):
    batch = pairs()
    return batch._replace(**{field: value(np.array(getattr(batch, field)))})


def put(index, value):
    def change(x):
        x[index] = value
        return x

    return change


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("tokens", lambda x: x[0], r"Batch.tokens has shape \(2, 5\), expected"),
        ("tokens", lambda x: x * 1.0, "Batch.tokens has dtype float64, expected integers"),
        ("tokens", put((0, 0, 0), -100), "negative ids"),
        ("mask", lambda x: x[..., :4], r"Batch.mask has shape \(2, 2, 4\), expected"),
        ("mask", lambda x: x * 1.0, "Batch.mask has dtype float64, expected booleans"),
        ("mask", put((0, 0, 4), True), "beyond Batch.lengths"),
        ("mask", put((0, 0, 0), True), "True at t=0"),
        ("mask", lambda x: x & False, "Batch.valid is True on a response without"),
        ("lengths", lambda x: x + 9, r"spans 11\.\.13, expected 0\.\.T=5"),
        ("lengths", lambda x: x * 1.0, "Batch.lengths has dtype float64"),
        ("feedback", lambda x: x[:, :1], r"Batch.feedback has shape \(2, 1\)"),
        ("valid", lambda x: x * 1, "Batch.valid has dtype int64, expected booleans"),
        ("ref_logps", lambda _: np.zeros((2, 2)), r"Batch.ref_logps has shape \(2, 2\)"),
        ("old_logps", lambda _: np.zeros((2, 2)), r"Batch.old_logps has shape \(2, 2\)"),
        ("advantages", lambda _: np.zeros((2, 2)), "Batch.advantages has shape"),
    ],
)  # fmt: skip
def test_check_names_the_field(field, value, message):
    with pytest.raises(ValueError, match=message):
        check(corrupt(field, value))


def test_flatten_keeps_the_responses_of_a_prompt_together():
    batch = jax.tree.map(jnp.asarray, pairs())
    tokens, mask, lengths = flatten(batch)
    assert tokens.shape == mask.shape == (4, 5)
    np.testing.assert_array_equal(tokens[1], batch.tokens[0, 1])
    np.testing.assert_array_equal(mask[2], batch.mask[1, 0])
    np.testing.assert_array_equal(lengths, [3, 4, 3, 2])
    assert num_rows(batch) == 2
