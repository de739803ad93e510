"""Prompts to generate from: which ones can be used is known before a run begins."""

import numpy as np
import pytest

from alignax import plugin
from alignax.batch import Example
from alignax.data import Examples
from alignax.inputs import prompts, rows
from alignax.text import tokenizer

TK = tokenizer.load("bytes")
CHATML = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def templated(**reading):
    tk = tokenizer.dataclasses.replace(TK, chat_template=CHATML)
    return tk.read_as(tk.reading._replace(**reading))


ROWS = [
    Example("short", [user("hi")], []),
    Example("system", [{"role": "system", "content": "s"}, user("hi")], []),
    Example(
        "long", [user("a" * 10), {"role": "assistant", "content": "b"}, user("c")], []
    ),
    Example("longest", [user("z" * 90)], []),
]


def test_what_cannot_be_used_is_counted_before_the_first_step():
    found = prompts.usable(ROWS, templated(), length=25)
    assert [e.id for e in found] == ["short"]
    counts = found.counts
    assert (counts["read"], counts["used"]) == (4, 1)
    assert (counts["malformed"], counts["dropped"]) == (1, 2)
    assert counts["malformed_ids"][0].startswith(
        "system: the chat template has no system"
    )
    assert "truncate_prompts" in counts["dropped_ids"][0]
    batches = prompts.prompt_batches(found, templated(), batch_size=1, length=25)
    assert [b.ids for b in batches] == [["short"]]


@pytest.mark.parametrize("rule", ["exchanges", "left"])
def test_prompts_that_are_cut_are_counted(rule):
    tk = templated(truncate_prompts=rule, system="user")
    found = prompts.usable(ROWS, tk, length=25)
    assert len(found) == 4
    assert (found.counts["cut"], found.counts["dropped"]) == (2, 0)
    batches = prompts.prompt_batches(found, tk, batch_size=4, length=25)
    assert batches[0].cut == 2
    assert max(batches[0].lengths) <= 25
    if rule == "exchanges":
        assert batches[0].texts[1] == "user: s\n\nhi\nassistant:"
        assert batches[0].texts[2] == "user: c\nassistant:"


def test_no_usable_prompt_is_an_error_with_the_first_reason():
    with pytest.raises(
        ValueError, match="no usable prompt among 1 read; first: longest"
    ):
        prompts.usable(ROWS[3:], templated(), length=25)
    with pytest.raises(ValueError, match="the data set is empty"):
        prompts.usable([], templated(), length=25)


def test_all_reasons_are_listed_where_they_are_wanted():
    counts = rows.no_counts(reasons=True)
    prompts.usable(ROWS, templated(truncate_prompts="left"), length=25, counts=counts)
    kinds = {r["id"]: r["kind"] for r in counts["reasons"]}
    assert kinds == {
        "system": "malformed",
        "long": "cut_prompt",
        "longest": "cut_prompt",
    }


def test_parts_of_usable_examples_keep_what_is_said_of_them():
    rows = Examples(
        [Example(f"e{i}", "q", [], (), {"w": i, "other": i}) for i in range(6)],
        carried=("w",),
    )
    read = plugin.ReadAs(rows, {"raw": True})
    found = prompts.usable(read, TK, length=9)
    for some in (found[1:4], prompts.subset(found, [1, 2, 3])):
        assert [e.id for e in some] == ["e1", "e2", "e3"]
        assert (some.carried, some.reading) == (("w",), {"raw": True})
    (batch,) = prompts.prompt_batches(found[1:4], TK, batch_size=3, length=9)
    assert list(batch.columns) == ["w"]
    np.testing.assert_array_equal(batch.columns["w"], [1, 2, 3])


def test_a_section_may_leave_the_template_out():
    tk = templated()
    plain = [Example("x", "2 + 2 =", [])]
    assert tk.prompt(plain[0]) == tk.encode("user: 2 + 2 =\nassistant:")
    (batch,) = prompts.prompt_batches(
        plugin.ReadAs(plain, {"raw": True}), tk, batch_size=1, length=32
    )
    assert batch.texts == ["2 + 2 ="]
