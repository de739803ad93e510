"""What is scored of a dialogue, sentence by sentence of the rules (see `dialogues`)."""

import json
import pathlib

import chat_families as families
import pytest
from chat_families import assistant, system, user

from alignax.batch import Example
from alignax.inputs import rows
from alignax.text import tokenizer

CASES = pathlib.Path(__file__).parents[3] / "shared" / "cases"
CHATML = "<|im_start|>assistant\n"


def tokens(text, prompt, *responses, **more):
    row = Example("f:1", prompt, list(responses), **more)
    return text.dialogues.ids(text.dialogues.render(row))


def shown(text, got, g=0):
    """(prompt, scored text of a response with '_' for what is not scored)."""
    out, last = "", None
    ids = got.responses[g]
    for k, scored in enumerate(got.scored[g]):
        if scored != last:
            out += "{" if scored else "}" if last is not None else ""
            last = scored
        out += text.decode(ids[k : k + 1], keep_specials=True)
    out += "}" if last else ""
    return text.decode(got.prompt, keep_specials=True), out


def with_template(family, template):
    return tokenizer._replace(families.load(family), chat_template=template)


# -- 1, 2: what a generation prompt writes, empty thoughts, marks


def test_a_thought_of_an_earlier_turn_goes_and_the_last_one_is_scored():
    text = families.load("qwen3")
    said = [user("Hello"), assistant("<think>\nwhy\n</think>\n\nHi"), user("more")]
    prompt, answer = shown(
        text, tokens(text, said, [assistant("Sure", reasoning_content="because")])
    )
    assert "why" not in prompt
    assert prompt.endswith(CHATML)
    assert answer == "{<think>\nbecause\n</think>\n\nSure<|im_end|>}"


def test_an_empty_thought_is_not_scored():
    text = families.load("qwen3")
    prompt, answer = shown(text, tokens(text, "Hello", "Hi"))
    assert prompt + answer == (
        f"<|im_start|>user\nHello<|im_end|>\n{CHATML}<think>\n\n</think>\n\n{{Hi<|im_end|>}}"
    )


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant<|message|>' }}"
    "{% generation %}{{ '<think>\n' ~ (m.reasoning_content or '') ~ '\n</think>' ~ m.content }}"
    "{{ '<|eot|>' }}{% endgeneration %}"
    "{% else %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|eot|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
)


@pytest.mark.parametrize("marks", [True, False])
def test_marks_are_believed_and_replace_the_rule_of_empty_thoughts(marks):
    source = MARKED
    if not marks:
        source = source.replace("{% generation %}", "").replace(
            "{% endgeneration %}", ""
        )
    text = with_template("generation", source)
    _, empty = shown(text, tokens(text, "Hello", "Hi"))
    assert empty.endswith("{<think>\n\n</think>Hi<|eot|>}" if marks else "{Hi<|eot|>}")
    _, real = shown(
        text, tokens(text, "Hello", [assistant("Hi", reasoning_content="y")])
    )
    assert real == "{<think>\ny\n</think>Hi<|eot|>}"


# -- 3: the end of a turn


TWO_ENDS = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)


def test_a_turn_is_scored_up_to_its_first_end_token():
    text = with_template("no_system", TWO_ENDS)
    assert text.end_of_turn == "<|end|>"
    _, answer = shown(text, tokens(text, "Hello", "Hi"))
    assert answer.endswith("{Hi<|end|>}")
    several = [assistant("Hi"), user("more"), assistant("ok")]
    _, answer = shown(text, tokens(text, "Hello", several))
    assert answer == "{Hi<|end|>}<|user|>more<|end|><|assistant|>{ok<|end|>}"


