"""Memorisation: what of a text a model still gives away, and whether it was trained on it.

Of the response y, n tokens, after its prompt x (the beginning of a text, or a question). The
EOS after it is no token of y: a text may be the middle of a longer one.

  extraction strength   1 - k/n, for the least k such that greedy decoding, given the text up
                        to k tokens of y, predicts every further one of them; 0 for none
  verbatim              ROUGE-L F of the greedy continuation of x with y
  knowledge             the same of questions about the texts

An attack gives every text a score, higher where it takes it for one that was trained on;
l_t = log π(y_t | x, y_<t), and μ_t and σ_t are the mean and the standard deviation of
log π(v | x, y_<t) over v ~ π:

  loss         mean of l_t                     zlib        mean of l_t / compressed bytes of y
  min_k        mean of the lowest share of l_t
  min_k_pp     mean of the lowest share of (l_t - μ_t) / σ_t
  reference    mean of l_t less that under a reference model

Its AUC is the chance that a text that was trained on has a higher score than one that was
not: 1/2 tells nothing.

Source: Carlini et al. 2021, https://arxiv.org/abs/2012.07805 (extraction; zlib and reference);
Shi et al. 2023, https://arxiv.org/abs/2310.16789 (min-k); Zhang et al. 2024,
https://arxiv.org/abs/2404.02936 (min-k++); Shi et al. 2024, https://arxiv.org/abs/2407.06460
(verbatim and knowledge, of MUSE); Wang et al. 2024, https://arxiv.org/abs/2406.09179 (strength)
Differs from the papers: only tokens of responses are scored, EOS where there is nothing else; a
response whose last token is not predicted has the strength 0; a text of fewer tokens than
1 / share has one lowest token.
"""

import math
import zlib
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float, Int

from alignax import logprob
from alignax.batch import LM, Batch, Example, Metrics, flatten
from alignax.data import wrapped
from alignax.evals.unlearning import overlaps, require
from alignax.inputs.detokenize import texts
from alignax.inputs.source import eval_batches
from alignax.models import transformer
from alignax.reports.metrics import bootstrap

RANGES = {"share": "(0, 1]", "max_new": "[1, inf)", "size": "[0, inf)"}
TILE = 16  # positions whose rows of logits exist at once
REFERENCE = "ref"
SLACK = 1e-4  # nats by which two float32 sums of one distribution may differ


class Read(NamedTuple):
    """What the attacks know of one text, of each of its n scored tokens."""

    logps: Float[np.ndarray, " n"]  # nats
    greedy: np.ndarray  # bool[n]: the likeliest token
    standard: Float[np.ndarray, " n"]  # (l_t - μ_t) / σ_t
    reference: Float[np.ndarray, " n"] | None  # nats, under the reference model
    size: int  # compressed bytes


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, nonmembers: Mapping[str, Any],
    questions: Mapping[str, Mapping[str, Any]] | None = None, reference: str = REFERENCE,
    share: float = 0.2, max_new: int = 64, size: int = 0,
) -> Metrics:  # fmt: skip
    """Reads texts that were trained on (the data), and texts that were not.

    Args:
      nonmembers: a data set, {'name': ..., its own parameters}, of texts of the same kind
        that were not trained on.
      questions: data sets of questions with their answers, by name.
      reference: name in `lms` of the reference model. Without an LM of the default name
        there is no such attack; another name must be there.
      share: of the tokens, the lowest of which min_k and min_k_pp take.
      max_new: most tokens of a greedy continuation.
      size: rows of each set to use, from its start (0 = all).

    Returns:
      'extraction_strength', 'verbatim' and 'knowledge/<name>' with intervals over rows, and
      'auc/<attack>'.

    Raises:
      ValueError: what `check` refuses.
    """
    require(lms, "reference", reference, REFERENCE)
    how: dict[str, Any] = dict(
        tokenizer=tokenizer, batch_size=batch_size, length=length
    )

    def first(rows):
        return rows[:size] if size else rows

    base = lms.get(reference)
    members = first(data)
    seen, unseen = (
        read(lm, base, rows, score, **how)
        for rows in (members, first(wrapped(nonmembers, "test")))
    )
    out = bootstrap([strength(x.greedy) for x in seen]).named("extraction_strength")
    said = overlaps(lm, members, generate, key, max_new, **how)
    out |= bootstrap([x.f for x in said]).named("verbatim")
    for name, source in (questions or {}).items():
        rows = first(wrapped(source, "test"))
        said = overlaps(lm, rows, generate, key, max_new, **how)
        out |= bootstrap([x.f for x in said]).named(f"knowledge/{name}")
    scores = [[attacks(x, share) for x in side] for side in (seen, unseen)]
    for name in scores[0][0]:
        out[f"auc/{name}"] = auc(*([x[name] for x in side] for side in scores))
    return out


