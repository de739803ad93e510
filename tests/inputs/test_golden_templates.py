"""Texts and ids of chat templates are those of transformers' `apply_chat_template`.

The fixtures are `tests/golden/templates/`, made by `tests/golden/make_templates.py`,
whose docstring says what a case holds. Control tokens in user text are parsed there.
"""

import functools
import json
import pathlib
import zipfile

import pytest

from alignax.inputs import tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "templates"
FAMILIES = sorted(p.stem for p in GOLDEN.glob("*.zip"))
DIALOGUES = json.loads((GOLDEN / "dialogues.json").read_text())
KINDS = 12  # of templates that the fixtures are to have


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """load(family) -> its tokenizer."""

    @functools.cache
    def one(family):
        folder = tmp_path_factory.mktemp("templates") / family
        with zipfile.ZipFile(GOLDEN / f"{family}.zip") as packed:
            packed.extractall(folder)
        return tokenizer.load(folder)

    return one


def golden(family):
    with zipfile.ZipFile(GOLDEN / f"{family}.zip") as packed:
        return json.loads(packed.read("golden.json"))


def given(case):
    """(messages, add_generation_prompt, variables) of a case."""
    row = DIALOGUES[case["dialogue"]]
    variables = {k: row[k] for k in ("tools", "documents") if k in row}
    variables |= row.get("variables", {}) | case.get("variables", {})
    return row["messages"][: case["length"]], case["generation_prompt"], variables


def unsupported(family, case):
    """Why today's `render` cannot be compared, or None."""
    messages, _, variables = given(case)
    if variables:
        return "render takes no variables of the template"
    if any(m["content"] is None for m in messages):
        return "content None is not left out of the message"
    if family == "channel" and "reasoning_content" in messages[-1]:
        return "reasoning_content is not read as thinking"
    return None


def name(family, case):
    parts = [family, case["dialogue"], "prompt" if case["generation_prompt"] else "all"]
    parts += [f"{k}={v}" for k, v in case.get("variables", {}).items()]
    return "-".join(parts)


def cases():
    for family in FAMILIES:
        for case in golden(family):
            why = unsupported(family, case)
            marks = [pytest.mark.xfail(reason=why)] if why else []
            yield pytest.param(family, case, id=name(family, case), marks=marks)


def test_there_is_a_golden_of_every_kind():
    assert len(FAMILIES) == KINDS
    assert {p.stem for p in GOLDEN.glob("*.jinja")} == set(FAMILIES)


@pytest.mark.parametrize(("family", "case"), list(cases()))
def test_text_and_ids_are_those_of_transformers(family, case, load):
    text = load(family)
    messages, open_turn, variables = given(case)
    if "refused" in case:
        with pytest.raises(ValueError, match="refuses"):
            text.render(messages, open_turn, **variables)
        return
    rendered = text.render(messages, open_turn, **variables)
    assert rendered == case["text"]
    assert text.encode(rendered) == case["ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_beside_the_archive_is_the_one_within(family):
    with zipfile.ZipFile(GOLDEN / f"{family}.zip") as packed:
        within = packed.read("chat_template.jinja").decode()
    assert within == (GOLDEN / f"{family}.jinja").read_text()
