"""Which arguments a reward gets: one rule by its signature."""

import functools
import math

import pytest

from alignax import rewards
from alignax.reward_functions import signature


def of_text(text):
    return 0.0


def of_text_with_default(answer_text, strict=True, *, weight=1.0):
    return 0.0


def of_groups(texts, answer, *, weight=1.0):
    return [[0.0]]


def of_rows(texts, rows):
    return [[0.0]]


def trl(prompts, completions, answer, **kwargs):
    return [0.0]


def trl_keyword_only(completions, *, answer, weight=2.0):
    return [0.0]


def with_rest(texts, **kwargs):
    return [[0.0]]


class Judge:
    def __call__(self, texts, lms):
        return [[0.0]]


@pytest.mark.parametrize(
    ("function", "kind", "columns"),
    [
        (of_text, "text", []),
        (of_text_with_default, "text", []),
        (len, "text", []),
        (math.sqrt, "text", []),
        (functools.partial(of_groups, weight=2), "groups", ["answer"]),
        (of_groups, "groups", ["answer"]),
        (of_rows, "groups", ["answer", "level"]),
        (with_rest, "groups", ["answer", "level"]),
        (trl, "completions", ["answer", "level"]),
        (trl_keyword_only, "completions", ["answer"]),
        (Judge(), "groups", []),
    ],
)
def test_the_form_and_the_columns_are_read_from_the_signature(function, kind, columns):
    found = signature.read(function)
    assert found.kind == kind
    signature.check(found, ["answer", "level"], "r")
    assert signature.columns(found, ["answer", "level"]) == columns


def stars(*args):
    return 0.0


def nothing(*, weight=1.0):
    return 0.0


async def later(text):
    return 0.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (stars, r"takes \*args; expected f\(text\)"),
        (nothing, "has no positional argument"),
        (later, "is async"),
    ],
)
def test_what_is_no_reward_is_refused_when_it_is_loaded(function, message):
    name = f"{__name__.rpartition('.')[2]}.{function.__name__}"
    with pytest.raises(ValueError, match=message):
        signature.read(function, name)
    with pytest.raises(ValueError, match=message):
        rewards.load(f"{__name__}.{function.__name__}")


def misspelt(texts, anwser):
    return [[0.0]]


def test_an_argument_that_is_nothing_lists_what_there_is():
    found = signature.read(misspelt)
    message = (
        r"takes 'anwser' \(did you mean 'answer'\?\), which is neither a column of the "
        r"data, \['answer'\], nor one of texts, whole, ids, prompts, rows"
    )
    with pytest.raises(ValueError, match=message):
        signature.check(found, ["answer"], "mine")
    with pytest.raises(ValueError, match="which have none"):
        signature.check(found, [], "mine")


@pytest.mark.parametrize(
    ("function", "column"), [(of_rows, "rows"), (of_rows, "texts"), (trl, "completions")]
)  # fmt: skip
def test_a_column_with_the_name_of_something_else_is_refused(function, column):
    with pytest.raises(ValueError, match=f"have a column '{column}'.*rename it"):
        signature.check(signature.read(function), ["answer", column], "mine")
    # a column that the reward does not ask for by name does not disturb
    signature.check(signature.read(of_groups), ["answer", "score"], "mine")


def test_keyword_only_arguments_are_hyper_parameters():
    bound = rewards.load({"name": f"{__name__}.of_groups", "weight": 3})
    assert bound.hyper == {"weight": 3.0}
    bound = rewards.load(f"{__name__}.trl_keyword_only")
    assert bound.hyper == {"weight": 2.0}  # `answer` is a column, as in TRL
    with pytest.raises(ValueError, match="no hyper-parameter 'weigth'"):
        rewards.load({"name": f"{__name__}.of_groups", "weigth": 3})


def test_data_are_not_read_for_a_reward_that_reads_no_columns():
    constraints = {"name": "constraints", "max_words": 3}
    several = {"a": constraints, "b": f"{__name__}.of_rows"}
    reads = {
        f"{__name__}.of_text": False, f"{__name__}.of_rows": True, f"{__name__}.trl": True,
        f"{__name__}.of_groups": True,
    }  # fmt: skip
    for name, want in reads.items():
        assert rewards.reads_rows(rewards.load(name)) == want
    assert not rewards.reads_rows(rewards.load(constraints))
    assert rewards.reads_rows(rewards.load({"name": "ensemble", "members": several}))


def text_and_answer(text, answer=""):
    return 0.0


def only_answer(answer):
    return 0.0


def text_and_rest(text, **kwargs):
    return 0.0


@pytest.mark.parametrize("function", [text_and_answer, only_answer, text_and_rest])
def test_a_function_of_a_text_that_names_a_column_is_refused(function):
    found = signature.read(function)
    with pytest.raises(ValueError, match="name its first argument 'texts'"):
        signature.check(found, ["answer"], "mine")
    signature.check(signature.read(of_text), ["text", "answer"], "mine")
