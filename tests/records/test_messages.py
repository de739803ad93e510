"""Messages: which are the same, and which say nothing."""

import pytest

from alignax.records import messages

CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
PARTS = [{"type": "text", "text": "a"}, "b"]


def turn(content, role="assistant", **keys):
    return {"role": role, "content": content, **keys}


def test_a_text_a_message_and_parts_have_one_text():
    assert messages.whole("ab") == messages.whole([turn("ab")])
    assert messages.whole([turn(PARTS)]) == "assistant: ab"
    assert messages.whole([turn(None)]) == "assistant:"
    assert messages.whole([turn("a", "user"), turn("b")]) == "user: a\nassistant: b"


def test_identical_is_about_what_a_model_sees():
    assert messages.identical("ab", [turn(PARTS, weight=0)])
    assert not messages.identical("ab", [turn("ab", "user")])
    assert not messages.identical([turn("ab", name="n")], "ab")
    assert not messages.identical([turn("", tool_calls=[CALL])], [turn("")])


def test_a_message_repeats_another_whatever_else_a_file_says_of_it():
    assert messages.repeats(turn("a", weight=1), turn("a"))
    assert not messages.repeats(turn("a"), turn("a", "user"))
    assert not messages.repeats(turn("", tool_calls=[CALL]), turn(""))


def test_empty_is_a_response_without_content_thought_or_call():
    assert messages.empty(" ")
    assert messages.empty([turn("\n", weight=1), turn("x", "user")])
    assert not messages.empty([turn("", reasoning_content="r")])
    assert not messages.empty([turn(None, tool_calls=[CALL])])


@pytest.mark.parametrize(
    "value, reason",
    [
        (3, "'k' is 3, expected text or a list of messages"),
        ([], r"'k' is \[\], expected text or a list of messages"),
        (" ", "'k' is empty"),
        (["x"], "'k' holds 'x', expected role and content"),
        ([{"content": "x"}], "expected role and content"),
        ([turn({"text": "x"})], "has a assistant turn whose content is not text"),
        ([turn([])], r"whose content is not text: \[\]"),
        ([turn([{"type": "text"}])], "with a part {'type': 'text'}; only text"),
        ([turn([1])], "with a part 1; only text is read"),
        ([{"from": 1, "value": "x"}], "has a turn from 1, expected one of human"),
        ([{"from": "gpt"}], "content is not text: None"),
    ],
)
def test_what_is_no_message_is_named(value, reason):
    with pytest.raises(ValueError, match=reason):
        messages.turns("k", value)


def test_a_called_function_that_is_no_json_stays_text():
    for text in ("call me", "{}", "[1]", '{"name": 1}'):
        got = messages.turns("k", [{"from": "function_call", "value": text}])
        assert got == [turn(text)]
