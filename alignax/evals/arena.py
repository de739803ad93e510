"""Varco Arena: a ranking of models or decoders, by a tournament on every prompt.

  contestants answer every prompt; a judge compares two answers at a time
  brackets    M - 1 matches a prompt, in single elimination, shuffled anew each time
  all pairs   M (M - 1) / 2 matches a prompt
  R           = 1000 + 400 log10 p,   P(i beats j) = p_i / (p_i + p_j)

`theory/tournament.py` has the mathematics. A bracket needs fewer matches than comparisons
with one anchor, and ranks better: a match informs about two contestants, and strong ones
meet more often.

Read ratings of brackets as an order. Who comes far in a bracket did so on a prompt that
suited it, so its next matches are closer than Bradley-Terry has it, and the distances
between ratings come out smaller: the spread of best-of-{1, 2, 4, 8, 16}, whose ratings are
400 log10 N, by some 14 %. Those of all pairs come out right.

Source: Son et al. 2024, https://arxiv.org/abs/2411.01281
Differs from the paper: the judge is a reward; contestants may be decoders of one model;
all pairs as an alternative; a weak prior keeps a contestant without a loss finite; matches
are presented in a random order. The intervals resample prompts.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from alignax import rewards
from alignax.batch import LM, Batch, Metrics
from alignax.inputs.detokenize import texts
from alignax.inputs.prompts import PromptBatch, prompt_batches
from alignax.reports.metrics import Interval
from alignax.theory import tournament

RANGES = {"max_new": "[1, inf)", "size": "[0, inf)"}
PAIRINGS: dict[str, Callable[..., np.ndarray]] = {
    "bracket": tournament.single_elimination,
    "all": tournament.all_pairs,
}
SETTINGS = ("temperature", "top_p", "top_k", "min_p")
POLICY = "policy"


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, contestants: Mapping[str, Mapping[str, Any]],
    reward: str | Mapping[str, Any], selector: Any = None, pairwise: bool = False,
    pairing: str = "bracket", max_new: int = 64, size: int = 256, show: int = 8,
) -> Metrics:  # fmt: skip
    """Lets the contestants play on every prompt, and rates them.

    Args:
      contestants: by name, {'model': a name in `lms`, or 'policy' (the default),
        'best_of': N (default 1), and some of SETTINGS of the sampler}.
      reward: the judge: a file in rewards/ (or {'name': ..., its hyper-parameters}), or a
        dotted name of a function of the response's text. Equal rewards are a tie.
      selector: another reward, by which best-of-N selects; None is the judge itself, under
        which the ratings of best-of-N are 400 log10 N for any model.
      pairwise: whether the judge sees the two responses of a match as a group of two, as
        `rewards/judge.py` wants it, which then judges both orders. Otherwise it gives each
        response a reward, once.
      pairing: 'bracket' or 'all'.
      max_new: most tokens per response.
      size: prompts to use, from the start of the data (0 = all); at least 2.
      show: prompts whose responses are returned as text.

    Returns:
      'rating/NAME' and 'rank/NAME' (1 is the best), each with an interval over prompts;
      'matches' (per prompt), 'ties' (share of the matches) and 'samples'.

    Raises:
      ValueError: what `check` refuses.
    """
    check(
        tuple(lms), data, contestants=contestants, reward=reward, selector=selector,
        pairing=pairing, size=size,
    )  # fmt: skip
    judge, many = rewards.load(reward), len(contestants)
    answered = responses(
        lm, lms, data[:size] if size else data, key=key, tokenizer=tokenizer,
        generate=generate, score=score, batch_size=batch_size, length=length,
        contestants=contestants, selector=selector or reward, max_new=max_new,
    )  # fmt: skip
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    points: list[np.ndarray] = []
    samples: list[dict[str, Any]] = []
    for p, batch in answered:
        worth = functools.partial(
            rewards.of_samples, judge, prompts=p, lms=lms, tokenizer=tokenizer,
            score=score,
        )  # fmt: skip
        compare = by_pairs(worth, batch) if pairwise else by_reward(worth, batch)
        got = PAIRINGS[pairing](compare, len(p.valid), many, rng)
        points.append(got[p.valid])
        shown = np.flatnonzero(p.valid)[: max(0, show - len(samples))]
        said = texts(batch, tokenizer) if len(shown) else []
        samples += [
            {"prompt": p.texts[b], "responses": said[b], "contestant": [*contestants],
             "points": got[b].sum(1).tolist()}
            for b in shown
        ]  # fmt: skip
    w = np.concatenate(points)
    return {
        **named(tournament.standings(w), list(contestants)),
        "matches": float(w.sum((1, 2)).mean()),
        "ties": float((w == 0.5).sum() / 2 / w.sum()),
        "samples": samples,
    }


def responses(
    lm: LM, lms: Mapping[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, contestants: Mapping[str, Mapping[str, Any]],
    selector: Any, max_new: int,
) -> Iterator[tuple[PromptBatch, Batch]]:  # fmt: skip
    """Prompts with one response of every contestant, in their order: [B, M, T].

    Contestants with the same model and sampler share a call, but no response: the best of
    2 and the best of 4 are taken of 2 + 4 samples.
    """
    select = rewards.load(selector)
    places: dict[tuple, list[int]] = {}
    entries = [{"model": POLICY, "best_of": 1, **c} for c in contestants.values()]
    for i, c in enumerate(entries):
        sampler = tuple((k, c[k]) for k in SETTINGS if k in c)
        places.setdefault((c["model"], sampler), []).append(i)
    prompts = prompt_batches(data, tokenizer, batch_size=batch_size, length=length)
    for i, p in enumerate(prompts):
        mine = jax.random.fold_in(key, i)
        picked: list[Any] = [None] * len(entries)
        for j, ((model, sampler), who) in enumerate(places.items()):
            sizes = [entries[k]["best_of"] for k in who]
            out = generate(
                lm if model == POLICY else lms[model], p.tokens, p.lengths,
                jax.random.fold_in(mine, j), max_new=max_new, group=sum(sizes),
                **dict(sampler),
            )  # fmt: skip
            batch = plain(jax.device_get(out.batch))
            r = np.zeros(batch.valid.shape)
            if max(sizes) > 1:
                r, _ = rewards.of_samples(
                    select, batch, p, lms, tokenizer=tokenizer, score=score
                )
            ends = itertools.accumulate(sizes)
            for k, many, end in zip(who, sizes, ends, strict=True):
                best = end - many + r[:, end - many : end].argmax(1)
                picked[k] = take(batch, best[:, None])
        yield p, jax.tree.map(lambda *x: np.concatenate(x, 1), *picked)


def plain(batch: Batch) -> Batch:
    """Only what every batch has: the responses and which of them are valid."""
    return Batch(*batch[:5])


def take(batch: Batch, slots: np.ndarray) -> Batch:
    """The responses in slots [B, K] of each group, in this order."""
    rows = np.arange(len(slots))[:, None]
    return jax.tree.map(lambda x: np.asarray(x)[rows, slots], batch)


def by_reward(worth: Callable[[Batch], Any], batch: Batch) -> tournament.Judge:
    """A judge that compares the rewards of single responses."""
    r, _ = worth(batch)
    rows = np.arange(len(r))
    return lambda a, b: more(r[rows, a], r[rows, b])


def by_pairs(worth: Callable[[Batch], Any], batch: Batch) -> tournament.Judge:
    """A judge that sees the two responses of a match, in the order of presentation."""

    def judge(a, b):
        r, _ = worth(take(batch, np.stack([a, b], 1)))
        return more(r[:, 0], r[:, 1])

    return judge


def more(
    ours: Float[np.ndarray, " B"], theirs: Float[np.ndarray, " B"]
) -> Float[np.ndarray, " B"]:
    """Points of one side: 1 for the higher reward, 1/2 each for equal ones."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def named(found: tournament.Standings, names: Sequence[str]) -> Metrics:
    """Standings as metrics."""
    out: Metrics = {}
    for kind, value, (lo, hi) in (
        ("rating", found.ratings, found.rating_interval),
        ("rank", found.ranks, found.rank_interval),
    ):
        for i, name in enumerate(names):
            interval = Interval(float(value[i]), float(lo[i]), float(hi[i]))
            out |= interval.named(f"{kind}/{name}")
    return out


