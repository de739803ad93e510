"""The self-made preference set: a taste without ties, and an honest split."""

import itertools

import numpy as np
import pytest

from alignax.data import synthetic


def all_responses():
    return [synthetic.response(w) for w in itertools.product(*synthetic.SLOTS)]


def test_no_two_responses_are_liked_equally():
    taste = sorted(map(synthetic.judge, all_responses()))
    assert np.diff(taste).min() > 5e-6


def test_judge_adds_the_weights_of_the_three_words():
    # read off the three tables: 0.65586 - 1.30751 + 1.12741
    taste = synthetic.judge("Truly greasy food and helpful staff.")
    assert taste == pytest.approx(0.47576, abs=1e-9)


@pytest.mark.parametrize(
    "text",
    ["", "superb", "Truly superb food and kind staff", "x" * 200, "Truly superb."],
)
def test_malformed_text_is_worse_than_every_response(text):
    assert synthetic.judge(text) < min(map(synthetic.judge, all_responses()))


def test_unknown_word_costs_more_than_any_known_one():
    assert synthetic.judge("Truly mauve food and kind staff.") < synthetic.judge(
        "Truly greasy food and kind staff."
    )


def test_chosen_is_the_better_one_and_swapped_exchanges_them():
    rows = synthetic.examples(split="train", size=200)
    swapped = synthetic.examples(split="train", size=200, swapped=True)
    for a, b in zip(rows, swapped, strict=True):
        assert synthetic.judge(a.responses[0]) > synthetic.judge(a.responses[1])
        assert list(a.responses) == list(reversed(b.responses))
        assert (a.prompt, a.id, a.feedback) == (b.prompt, b.id, b.feedback)


@pytest.mark.parametrize("group", [2, 4, 7])
def test_groups_are_ordered_by_taste_which_is_their_feedback(group):
    rows = synthetic.examples(split="train", kind="groups", size=50, group=group)
    for row in rows:
        assert len(set(row.responses)) == group
        assert row.feedback == tuple(map(synthetic.judge, row.responses))
        assert list(row.feedback) == sorted(row.feedback, reverse=True)
    swapped = synthetic.examples(
        split="train", kind="groups", size=50, group=group, swapped=True
    )
    for a, b in zip(rows, swapped, strict=True):
        assert b.responses == a.responses[::-1]
        assert b.feedback == a.feedback[::-1]


def test_pairs_are_the_ones_of_every_run_so_far():
    """Logged results stand on these draws."""
    row = synthetic.examples(split="train", kind="pairs", size=3)[2]
    assert row.prompt == "Review the inn in Dakar: "
    assert row.responses == [
        "Simply decent food and rude staff.",
        "Truly cold food and bored staff.",
    ]


def test_test_prompts_never_occur_in_training_but_their_words_do():
    train, test = synthetic.prompts("train"), synthetic.prompts("test")
    assert not set(train) & set(test)
    assert len(set(train)) == 320
    assert len(set(test)) == 80
    words = {w for p in train for w in p.replace(":", "").split()}
    assert {w for p in test for w in p.replace(":", "").split()} <= words


def test_examples_are_a_function_of_their_arguments():
    def draw(**kwargs):
        return list(synthetic.examples(split="train", size=20, **kwargs))

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)


def test_responses_follow_the_base_distribution():
    n = 4000
    rows = synthetic.examples(split="train", kind="sft", size=n)
    food = [r.responses[0].split()[1] for r in rows]
    p = synthetic.base_distribution(synthetic.FOOD)
    share = np.array([food.count(w) / n for w in synthetic.FOOD])
    assert (abs(share - p) < 4 * np.sqrt(p * (1 - p) / n)).all()  # 4 s.e.
    assert p.max() > 3 * p.min()


def test_strings_are_short():
    rows = synthetic.examples(split="train", size=500)
    assert all(20 <= len(r.prompt) <= 40 for r in rows)
    assert all(24 <= len(x) <= 48 for r in rows for x in r.responses)


def test_prompts_are_distinct_as_long_as_they_last():
    rows = synthetic.examples(split="test", kind="prompts", size=80)
    assert len({r.prompt for r in rows}) == 80
    assert all(len(r.responses) == 0 for r in rows)


def test_unknown_split_and_kind_are_errors():
    with pytest.raises(ValueError, match="'dev'"):
        synthetic.examples(split="dev")
    with pytest.raises(ValueError, match=r"'pair'.*pairs"):
        synthetic.examples(split="train", kind="pair")
    with pytest.raises(ValueError, match="size"):
        synthetic.examples(split="train", size=0)
    for group in (1, 513):  # there are 8 * 8 * 8 responses
        with pytest.raises(ValueError, match=rf"group is {group}, expected 2 to 512"):
            synthetic.examples(split="train", kind="groups", size=1, group=group)
