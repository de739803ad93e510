"""pass@k and maj@k: is one of k responses right, and is the answer of most of them?

  c of the n samples of a prompt are right: r(x, y) >= threshold
  mean@n    = mean over prompts of c / n                        (as pass@1)
  pass@k    = mean over prompts of 1 - C(n - c, k) / C(n, k)
  maj@k     = mean over prompts and subsets of k samples of 1[the commonest answer is right]

All subsets of k of the n samples count, so both are unbiased and less noisy than one draw of
k. Where answers are equally common, each of them is chosen equally often. A response without
an answer has no vote; where nobody has one, it is wrong.

Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374 (pass@k); Wang et al. 2022,
https://arxiv.org/abs/2203.11171 (majority votes)
Differs from the papers: maj@k is averaged over subsets too; whether a response is right is
what a reward says.
"""

import collections
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from alignax import plugin, rewards
from alignax.batch import LM, Metrics
from alignax.inputs.prompts import prompt_batches
from alignax.reports.metrics import bootstrap

RANGES = {"threshold": "(-inf, inf)"}
VOTE = "alignax.rewards.final_answer.answer"


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, reward: str | Mapping[str, Any],
    k: int | tuple[int, ...] = (1, 4), samples: int = 4, threshold: float = 0.5,
    vote: str = VOTE, max_new: int = 256, temperature: float = 1.0, size: int = 256,
    show: int = 8,
) -> Metrics:  # fmt: skip
    """Samples n responses to each prompt and tells which are right.

    Args:
      reward: a file in rewards/ (or {'name': ..., its hyper-parameters}), or a dotted
        name of a function.
      k: one number or several, each at most `samples`.
      samples: n, responses per prompt.
      threshold: a response is right whose reward is at least this.
      vote: dotted name of a function from a response's text to its answer, or to None if it
        has none; '' leaves maj@k out.
      max_new: most tokens per response.
      temperature: of the sampler; 0 is greedy, and one sample then says all.
      size: prompts to use, from the start of the data (0 = all).
      show: prompts of which a response is returned as text.

    Returns:
      'mean_at_N', 'pass_at_K' and, for K > 1, 'maj_at_K', each with an interval over
      prompts, as 'reward' has; 'ended' (share of responses that end in EOS), 'tokens'
      (mean response length) and 'samples'.

    Raises:
      ValueError: what `check` refuses.
    """
    check(
        tuple(lms), data, reward=reward, k=k, samples=samples, vote=vote, size=size
    )  # fmt: skip
    judge, ballot = rewards.load(reward), plugin.find("rewards", vote) if vote else None
    data = data[:size] if size else data
    values, votes, ended, tokens = [], [], [], []
    shown: list[dict[str, Any]] = []
    prompts = prompt_batches(data, tokenizer, batch_size=batch_size, length=length)
    for i, p in enumerate(prompts):
        out = jax.device_get(
            generate(
                lm, p.tokens, p.lengths, jax.random.fold_in(key, i), max_new=max_new,
                group=samples, temperature=temperature,
            )
        )  # fmt: skip
        r, texts = rewards.of_samples(
            judge, out.batch, p, lms, tokenizer=tokenizer, score=score
        )
        values.append(r[p.valid])
        ended.append(~out.truncated[p.valid])
        tokens.append(out.batch.mask[p.valid].sum(-1))
        for b in np.flatnonzero(p.valid):
            votes.append([ballot(text) for text in texts[b]] if ballot else [])
            if len(shown) < show:
                best = int(r[b].argmax())
                shown.append(
                    {
                        "prompt": p.texts[b], "response": texts[b][best],
                        "reward": float(r[b, best]),
                        "right": float((r[b] >= threshold).mean()),
                    }
                )  # fmt: skip
    found = np.concatenate(values)
    return {
        **rates(found >= threshold, votes if ballot else None, _several(k)),
        **bootstrap(found.mean(1)).named("reward"),
        "ended": float(np.concatenate(ended).mean()),
        "tokens": float(np.concatenate(tokens).mean()),
        "samples": shown,
    }