def check(
    lms: Sequence[str], data, *, contestants: Mapping[str, Mapping[str, Any]], reward,
    selector: Any = None, pairing: str = "bracket", size: int = 256, **_,
) -> None:  # fmt: skip
    """Raises ValueError: no such pairing, model, setting or N, or too few of something."""
    for judge in (reward, selector):
        if judge is not None:
            rewards.load(judge)
    if pairing not in PAIRINGS:
        raise ValueError(
            f"pairing is {pairing!r}, expected one of {', '.join(PAIRINGS)}"
        )
    if len(contestants) < 2:
        raise ValueError(f"an arena needs two contestants, there are {[*contestants]}")
    for name, c in contestants.items():
        if unknown := {*c} - {"model", "best_of", *SETTINGS}:
            raise ValueError(
                f"contestant {name!r} has {sorted(unknown)}, expected some of model, "
                f"best_of, {', '.join(SETTINGS)}"
            )
        if (model := c.get("model", POLICY)) not in (POLICY, *lms):
            raise ValueError(
                f"contestant {name!r} is an LM {model!r}; there are "
                f"{[POLICY, *sorted(lms)]}"
            )
        many = c.get("best_of", 1)
        if not isinstance(many, int) or isinstance(many, bool) or many < 1:
            raise ValueError(
                f"contestant {name!r} is the best of {many!r}, expected a number from 1"
            )
    if len(data[:size] if size else data) < 2:
        raise ValueError(
            f"size is {size}, of {len(data)} prompts: an interval over prompts needs two"
        )