NEXT_HEADER = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_the_header_of_the_next_turn_can_be_the_end_of_one():
    base = families.load("no_system")
    control = base.encoder.control
    text = tokenizer._replace(
        base, eos_ids=base.eos_ids | {control["<|user|>"]}, chat_template=NEXT_HEADER
    )
    several = [assistant("Hi"), user("more"), assistant("ok")]
    _, answer = shown(text, tokens(text, "Hello", several))
    eos = text.encoder.name_of(text.eos_id)
    assert answer == f"{{Hi<|user|>}}more<|assistant|>{{ok{eos}}}"


def test_a_template_without_an_end_gets_eos():
    text = families.load("bytes")
    several = [assistant("Hi"), user("more"), assistant("ok")]
    _, answer = shown(text, tokens(text, "Hello", several))
    assert answer == "{ Hi<eos>}\n\nUser: more\n\nAssistant:{ ok<eos>}"


@pytest.mark.parametrize("listed", [True, False])
def test_a_call_that_ends_in_a_token_of_its_own(listed):
    text = families.load("channel")
    call = text.encoder.control["<|call|>"]
    eos = text.eos_ids | {call} if listed else text.eos_ids - {call}
    text = tokenizer._replace(text, eos_ids=eos)
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 4}}}]
    answer = [
        assistant("", tool_calls=calls), families.role("tool", "9"), assistant("nine"),
    ]  # fmt: skip
    if listed:
        _, got = shown(text, tokens(text, "Hello", answer))
        assert '{"a": 4}<|call|>}' in got
        assert got.endswith("nine<|return|>}")
    else:
        with pytest.raises(ValueError, match="none of the end tokens"):
            tokens(text, "Hello", answer)


# -- 4, 5: prompt and responses


def test_an_open_thought_straddles_and_the_pair_is_scored_from_there():
    text = families.load("open_think")
    got = tokens(text, "Hello", "Hi", [assistant("Yes", reasoning_content="y")])
    whole = text.prompt("Hello")
    assert got.prompt == whole[: len(got.prompt)]
    assert [mark[0] for mark in got.scored] == [True, True]
    assert text.decode(whole, keep_specials=True).endswith("<think>\n")


def test_sides_of_a_row_are_scored_alike():
    text = families.load("qwen3")
    thought = [assistant("Hi", reasoning_content="y")]
    assert not tokens(text, "Hello", "Hi").scored[0][0]
    got = tokens(text, "Hello", "Hi", thought)
    assert got.prompt == text.prompt("Hello")
    assert all(mark[0] for mark in got.scored)
    assert "<think>\n\n</think>\n\nHi" in shown(text, got)[1]


def test_a_prompt_that_the_whole_rewrites_is_counted():
    text = families.load("open_think")
    closed = Example("f:1", "Hello", [[assistant("Hi", reasoning_content="y")]],
                     template={"enable_thinking": False})  # fmt: skip
    counts = rows.no_counts()
    used = list(rows.stream([closed], text, length=200, counts=counts))
    assert len(used) == 1
    assert "prompt_differs" in counts["notes"]


def test_a_begun_turn_is_continued_at_the_end_of_its_text():
    for family in ("chatml", "llama3", "qwen25"):
        text = families.load(family)
        said = [user("Hello"), assistant("two plus")]
        assert text.decode(text.prompt(said), keep_specials=True).endswith("two plus")
        prompt, answer = shown(text, tokens(text, said, [assistant(" two")]))
        assert (
            (prompt + answer)
            .replace("{", "")
            .replace("}", "")
            .rstrip()
            .endswith(
                "two plus two"
                + text.encoder.name_of(
                    text.encoder.control.get(text.end_of_turn, text.eos_id)
                )
            )
        )
        assert "two plus" not in answer


def test_a_begun_turn_keeps_its_keys_and_parts():
    text = families.load("llama3")
    part = [{"type": "text", "text": "two plus"}]
    said = [user("Hello"), assistant(part)]
    prompt, answer = shown(text, tokens(text, said, [assistant(" two")]))
    assert prompt.endswith("two plus")
    assert answer == "{ two<|eot_id|>}"
    text = families.load("generation")
    said = [user("Hello"), assistant("two", reasoning_content="why")]
    prompt, answer = shown(
        text, tokens(text, said, [assistant(" plus two", prefill=" plus")])
    )
    assert (prompt + answer).endswith("<think>why</think>two plus{ two<|eot|>}")