def rates(
    right: Bool[np.ndarray, "B n"], votes: Sequence[Sequence[Hashable]] | None,
    k: Sequence[int],
) -> Metrics:  # fmt: skip
    """mean@n, pass@k and maj@k with their intervals over prompts.

    Args:
      right: which samples are right.
      votes: the answer of each sample, None if it has none; None leaves maj@k out.
      k: numbers from 1 to n.
    """
    out = bootstrap(right.mean(1)).named(f"mean_at_{right.shape[1]}")
    for many in k:
        passed = pass_at_k(right.sum(1), right.shape[1], many)
        out |= bootstrap(passed).named(f"pass_at_{many}")
        if votes is not None and many > 1:
            won = [maj_at_k(*row, many) for row in zip(right, votes, strict=True)]
            out |= bootstrap(won).named(f"maj_at_{many}")
    return out


def pass_at_k(
    right: Int[np.ndarray, " B"], samples: int, k: int
) -> Float[np.ndarray, " B"]:
    """Share of the subsets of k samples that have a right one.

    Args:
      right: how many of the samples of each prompt are right.
      samples: n.
      k: from 1 to n.
    """
    whole = math.comb(samples, k)
    return np.array([1 - math.comb(samples - c, k) / whole for c in right.tolist()])


def maj_at_k(
    right: Bool[np.ndarray, " n"], votes: Sequence[Hashable | None], k: int
) -> float:
    """Share of the subsets of k samples whose commonest answer is right.

    Where responses of one answer are right and wrong, their share of right ones counts.

    Args:
      right: which samples are right.
      votes: their answers; None has no vote.
      k: from 1 to n.
    """
    cast = [v for v in votes if v is not None]
    counts = collections.Counter(cast)
    share = {
        v: np.mean([r for r, other in zip(right, votes, strict=True) if other == v])
        for v in counts
    }
    silent = len(votes) - len(cast)
    total = 0.0
    for answer, count in counts.items():
        if share[answer]:
            others = [n for v, n in counts.items() if v != answer]
            total += share[answer] * _subsets_won(count, others, silent, k)
    return float(total / math.comb(len(votes), k))


def _subsets_won(mine: int, others: Sequence[int], silent: int, k: int) -> float:
    """How many subsets of k samples an answer wins; a tie of m answers counts 1/m.

    Args:
      mine: samples that have the answer.
      others: samples that have each other answer.
      silent: samples without an answer.
      k: size of the subsets.
    """
    won = 0.0
    for most in range(1, min(mine, k) + 1):  # samples of the answer in the subset
        # ways[t]: coefficients, by size, of subsets of the rest with t ties
        ways = [_polynomial(silent, k)]
        for count in others:
            below = _polynomial(count, min(k, most - 1))
            grown = [np.convolve(way, below)[: k + 1] for way in ways]
            if count >= most:
                tie = np.zeros(most + 1)
                tie[most] = math.comb(count, most)
                grown.append(np.zeros(1))
                for t, way in enumerate(ways):
                    grown[t + 1] = _sum(grown[t + 1], np.convolve(way, tie)[: k + 1])
            ways = grown
        rest = k - most
        found = [way[rest] if len(way) > rest else 0.0 for way in ways]
        shared = sum(n / (t + 1) for t, n in enumerate(found))
        won += math.comb(mine, most) * shared
    return won


def _polynomial(count: int, most: int) -> Float[np.ndarray, " size"]:
    """[C(count, 0), C(count, 1), ...] up to `most` samples."""
    return np.array(
        [float(math.comb(count, j)) for j in range(min(count, most) + 1)], np.float64
    )


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of two polynomials of any length."""
    out = np.zeros(max(len(a), len(b)))
    out[: len(a)] += a
    out[: len(b)] += b
    return out


def check(
    lms: Sequence[str], data, *, reward, k: Any, samples: int, vote: str,
    size: int, **_,
) -> None:  # fmt: skip
    """Raises ValueError for numbers that there cannot be, or names that mean nothing."""
    rewards.load(reward)
    if vote:
        plugin.find("rewards", vote)
    many = _several(k)
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in many)
    if not (many and whole and min(many) >= 1 and max(many) <= samples):
        raise ValueError(f"k is {k}, expected numbers from 1 to samples={samples}")
    if size < 0 or not len(data):
        raise ValueError(
            f"size is {size}, of {len(data)} prompts: expected 0 (all) or more"
        )


def _several(k: Any) -> tuple[Any, ...]:
    return (k,) if isinstance(k, int) else tuple(k)
