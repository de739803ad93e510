"""Texts and ids of chat templates are those of transformers' `apply_chat_template`.

The fixtures are `tests/golden/templates/`, made by `tests/golden/make_templates.py`,
whose docstring says what a case holds. Control tokens in user text are parsed there.
"""

import json
import zipfile

import chat_families as families
import pytest
from chat_families import FAMILIES, GOLDEN

from alignax.batch import Example
from alignax.text.turns import EMPTY_THOUGHT

DIALOGUES = json.loads((GOLDEN / "dialogues.json").read_text())
KINDS = 12  # of templates that the fixtures are to have


@pytest.fixture(scope="session")
def load():
    """load(family) -> its tokenizer."""
    return families.load


def golden(family):
    with zipfile.ZipFile(GOLDEN / f"{family}.zip") as packed:
        return json.loads(packed.read("golden.json"))


def given(case):
    """(messages, add_generation_prompt, variables) of a case."""
    row = DIALOGUES[case["dialogue"]]
    variables = {k: row[k] for k in ("tools", "documents") if k in row}
    variables |= row.get("variables", {}) | case.get("variables", {})
    return row["messages"][: case["length"]], case["generation_prompt"], variables


def name(family, case):
    parts = [family, case["dialogue"], "prompt" if case["generation_prompt"] else "all"]
    parts += [f"{k}={v}" for k, v in case.get("variables", {}).items()]
    return "-".join(parts)


def cases():
    for family in FAMILIES:
        for case in golden(family):
            yield pytest.param(family, case, id=name(family, case))


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


def as_tokens(load, family):
    """The tokenizer of a family, which parses control tokens in user text."""
    text = load(family)
    return text.read_as(text.reading._replace(specials="tokens"))


def takes_system(family, messages):
    """Whether the template shows the system turn of the row."""
    return family != "no_system" or messages[0]["role"] != "system"


@pytest.mark.parametrize(("family", "case"), list(cases()))
def test_the_prompt_has_the_ids_of_transformers(family, case, load):
    messages, open_turn, variables = given(case)
    if "refused" in case or not open_turn or messages[-1]["role"] == "assistant":
        return
    example = Example("x", messages, [], template=variables)
    if takes_system(family, messages):
        assert as_tokens(load, family).prompt(example) == case["ids"]
    else:
        with pytest.raises(ValueError, match="template_system"):
            as_tokens(load, family).prompt(example)


@pytest.mark.parametrize(("family", "case"), list(cases()))
def test_a_row_has_the_ids_of_the_whole_and_ends_in_an_end_token(family, case, load):
    messages, open_turn, variables = given(case)
    if "refused" in case or open_turn or not takes_system(family, messages):
        return
    text = as_tokens(load, family)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for at in turns:  # as a prompt and the rest of the dialogue
        row = Example("x", messages[:at], [messages[at:]], template=variables)
        got = text.tokenize(row)
        ids = got.prompt_ids + got.responses[0]
        assert ids == case["ids"][: len(ids)]
        first = got.scored[0].index(True)  # behind an empty thought
        thought = text.decode(got.responses[0][:first], keep_specials=True)
        assert not first or EMPTY_THOUGHT.fullmatch(thought)
        assert got.scored[0][-1]
        ends = text.eos_ids | {text.encoder.control[text.end_of_turn]}
        assert ids[-1] in ends
        scored = [*[False] * len(got.prompt_ids), *got.scored[0]]
        closed = [k for k, i in enumerate(ids) if scored[k] and i in ends]
        assert len(closed) >= len([i for i in turns if i >= at])
        if "mask" in case:
            # The line break behind an end token is marked, too; it is never scored.
            mask = [
                c == "1" and ids[k - 1] not in ends
                for k, c in enumerate(case["mask"][: len(ids)])
            ]
            n = len(got.prompt_ids)
            assert scored[n:] == mask[n:]


@pytest.mark.parametrize("family", ["qwen3", "open_think"])
def test_an_empty_thought_is_not_scored_and_a_real_one_is(family, load):
    text = load(family)
    prompt = [{"role": "user", "content": "Hi"}]
    for thought in ("", "Easy."):
        answer = {"role": "assistant", "content": "Hello", "reasoning_content": thought}
        got = text.tokenize(Example("x", prompt, [[answer]]))
        pairs = zip(got.responses[0], got.scored[0], strict=True)
        scored = text.decode([i for i, s in pairs if s], keep_specials=True)
        end = text.decode([got.responses[0][-1]], keep_specials=True)
        whole = text.render([*prompt, answer])
        assert whole.rstrip().endswith(f"Hello{end}")
        if thought:
            assert "Easy." in scored
            assert "</think>" in scored
        elif family == "qwen3":
            assert scored == f"Hello{end}"