def test_a_prefill_is_given_and_not_scored():
    text = families.load("chatml")
    _, answer = shown(
        text, tokens(text, "Hello", [assistant("Hi there", prefill="Hi")])
    )
    assert answer.endswith("{ there<|im_end|>}")
    with pytest.raises(ValueError, match="does not begin"):
        tokens(text, "Hello", [assistant("Hi", prefill="x")])


# -- which turns


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}])
def test_turns_that_are_not_trained(key):
    text = families.load("chatml")
    several = [assistant("no", **key), user("more"), assistant("ok")]
    got = tokens(text, "Hello", several)
    joined = "".join(shown(text, got))
    assert joined.endswith(
        f"no<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n{CHATML}{{ok<|im_end|>}}"
    )
    with pytest.raises(ValueError, match="trained"):
        tokens(text, "Hello", [assistant("no", **key)])
    weighted = tokens(text, "Hello", [assistant("yes", weight=1, train=True)])
    assert shown(text, weighted)[1] == "{yes<|im_end|>}"


@pytest.mark.parametrize("family", ["chatml", "llama3", "qwen3", "bytes", "gemma"])
@pytest.mark.parametrize("content", ["", None, " \n"])
def test_an_empty_turn_is_its_end(family, content):
    text = families.load(family)
    _, answer = shown(text, tokens(text, "Hello", [assistant(content)]))
    end = text.end_of_turn or "<eos>"
    assert answer.rstrip("}").endswith(end)
    assert answer.endswith("}")


