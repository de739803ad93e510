"""ROUGE-L: how much of a text another one repeats, in the same order.

  R = LCS(candidate, reference) / #reference      P = LCS / #candidate      F = 2 P R / (P + R)

LCS is the length of the longest common subsequence of words, not necessarily contiguous.

Source: Lin 2004, https://aclanthology.org/W04-1013
Differs from the source: words are maximal runs of letters and digits in small letters, of
alphabets that are written with spaces and without combining marks, in Unicode's composed form,
without stemming; F has equal weights.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_WORD = re.compile(r"[^\W_]+")


class Overlap(NamedTuple):
    """Shares in [0, 1]; all are 0 where nothing is common or a text has no words."""

    precision: float
    recall: float
    f: float


def words(text: str) -> list[str]:
    """The words that are compared."""
    return _WORD.findall(unicodedata.normalize("NFC", text.casefold()))


def rouge_l(candidate: str, reference: str) -> Overlap:
    """ROUGE-L of two texts.

    Args:
      candidate: the text of a model.
      reference: the text that it is compared with.
    """
    mine, wanted = words(candidate), words(reference)
    common = longest_common_subsequence(mine, wanted)
    if not common:
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = common / len(mine), common / len(wanted)
    return Overlap(precision, recall, 2 * precision * recall / (precision + recall))


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, in len(a) * len(b) steps of which len(b) are one operation of numpy."""
    ids = {word: i for i, word in enumerate(dict.fromkeys(b))}
    right = np.array([ids[word] for word in b], np.int64)
    best = np.zeros(len(b) + 1, np.int64)  # of the words of a so far and b[:j]
    for word in a:
        if word in ids:
            longer = best[:-1] + (right == ids[word])
            best[1:] = np.maximum.accumulate(np.maximum(best[1:], longer))
    return int(best[-1])
