"""Numbers and text of a row."""

import json

import pytest

from alignax.records import values


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"a": ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),  # a surrogate as bytes
        (b'{"a": "x\\ud83d"}', "'a' holds half of a surrogate pair"),
        (b'{"a": [{"content": "\\uDE00 x"}]}', "'a' holds half of a surrogate pair"),
        (b'{"a": {"\\udfff": 1}}', "'a' holds half of a surrogate pair"),
        (b'{"\\ud800": 1}', "holds half of a surrogate pair"),
        (b'["\\ud800"]', "holds half of a surrogate pair"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "an integer of 5001 digits"),
        (b'{"a": [-1' + b"0" * 4300 + b"]}", "an integer of 4302 digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "an object has the key 'c' twice"),
        (b'{"a": 1, "a": 1}', "an object has the key 'a' twice"),
    ],
)
def test_a_line_that_cannot_be_read_says_why(line, reason):
    with pytest.raises(ValueError, match=reason):
        values.decode(line)
    assert reason in str(values.read(line))


def test_what_is_almost_wrong_is_read():
    assert values.decode(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert values.decode(b'{"a": "\\ud83d\\ude00 \\ud7ff"}') == {
        "a": "\U0001f600 \ud7ff"
    }
    assert values.decode(b'{"a": 123456789012345678901}') == {
        "a": 123456789012345678901
    }
    error = ValueError("why")
    assert values.read(error) is error


@pytest.mark.parametrize("bad", ["1", None, [], float("nan"), -float("inf")])
def test_a_number_is_finite(bad):
    with pytest.raises(ValueError, match=r"'k' is .*, expected a finite number"):
        values.number("k", bad)


def test_a_number_that_no_float_holds_is_named_shortly():
    for digits in (310, 400, 5000):
        with pytest.raises(
            ValueError, match="'k' is an integer that no float can hold"
        ):
            values.number("k", 10**digits)
    assert len(values.brief(10**5000)) < 50
    assert [values.number("k", x) for x in (True, 2, 0.5)] == [1.0, 2.0, 0.5]


def test_columns_are_numbers_and_text():
    row = {"t": "x", "b": True, "n": 10**20, "f": 0.5, "l": ["é"], "o": {"a": None}}
    got = values.columns(row)
    assert got == {"t": "x", "b": 1.0, "n": 10**20, "f": 0.5, "l": '["é"]', "o": '{"a": null}'}  # fmt: skip
    assert json.loads(json.dumps(got)) == got
    for bad in (float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match="'k' is"):
            values.columns({"k": bad})