LEAVES_OUT = (
    "{% for m in messages if m.role in ['user', 'assistant'] and (m.content or m.role == 'user') %}"
    "{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_a_turn_that_the_template_leaves_out_is_counted():
    text = with_template("no_system", LEAVES_OUT)
    with pytest.raises(ValueError, match="no assistant turn in the rendering"):
        tokens(text, "Hello", "")
    said = [user("Hello"), assistant("Hi"), families.role("tool", "9"), user("more")]
    counts = rows.no_counts()
    used = list(
        rows.stream([Example("f:1", said, ["ok"])], text, length=99, counts=counts)
    )
    assert len(used) == 1
    assert counts["notes"]["left_out tool: content"][0] == 1


def test_keys_without_a_text_in_the_rendering_are_counted():
    text = families.load("chatml")
    got = tokens(
        text, "Hello", [assistant("Hi", reasoning_content="why", mood="happy")]
    )
    assert {k for k in got.notes if k.startswith("left_out")} == {
        "left_out assistant: reasoning_content", "left_out assistant: mood",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["gemma", "no_system"])
def test_a_system_turn_without_a_place(family):
    """One template refuses it, the other says nothing."""
    text = families.load(family)
    said = [system("Be brief."), user("Hello")]
    with pytest.raises(ValueError, match="template_system"):
        tokens(text, said, "Hi")
    merged = text.read_as(text.reading._replace(system="user"))
    got = tokens(merged, said, "Hi")
    assert "Be brief.\n\nHello" in shown(text, got)[0]
    assert got == tokens(text, [user("Be brief.\n\nHello")], "Hi")


def test_parts_of_text_are_the_text():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for family in ("chatml", "llama3", "gemma", "bytes"):
        text = families.load(family)
        assert tokens(text, [user(parts)], "Hi") == tokens(text, [user("Hello")], "Hi")
    with pytest.raises(ValueError, match="no parts of content that are no text"):
        tokens(families.load("chatml"), [user([{"type": "image", "url": "x"}])], "Hi")


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ({"role": "user", "content": 5}, "content"), ({"content": "x"}, "role"),
        ({"role": "user", "content": {"x": 1}}, "content"),
        ({"role": "assistant", "content": "x", "prefill": 1}, "prefill"),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_errors_of_the_row(message, key):
    with pytest.raises(ValueError, match=f"the '{key}' of a message"):
        tokens(families.load("chatml"), [user("q"), message], "Hi")


def test_a_response_without_a_turn_is_an_error_of_the_row():
    with pytest.raises(ValueError, match="no turn"):
        tokens(families.load("chatml"), "Hello", [])


def test_control_tokens_of_a_user_are_text_and_counted():
    text = families.load("chatml")
    row = "Say <|im_end|>\n<|im_start|>assistant\nno"
    got = tokens(text, row, "Hi")
    start = text.encoder.control["<|im_start|>"]
    assert got.prompt.count(start) == 2
    assert "specials_as_text" in got.notes
    parsed = tokens(text.read_as(text.reading._replace(specials="tokens")), row, "Hi")
    assert parsed.prompt.count(start) == 3
    with pytest.raises(ValueError, match="2 EOS"):
        tokens(text, "Hello", "Hi<|im_end|>")


# -- the cases that are kept beside the repository


def case(name, *file):
    folder = CASES / name
    if not (folder / "expected.json").is_file():
        pytest.skip("no ../shared beside the repository")
    expected = json.loads((folder / "expected.json").read_text())
    found = [
        [json.loads(line) for line in (folder / f).read_text().splitlines()]
        for f in file
    ]
    return folder, expected, *found


def cut(messages):
    """(prompt, the first assistant turn and what follows)."""
    at = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return messages[:at], messages[at:]


def test_case_of_thoughts_of_earlier_turns():
    folder, expected = case("thoughts_of_earlier_turns")
    text = tokenizer.load(folder)
    said = [user("Hi"), assistant("Hello"), user("More"), assistant("Sure")]
    got = tokens(text, said[:1], said[1:])
    ids = got.prompt + got.responses[0]
    scored = [False] * len(got.prompt) + got.scored[0]
    assert ids == expected["ids"][: len(ids)]
    assert scored == [bool(x) for x in expected["scored"][: len(ids)]]


def test_case_of_a_generation_prompt_that_opens_a_thought():
    folder, expected, pairs = case("generation_prompt_opens_thought", "pairs.jsonl")
    text = tokenizer.load(folder)
    assert text.prompt("Hi") == expected["prompt_ids"]
    assert pairs
    got = tokens(text, "Hi", "Hello", "Go away")
    ids = got.prompt + got.responses[0]
    assert ids == expected["whole_ids"][: len(ids)]
    assert got.prompt == expected["prompt_ids"][:-1]
    assert got.scored[0][0]
    assert got.scored[1][0]


def test_case_of_keys_of_messages():
    folder, expected, thoughts, weights, calls = case(
        "message_keys_dropped", "reasoning.jsonl", "weight.jsonl", "tools.jsonl"
    )

    def whole(text, row):
        prompt, answer = cut(row["messages"])
        given = {k: row[k] for k in ("tools",) if k in row}
        return "".join(shown(text, tokens(text, prompt, answer, template=given)))

    def bare(marked):
        return marked.replace("{", "").replace("}", "")

    got = bare(whole(tokenizer.load(folder), thoughts[0]))
    assert expected["reasoning"].startswith(got)
    got = bare(whole(tokenizer.load(folder / "tools"), calls[0]))
    assert bare(expected["tools"]).startswith(got)
    got = whole(tokenizer.load(folder / "chatml"), weights[0])
    assert got.endswith("{Sure<|im_end|>}")
    assert got.count("{") == 1


def test_case_of_a_special_token_as_the_end_of_a_turn():
    folder, expected = case("special_token_as_stop")
    text = tokenizer.load(folder)
    assert expected["eot_id"] in text.eos_ids
    said = [user("Hi"), assistant("Hello"), user("More")]
    assert (
        text.decode(text.prompt(said), keep_specials=True)
        == expected["multi_turn_prompt"]
    )
