"""Pairs of answers under a short and a long context."""

import pytest

from alignax.batch import Example
from alignax.data import Examples, short_long

SHORT = Examples([Example(f"e:{i}", f"p{i}", (f"s{i}", "no")) for i in range(5)])
LONG = Examples(
    [
        Example("e:0", "context p0", ("l0",)),
        Example("e:1", "context p1", ("s1",)),
        Example("e:2", "context p2", ()),
        Example("e:9", "context p9", ("l9",)),
    ]
)


def short(*, split):
    del split
    return SHORT


def long(*, split):
    del split
    return LONG


def source(name):
    return {"name": f"{__name__}.{name}"}


def test_the_answer_under_the_short_context_is_chosen_under_the_long_one():
    rows = short_long.examples(
        split="train", short=source("short"), long=source("long")
    )
    assert list(rows) == [Example("e:0", "context p0", ("s0", "l0"), (1.0, 0.0))]
    assert [line[:3] for line in rows.report["dropped"]] == ["e:1", "e:2", "e:9"]


def test_no_answer_in_common_is_an_error(monkeypatch):
    monkeypatch.setattr(f"{__name__}.LONG", Examples([Example("x", "p", ("a",))]))
    with pytest.raises(ValueError, match="no pair among 1 answers"):
        short_long.examples(split="train", short=source("short"), long=source("long"))


@pytest.mark.parametrize("which", ["short", "long"])
def test_two_examples_with_one_id_are_refused_by_their_places(monkeypatch, which):
    data = {"short": SHORT, "long": LONG}[which]
    twice = Examples([*data, data[1]._replace(responses=("other",))])
    monkeypatch.setattr(f"{__name__}.{which.upper()}", twice)
    message = rf"^examples 1 and {len(data)} of {which} have the same id, 'e:1'$"
    with pytest.raises(ValueError, match=message):
        short_long.examples(split="train", short=source("short"), long=source("long"))
