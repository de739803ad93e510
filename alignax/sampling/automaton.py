"""Finite automata over tokens: what a grammar allows, and where a response stops.

A row begins in state 0, and every token of the response changes its state. Grammars and
stops are both table look-ups at every step, inside the compiled loop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int


class Automaton(NamedTuple):
    """S states over a vocabulary of V tokens.

    `flag[s, v]` is about token v in state s. In a grammar it says that v is allowed; in a
    stop, that v completes one of the strings.
    """

    next: Int[Array, "S V"] | Int[np.ndarray, "S V"]
    flag: Bool[Array, "S V"] | Bool[np.ndarray, "S V"]


def stop_strings(strings: Sequence[str | bytes], pieces: Sequence[bytes]) -> Automaton:
    """Stops at a string, wherever token boundaries fall: also inside or across tokens.

    Args:
      strings: any of them stops; str is encoded in UTF-8.
      pieces: the bytes of each id of the vocabulary; b'' for special tokens, which do not
        interrupt a string.

    Returns:
      An Automaton. The token that completes a string is the last of the response. It may
      have text after the string, which the caller has to cut.

    Raises:
      ValueError: no string, or an empty one.
    """
    encoded = [s.encode() if isinstance(s, str) else s for s in strings]
    return stop_symbols(encoded, pieces, 256)


def stop_symbols(
    patterns: Sequence[Sequence[int]], pieces: Sequence[Sequence[int]], alphabet: int
) -> Automaton:
    """Stops at sequences of symbols, of which each token has any number: `stop_strings`.

    Args:
      patterns: sequences of symbols, 0 to alphabet - 1; any of them stops.
      pieces: the symbols of each id of the vocabulary. Bytes are symbols, and there may
        be others, which stand for whole tokens.
      alphabet: how many symbols there are.

    Raises:
      ValueError: no pattern, or an empty one.
    """
    delta, final = _aho_corasick([list(p) for p in patterns], alphabet)
    state = np.repeat(np.arange(len(delta), dtype=np.int32)[:, None], len(pieces), 1)
    seen = np.zeros(state.shape, bool)  # a string ended anywhere inside the token
    longest = max(map(len, pieces), default=0)
    for i in range(longest):
        have = np.array([len(p) > i for p in pieces])
        byte = np.array([p[i] if len(p) > i else 0 for p in pieces])
        state = np.where(have, delta[state, byte[None]], state)
        seen |= have & final[state]
    return Automaton(state, seen)


def stop_sequences(sequences: Sequence[Sequence[int]], vocab_size: int) -> Automaton:
    """Stops at exactly these sequences of ids.

    Raises:
      ValueError: no sequence, an empty one, or an id outside the vocabulary.
    """
    delta, final = _aho_corasick([list(s) for s in sequences], vocab_size)
    return Automaton(delta, final[delta])


def union(a: Automaton, b: Automaton) -> Automaton:
    """Flags what either of two automata over one vocabulary flags."""
    states, of_b = {(0, 0): 0}, len(b.next)
    table, flags = [], []
    for i, j in (queue := [(0, 0)]):  # grows while it is read
        pair = np.asarray(a.next[i], np.int64) * of_b + np.asarray(b.next[j])
        found, which = np.unique(pair, return_inverse=True)
        places = []
        for p in found.tolist():
            state = divmod(p, of_b)
            if state not in states:
                states[state] = len(states)
                queue.append(state)
            places.append(states[state])
        table.append(np.array(places, np.int32)[which])
        flags.append(np.asarray(a.flag[i]) | np.asarray(b.flag[j]))
    return Automaton(np.stack(table), np.stack(flags))


def _aho_corasick(patterns: list[list[int]], alphabet: int):
    """Transitions [S, alphabet] and whether a state ends in one of the patterns [S]."""
    if not patterns or not all(patterns):
        raise ValueError(f"stops are {patterns}, expected at least one and none empty")
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for pattern in patterns:
        node = 0
        for symbol in pattern:
            if not 0 <= symbol < alphabet:
                raise ValueError(f"a stop has id {symbol}, expected 0..{alphabet - 1}")
            if symbol not in children[node]:
                children[node][symbol] = len(children)
                children.append({})
                ends.append(False)
            node = children[node][symbol]
        ends[node] = True
    delta = np.zeros((len(children), alphabet), np.int32)
    final = np.array(ends)
    queue = []
    for symbol, child in children[0].items():
        delta[0, symbol] = child
        queue.append((child, 0))  # (state, longest proper suffix that is a state)
    for node, suffix in queue:  # grows while it is read: breadth first
        delta[node] = delta[suffix]
        final[node] |= final[suffix]
        for symbol, child in children[node].items():
            queue.append((child, int(delta[suffix, symbol])))
            delta[node, symbol] = child
    return delta, final


def stopped(automaton: Automaton, ids: Sequence[int]) -> bool:
    """Whether a response of these ids completes a stop, on the host."""
    state = 0
    for i in ids:
        if automaton.flag[state, i]:
            return True
        state = int(automaton.next[state, i])
    return False


def states(
    automaton: Automaton,
    tokens: Int[np.ndarray, "*N T"],
    scored: Bool[np.ndarray, "*N T"],
) -> Int[np.ndarray, "*N T"]:
    """The state in front of each token of a response, on the host; 0 where not `scored`.

    A response begins in state 0, and so does the next turn of the same row.
    """
    following = np.asarray(automaton.next)
    out = np.zeros(tokens.shape, np.int32)
    state = np.zeros(tokens.shape[:-1], np.int32)
    for t in range(tokens.shape[-1]):
        here = scored[..., t]
        out[..., t] = np.where(here, state, 0)
        token = np.where(here, tokens[..., t], 0)
        state = np.where(here, following[state, token], 0)
    return out