def check(
    lms: Container[str], data: Sequence[Example], *, nonmembers: Mapping[str, Any],
    questions: Mapping[str, Mapping[str, Any]] | None = None, reference: str = REFERENCE, **_,
) -> None:  # fmt: skip
    """Raises ValueError: no such LM, or a set that cannot be read or has a row without a
    response."""
    require(lms, "reference", reference, REFERENCE)
    sets = {"the data": data, "nonmembers": wrapped(nonmembers, "test")}
    for name, source in (questions or {}).items():
        sets[f"questions.{name}"] = wrapped(source, "test")
    for name, rows in sets.items():
        if not len(rows):
            raise ValueError(f"{name} has no rows")
        for row in rows:
            if not row.responses:
                raise ValueError(f"{name}: {row.id} has no response")


def read(
    lm: LM, base: LM | None, data: Sequence[Example], score, *, tokenizer,
    batch_size: int, length: int,
) -> list[Read]:  # fmt: skip
    """What is read of the first response of each row, shortest first."""
    found = []
    for batch in eval_batches(data, tokenizer, batch_size=batch_size, length=length):
        batch = jax.tree.map(lambda x: np.asarray(x)[:, :1], batch._replace(extra=None))
        batch = batch._replace(mask=without_eos(batch, tokenizer.eos_ids))
        got = score(lm, batch, ("best",))
        logps, best = (np.asarray(x, np.float64) for x in (got.logps, got.best))
        mean, deviation = moments(lm, batch)
        standard = (logps - mean) / deviation
        under = None if base is None else np.asarray(score(base, batch).logps, float)
        said, mask = texts(batch, tokenizer), np.asarray(batch.mask)
        for b in np.flatnonzero(np.asarray(batch.valid)[:, 0]):
            at = b, 0, mask[b, 0]
            found.append(
                Read(
                    logps[at], logps[at] >= best[at] - SLACK, standard[at],
                    None if under is None else under[at],
                    len(zlib.compress(said[b][0].encode())),
                )
            )  # fmt: skip
    return found


def without_eos(batch: Batch, eos_ids: Collection[int]) -> Bool[np.ndarray, "B G T"]:
    """The mask without EOS, but where a response is nothing else."""
    mask = np.asarray(batch.mask)
    kept = mask & ~np.isin(batch.tokens, sorted(eos_ids))
    return np.where(kept.any(-1, keepdims=True), kept, mask)


def moments(
    lm: LM, batch: Batch
) -> tuple[Float[np.ndarray, "B G T"], Float[np.ndarray, "B G T"]]:
    """μ_t and σ_t (at least 1e-3) of the distribution that predicts each token, in nats.

    At t = 0, which no token precedes, they are 0 and 1.
    """
    shape = np.shape(batch.tokens)
    mean, variance = jax.device_get(_moments(lm, jnp.asarray(flatten(batch)[0])))
    out = []
    for x, at_0 in ((mean, 0.0), (np.sqrt(np.maximum(variance, 1e-6)), 1.0)):
        x = np.pad(x[:, : shape[-1] - 1], ((0, 0), (1, 0)), constant_values=at_0)
        out.append(x.reshape(shape).astype(np.float64))
    return out[0], out[1]


@jax.jit
def _moments(lm: LM, tokens: Int[Array, "N T"]):
    """Mean and variance of log π over the next token, after every prefix: [N, L] each."""
    h = transformer.hidden(lm, tokens)[0]
    h = jnp.pad(h, ((0, 0), (0, -h.shape[1] % TILE), (0, 0)))

    def tile(h):
        logp = logprob.rows(lm, h)
        p = jnp.exp(logp)
        mean = (p * logp).sum(-1)
        return mean, (p * (logp - mean[..., None]) ** 2).sum(-1)

    n, _, d = h.shape
    tiles = jax.lax.map(tile, h.reshape(n, -1, TILE, d).swapaxes(0, 1))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(n, -1), tiles)


def strength(greedy: np.ndarray) -> float:
    """1 - k/n for the least k from which on every token is the likeliest one.

    Args:
      greedy: bool[n], which tokens are; n >= 1.
    """
    wrong = np.flatnonzero(~np.asarray(greedy, bool))
    return 1 - (int(wrong[-1]) + 1 if len(wrong) else 0) / len(greedy)


def lowest(values: Float[np.ndarray, " n"], share: float) -> float:
    """Mean of the lowest share of n values, at least of one of them."""
    count = max(1, math.floor(len(values) * share + 1e-9))
    return float(np.sort(values)[:count].mean())


def attacks(text: Read, share: float) -> dict[str, float]:
    """The score of a text under each attack, higher for texts that were trained on."""
    mean = float(text.logps.mean())
    out = {
        "loss": mean,
        "zlib": mean / text.size,
        "min_k": lowest(text.logps, share),
        "min_k_pp": lowest(text.standard, share),
    }
    if text.reference is not None:
        out["reference"] = mean - float(text.reference.mean())
    return out


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Chance that a member has the higher score; a tie counts half."""
    n, m = len(members), len(others)
    ranks = scipy.stats.rankdata([*members, *others])  # equal ones share their mean
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
