"""Checkable constraints as a reward: keywords, length, regular expressions, JSON.

  r(y) = Σ_c w_c 1[y satisfies c] / Σ_c w_c

Source: verifiable instructions in the style of IFEval (Zhou et al. 2023),
https://arxiv.org/abs/2311.07911, and ACT's constraint satisfaction rate (Cheng et al.
2024), https://arxiv.org/abs/2403.06326
Differs from the papers: the constraints are the run's, the same for every prompt
(`rewards.instructions` reads those of the row). Patterns take linear time, whatever the
response: see `text.patterns`, which refuses lookarounds and references to groups.
"""

import json
import re
from collections.abc import Mapping

import numpy as np

from alignax.text import patterns

KINDS = ("keywords", "avoid", "length", "pattern", "json")
RANGES = {"weights": "[0, inf)"}


def check(
    text: str,
    *,
    keywords=(),
    avoid=(),
    min_words=0,
    max_words=0,
    pattern="",
    as_json=False,
) -> dict[str, float]:
    """Which constraints a text satisfies, each in [0, 1].

    Keywords count by coverage (whole words, any case); each other constraint is 0 or 1.
    """

    def has(word):
        return (
            re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
            is not None
        )

    out = {}
    if keywords:
        out["keywords"] = sum(map(has, keywords)) / len(keywords)
    if avoid:
        out["avoid"] = float(not any(map(has, avoid)))
    if min_words or max_words:
        count = len(text.split())
        out["length"] = float(
            count >= min_words and (not max_words or count <= max_words)
        )
    if pattern:
        out["pattern"] = float(patterns.compile(pattern).search(text))
    if as_json:
        try:
            json.loads(text)
            out["json"] = 1.0
        except (ValueError, RecursionError):  # the latter is [[[[...
            out["json"] = 0.0
    return out


def reward(
    texts: list[list[str]],
    *,
    keywords: tuple[str, ...] = (),
    avoid: tuple[str, ...] = (),
    min_words: int = 0,
    max_words: int = 0,
    pattern: str = "",
    as_json: bool = False,
    weights: Mapping[str, float] | None = None,
) -> np.ndarray:
    """Weighted share of satisfied constraints, in [0, 1].

    Args:
      texts: B groups of G responses.
      keywords: words that must occur; satisfied in proportion.
      avoid: words that must not occur.
      min_words, max_words: bounds on the number of words; 0 is no bound.
      pattern: regular expression that must be found; one of `text.patterns`.
      as_json: the response must parse as JSON.
      weights: by kind (KINDS), default 1 each.

    Returns:
      [B, G] rewards.

    Raises:
      ValueError: no constraint at all, or a weight for an unknown kind.
    """
    weights = dict(weights or {})
    unknown = set(weights) - set(KINDS)
    if unknown:
        raise ValueError(
            f"unknown constraint {sorted(unknown)}; known: {', '.join(KINDS)}"
        )
    asked = dict(
        keywords=keywords, avoid=avoid, min_words=min_words, max_words=max_words,
        pattern=pattern, as_json=as_json,
    )  # fmt: skip
    if not check("", **asked):
        raise ValueError(
            f"rewards.constraints has no constraint; set one of {', '.join(asked)}"
        )

    def one(text):
        met = check(text, **asked)
        total = sum(weights.get(k, 1.0) for k in met)
        return sum(weights.get(k, 1.0) * v for k, v in met.items()) / total

    return np.array([[one(t) for t in group] for group in texts], np.float32)
