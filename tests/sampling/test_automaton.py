"""Stops against a search of the text itself."""

import numpy as np
import pytest

from alignax.sampling.automaton import (
    stop_sequences,
    stop_strings,
    stop_symbols,
    union,
)

PIECES = [b"", b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xa9", b"b\xc3\xa9a"]


def first(table, ids):
    """Index of the token at which a response stops, or None."""
    state = 0
    for i, token in enumerate(ids):
        if table.flag[state, token]:
            return i
        state = int(table.next[state, token])
    return None


@pytest.mark.parametrize(
    "strings", [["aba"], ["bb", "aab"], ["é"], ["abab", "ba", "bé"], [b"aaaa"]]
)
def test_a_string_stops_wherever_its_bytes_are(strings):
    rng = np.random.default_rng(0)
    table = stop_strings(strings, PIECES)
    wanted = [s.encode() if isinstance(s, str) else s for s in strings]
    stopped = 0
    for _ in range(300):
        ids = rng.integers(0, len(PIECES), 8).tolist()
        texts = [b"".join(PIECES[i] for i in ids[: n + 1]) for n in range(8)]
        hits = [n for n, text in enumerate(texts) if any(w in text for w in wanted)]
        assert first(table, ids) == (hits[0] if hits else None)
        stopped += bool(hits)
    assert stopped > 0, "the test should see some stop"


def test_a_sequence_stops_at_exactly_its_ids():
    rng = np.random.default_rng(1)
    stops = [[1, 2, 1], [2, 2], [0, 1, 2, 0]]
    table = stop_sequences(stops, 3)
    for _ in range(300):
        ids = rng.integers(0, 3, 9).tolist()
        hits = [
            n
            for n in range(9)
            for s in stops
            if ids[max(0, n + 1 - len(s)) : n + 1] == s
        ]
        assert first(table, ids) == (min(hits) if hits else None)


@pytest.mark.parametrize("bad", [[], [""], ["a", ""]])
def test_an_empty_stop_is_refused(bad):
    with pytest.raises(ValueError, match="expected at least one and none empty"):
        stop_strings(bad, PIECES)


def test_a_stop_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"id 3, expected 0\.\.2"):
        stop_sequences([[1, 3]], 3)


def test_symbols_beyond_bytes_are_whole_tokens():
    """Token 2 is no byte: a pattern of bytes does not see it, one with its symbol does."""
    pieces = [b"a", b"b", (256,)]
    both = stop_symbols([[97, 256], list(b"bb")], pieces, 257)
    assert first(both, [0, 1, 0, 2]) == 3
    assert first(both, [1, 2, 1, 2]) is None
    assert first(both, [2, 1, 1]) == 2


def test_a_union_flags_what_either_flags():
    rng = np.random.default_rng(2)
    alone = [stop_strings([s], PIECES) for s in ("aba", "bb", "é")]
    alone.append(stop_sequences([[0, 1], [3]], len(PIECES)))
    both = union(union(*alone[:2]), union(*alone[2:]))
    hits = 0
    for _ in range(300):
        ids = rng.integers(0, len(PIECES), 6).tolist()
        wanted = [n for n in (first(table, ids) for table in alone) if n is not None]
        assert first(both, ids) == min(wanted, default=None)
        hits += bool(wanted)
    assert 100 < hits < 300
    together = stop_strings(["aba", "bb"], PIECES)
    assert len(union(*alone[:2]).next) <= len(together.next) + 1


def test_a_string_that_is_over_does_not_stop_what_follows():
    """A stop that came too early to count is not completed again by every token."""
    pieces = [b"a", b".", b"b.", b"c"]
    stops = stop_strings(["."], pieces)
    state, flags = 0, []
    for token in (0, 1, 0, 3, 2, 0):
        flags.append(bool(stops.flag[state, token]))
        state = stops.next[state, token]
    assert flags == [False, True, False, False, True, False]
    inside = stop_strings(["."], [b".c", b"c"])  # not at the token's end
    assert inside.flag[0].tolist() == [True, False]
