"""Contexts and continuations as ids, by the rules of lm-evaluation-harness."""

import types

import hypothesis
import hypothesis.strategies as st
import pytest

from alignax.harness import encoding
from alignax.harness.encoding import Codec, Row
from alignax.text import tokenizer

BYTES = tokenizer.load("bytes")
BOS, EOS = BYTES.bos_id, BYTES.eos_id


class Words:
    """Ids of letters, and one id for a blank with the letter behind it, as BPE has them."""

    bos_id = 0

    def encode(self, text):
        ids, i = [], 0
        if text.startswith("<s>"):
            ids, i = [0], 3
        while i < len(text):
            pair = text[i] == " " and i + 1 < len(text) and text[i + 1] != " "
            ids.append(ord(text[i + pair]) + 1000 * pair)
            i += 1 + pair
        return ids

    def decode(self, ids, keep_specials):
        assert keep_specials
        return {0: "<s>", 1: "</s>"}[ids[0]]


def ids(text):
    return Words().encode(text)


PLAIN = Codec(Words(), add_bos=False, prefix=0)
WITH_BOS = Codec(Words(), add_bos=True, prefix=0)


def test_blanks_at_the_end_of_a_context_belong_to_the_continuation():
    assert PLAIN.pair("ab ", "c") == Row(ids("ab"), [1000 + ord("c")])
    assert PLAIN.pair("ab", " c") == PLAIN.pair("ab ", "c")
    # all kinds of blanks, and several
    assert PLAIN.pair("ab \n", "c") == Row(ids("ab"), ids(" \nc"))
    assert PLAIN.pair("a\u3000", "c") == Row(ids("a"), ids("\u3000c"))


def test_an_empty_context_is_the_prefix():
    assert PLAIN.pair("", "ab") == Row([0], ids("ab"))
    # no BOS of its own: the prefix is one
    assert WITH_BOS.pair("", "ab") == Row([0], ids("ab"))
    # a continuation that begins with the prefix has it as its context
    assert PLAIN.pair("", "<s>ab") == Row([0], ids("ab"))
    assert PLAIN.pair("  ", "ab") == Row([0], ids("  ab"))


def test_a_continuation_without_a_token_is_an_error():
    with pytest.raises(ValueError, match=r"continuation '' of \.\.\.'ab' has no token"):
        PLAIN.pair("ab", "")
    with pytest.raises(ValueError, match="has no token"):
        PLAIN.pair("", "<s>")


def test_bos_begins_a_text_once():
    assert PLAIN.encode("ab") == ids("ab")
    assert WITH_BOS.encode("ab") == [0, *ids("ab")]
    assert WITH_BOS.encode("<s>ab") == [0, *ids("ab")]  # of a chat template
    assert WITH_BOS.pair("ab", " c") == Row([0, *ids("ab")], [1000 + ord("c")])


def test_the_context_is_encoded_alone_and_cut_from_the_whole_by_its_number_of_tokens():
    """Where a token straddles both, the harness reads the context's own tokens."""

    def encode(text):
        return {"ab": [1, 2], "abc": [1, 5], "abcd": [1, 5, 6]}[text]

    text = types.SimpleNamespace(encode=encode, decode=lambda *_, **__: "<s>", bos_id=0)
    codec = Codec(text, add_bos=False, prefix=0)
    assert codec.pair("ab", "cd") == Row([1, 2], [6])
    with pytest.raises(ValueError, match="no token of its own"):
        codec.pair("ab", "c")


def test_a_long_row_loses_the_beginning_of_its_context():
    row = Row([1, 2, 3, 4], [5, 6])
    assert encoding.truncate(row, 5) == row  # the last token is not read
    assert encoding.truncate(row, 4) == Row([2, 3, 4], [5, 6])
    assert encoding.truncate(row, 2) == Row([4], [5, 6])
    with pytest.raises(
        ValueError, match="has 2 tokens, and the context of the model is 1"
    ):
        encoding.truncate(row, 1)


def test_rolling_windows_of_the_example_in_the_harness():
    """The docstring of `LM.loglikelihood_rolling` has these windows."""
    rows = encoding.windows(range(10), 99, 4)
    assert rows == [
        Row([99], [0, 1, 2, 3]),
        Row([3], [4, 5, 6, 7]),
        Row([5, 6, 7], [8, 9]),
    ]


def test_an_empty_text_has_no_window():
    assert PLAIN.rolling("", 4) == []
    assert WITH_BOS.rolling("", 4) == [Row([0], [0])]
    assert PLAIN.rolling("ab", 4) == [Row([0], ids("ab"))]


@hypothesis.given(st.integers(1, 40), st.integers(1, 12))
def test_windows_score_each_token_once_with_all_the_context_that_fits(many, length):
    rows = encoding.windows(range(many), -1, length)
    assert [i for row in rows for i in row.continuation] == [*range(many)]
    text = [-1, *range(many)]
    for k, row in enumerate(rows):
        whole = [*row.context, *row.continuation]
        start = text.index(whole[0])
        assert whole == text[start : start + len(whole)]
        assert len(whole) <= length + 1
        if k:  # as many as the model can read, and the last one
            assert len(whole) == length + 1


def test_the_bytes_tokenizer_is_one():
    codec = Codec(BYTES, add_bos=True, prefix=BOS)
    assert codec.pair("é ", "x") == Row([BOS, *"é".encode()], [*b" x"])
