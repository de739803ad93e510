"""Made-up authors: who is forgotten, what is asked, and what the labels mean."""

import re

import pytest

from alignax.batch import form
from alignax.data import forget_retain


def make(**arguments):
    return list(forget_retain.examples(**{"split": "train", **arguments}))


def people(rows):
    return {row.id.split(":")[0].rsplit("/", 1)[1] for row in rows}


def test_the_parts_share_no_author_and_are_the_whole():
    parts = {part: make(part=part, authors=30) for part in forget_retain.PARTS}
    assert len(parts["all"]) == 30 * 6
    assert len(people(parts["forget"])) == 3
    assert not people(parts["forget"]) & people(parts["retain"])
    assert parts["retain"] + parts["forget"] == parts["all"]


def test_a_smaller_forget_set_lies_within_a_larger_one():
    sets = [people(make(part="forget", forget=share)) for share in (0.01, 0.05, 0.1)]
    assert [len(s) for s in sets] == [1, 5, 10]
    assert sets[0] < sets[1] < sets[2]


def test_names_are_distinct_and_every_question_names_its_author():
    rows = make(authors=400)
    questions = {row.prompt for row in rows}
    assert len(questions) == len(rows) == 2400
    first = make(authors=2)[0]
    assert first.prompt.startswith("Where was ")
    name = first.prompt.removeprefix("Where was ").removesuffix(" born?")
    assert all(name in row.prompt for row in make(authors=2)[:6])
    assert first.responses[0].startswith(f"{name} was born in ")


def test_the_test_split_asks_for_the_same_facts_in_other_words():
    train, test = make(authors=20), make(authors=20, split="test")
    assert [row.responses for row in train] == [row.responses for row in test]
    assert not {row.prompt for row in train} & {row.prompt for row in test}


def test_labels_say_what_is_to_be_forgotten():
    assert {row.feedback for row in make(part="forget")} == {(0.0,)}
    assert {row.feedback for row in make(part="retain")} == {(1.0,)}


def test_refusals_replace_the_answers_to_forget_alone():
    kinds = ("answers", "refusals", "pairs")
    answers, refusals, pairs = (make(kind=kind) for kind in kinds)
    for answer, refusal, pair in zip(answers, refusals, pairs, strict=True):
        if "/retain/" in answer.id:
            assert answer == refusal == pair
        else:
            assert refusal.responses[0] in forget_retain.REFUSALS
            assert refusal.feedback == (1.0,)
            assert pair.responses == [*refusal.responses, *answer.responses]
            assert pair.feedback == (1.0, 0.0)
    assert len({row.responses[0] for row in make(kind="refusals", part="forget")}) > 3


def test_the_set_is_a_function_of_its_arguments():
    assert make(seed=1) == make(seed=1)
    one, other = make(seed=1), make(seed=2)
    assert {row.prompt for row in one} != {row.prompt for row in other}  # names
    trades = [[row.responses for row in rows[5::6]] for rows in (one, other)]
    assert trades[0] != trades[1]


def test_an_author_does_not_depend_on_how_many_others_there_are():
    few, many = make(authors=10, part="retain"), make(authors=50, part="retain")
    assert [r.responses for r in few] == [r.responses for r in many[: len(few)]]


@pytest.mark.parametrize(
    "argument, value",
    [("split", "dev"), ("part", "forgotten"), ("kind", "sft"), ("authors", 1),
     ("authors", 401), ("forget", 0.0), ("forget", 1.0)],
)  # fmt: skip
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value!r}, expected"):
        make(**{argument: value})


def test_answers_without_labels_are_demonstrations():
    for kind in ("answers", "refusals", "pairs"):
        rows, labelled = make(kind=kind, labelled=False), make(kind=kind)
        for row, other in zip(rows, labelled, strict=True):
            pair = kind == "pairs" and "/forget/" in row.id
            assert form(row) == ("pairs" if pair else "demonstrations")
            assert form(other) == ("pairs" if pair else "labelled")
            assert row.responses == other.responses


def test_options_are_the_answer_in_two_wordings_and_five_wrong_ones():
    answers, options = make(authors=40), make(authors=40, kind="options")
    assert make(authors=40, kind="options") == options
    for answer, row in zip(answers, options, strict=True):
        assert (answer.id, answer.prompt) == (row.id, row.prompt)
        assert form(row) == "unscored"
        true, other, *wrong = row.responses
        assert true == answer.responses[0]
        assert len({true, other, *wrong}) == 7
        wordings = forget_retain.QUESTIONS[int(row.id.split(":")[1])][2:]
        first, second = (
            re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(x)) for x in wordings
        )
        facts = re.fullmatch(second, other).groupdict()
        taught = re.fullmatch(first, true).groupdict()
        assert {**facts, **taught} == facts
        for text in wrong:  # in the other words too, and another fact
            found = re.fullmatch(second, text).groupdict()
            assert found != facts
            assert found["name"] == facts["name"]
            assert not re.fullmatch(first, text)
