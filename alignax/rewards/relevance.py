"""R³: relevant, long and without repetition; a reward that needs no preferences.

  r(x, y) = cos(x, y) · |y|/100 · #distinct trigrams of y / #trigrams of y

The first factor alone rewards short copies of the query; with the second the query is
repeated; the third penalises repetition. |y| counts words, trigrams are of words and runs
of punctuation; relevance is the cosine of the counts of words, in any case.

Source: Kim et al. 2024, https://arxiv.org/abs/2402.03469
Differs from the paper: bags of words stand for the vectors of its retriever (Contriever);
every query counts as open-ended, because a rollout has no reference answer; the query is
the whole prompt, less the words of an empty one, which are the chat template's.
"""

import math
import re
from collections import Counter

import numpy as np

from alignax.batch import Batch

RANGES = {"words": "(0, inf)"}
FACTORS = ("relevance", "length", "repetition")


def reward(
    batch: Batch, texts: list[list[str]], tokenizer, *,
    factors: tuple[str, ...] = FACTORS, words: float = 100.0,
) -> np.ndarray:  # fmt: skip
    """The product of the factors, each of them >= 0.

    Args:
      batch: tokens; those before the first scored one are the prompt.
      texts: B groups of G responses.
      tokenizer: the one that made the batch.
      factors: some of FACTORS; the paper's ablations use fewer than all of them.
      words: |y| at which the length factor is 1.

    Returns:
      [B, G] rewards; 0 for a response without a word.

    Raises:
      ValueError: no factor, or an unknown one.
    """
    if not factors or set(factors) - set(FACTORS):
        raise ValueError(
            f"factors are {tuple(factors)}, expected some of {', '.join(FACTORS)}"
        )
    empty = tokenizer.prompt("") if tokenizer.chat_template else []
    template = bag(tokenizer.decode(empty))
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    out = np.zeros(mask.shape[:2], np.float32)
    for b, group in enumerate(texts):
        start = int(mask[b].any(0).argmax())  # the prompt is the same in every row
        query = bag(tokenizer.decode(tokens[b, 0, :start])) - template
        for g, text in enumerate(group):
            mine = bag(text)
            value = {
                "relevance": cosine(query, mine),
                "length": mine.total() / words,
                "repetition": distinct(split(text)),
            }
            out[b, g] = math.prod(value[f] for f in factors) if mine else 0.0
    return out


def split(text: str) -> list[str]:
    """Words and runs of punctuation, in their order."""
    return re.findall(r"\w+|[^\w\s]+", text)


def bag(text: str) -> Counter[str]:
    """How often each word occurs, in any case."""
    return Counter(re.findall(r"\w+", text.lower()))


def cosine(a: Counter[str], b: Counter[str]) -> float:
    """Of two bags of words, in [0, 1]; 0 if one is empty."""
    norm = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
    return sum(n * b[word] for word, n in a.items()) / norm if norm else 0.0


def distinct(parts: list[str]) -> float:
    """Share of trigrams that are distinct; 1 where there is none."""
    trigrams = list(zip(parts, parts[1:], parts[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0
