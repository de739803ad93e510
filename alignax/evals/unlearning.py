"""Forget quality and model utility: is an unlearned model like one that never learned?

An item is a question with its answer y, the answer in other words ỹ, and wrong answers ŷ_k;
P̄(y) = π(y|x)^(1/|y|). The truth ratio has two forms:

  R = mean_k P̄(ŷ_k) / P̄(ỹ)                          as in the paper
  R = exp(mean_k log P̄(ŷ_k)) / P̄(ỹ)                 the geometric mean, as in its code

  forget quality   p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios
                   of the unlearned and of the retrained model, on the items to forget
  model utility    harmonic mean, over the sets to keep, of the mean probability, the mean
                   ROUGE-L recall of the greedy answer and the mean of max(0, 1 - R)

The probability is P̄(y) on retained items, and P̄(y) / (P̄(y) + Σ_k P̄(ŷ_k)) on other sets. On
items to forget the truth ratio is reported as the mean of min(R, 1/R), and is no part of the
utility. The p-value depends on the number of items: the statistic can be compared between
sets of different size, the p-value cannot. A model that forgets too much is unlike a
retrained one too, and has a low p-value.

Source: Maini et al. 2024, https://arxiv.org/abs/2401.06121, section 2.2
Differs from the paper: both forms of R are reported; ROUGE-L is without stemming.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.stats
from jaxtyping import Float

from alignax.batch import LM, Example, Metrics
from alignax.data import Examples, wrapped
from alignax.evals.sample import response_text
from alignax.inputs.detokenize import texts
from alignax.inputs.prompts import prompt_batches
from alignax.inputs.source import eval_batches
from alignax.reports.metrics import bootstrap
from alignax.text.overlap import Overlap, rouge_l

RANGES = {"max_new": "[1, inf)", "size": "[0, inf)"}
RETRAINED = "retrained"
NO_WRONG = (
    "an item has no wrong answer: the truth ratio needs the answer, the answer in other "
    "words and wrong answers, as data.tofu reads them"
)


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, retain: Mapping[str, Any],
    general: Mapping[str, Mapping[str, Any]] | None = None, retrained: str = RETRAINED,
    max_new: int = 64, size: int = 0,
) -> Metrics:  # fmt: skip
    """Reads items to forget (the data) and to keep, of `data.tofu`'s kind 'options'.

    Args:
      retain: a data set, {'name': ..., its own parameters}, of items that were retained.
      general: further sets to keep, by name, such as of real authors and of the world.
      retrained: name in `lms` of the model that was trained without the items to forget.
        Without an LM of the default name there is no forget quality; another name must be
        there.
      max_new: most tokens of a greedy answer.
      size: items of each set to use, from its start (0 = all).

    Returns:
      For each set 'forget', 'retain' and those of `general`: '<set>/probability',
      '<set>/rouge' and '<set>/truth_ratio' with intervals over items, and '<set>/items',
      how many were scored. 'model_utility', and 'forget_quality' with its statistic
      'forget_ks'; all three also under 'geometric/'.

    Raises:
      ValueError: what `check` refuses.
    """
    require(lms, "retrained", retrained, RETRAINED)
    sets = read_sets(data, retain, general, size)
    how: dict[str, Any] = dict(
        tokenizer=tokenizer, batch_size=batch_size, length=length
    )
    out: Metrics = {}
    kept: dict[str, list[float]] = {"": [], "geometric/": []}
    losses = {name: nats(lm, found, score, **how) for name, found in sets.items()}
    for name, found in sets.items():
        chance = probability(losses[name], options=name not in ("forget", "retain"))
        said = overlaps(lm, found, generate, key, max_new, **how)
        recall = [x.recall for x in said]
        out |= bootstrap(chance).named(f"{name}/probability")
        out |= bootstrap(recall).named(f"{name}/rouge")
        out[f"{name}/items"] = len(losses[name])
        for form, values in kept.items():
            ratio = log_ratio(losses[name], geometric=bool(form))
            better = np.exp(-np.abs(ratio))
            if name != "forget":
                better = -np.expm1(np.minimum(ratio, 0))
                values += map(float, (chance.mean(), np.mean(recall), better.mean()))
            out |= bootstrap(better).named(f"{form}{name}/truth_ratio")
    out |= {f"{form}model_utility": harmonic(values) for form, values in kept.items()}
    if retrained in lms:
        theirs = nats(lms[retrained], sets["forget"], score, **how)
        for form in kept:
            ratios = [log_ratio(x, geometric=bool(form)) for x in (losses["forget"], theirs)]  # fmt: skip
            quality, statistic = forget_quality(*ratios)
            out |= {f"{form}forget_quality": quality, f"{form}forget_ks": statistic}
    return out


def check(
    lms: Container[str], data: Sequence[Example], *, retain: Mapping[str, Any],
    general: Mapping[str, Mapping[str, Any]] | None = None, retrained: str = RETRAINED,
    size: int = 0, **_,
) -> None:  # fmt: skip
    """Raises ValueError: no such LM, a set of `general` that is called 'forget' or 'retain',
    a set that cannot be read, or an item without wrong answers."""
    require(lms, "retrained", retrained, RETRAINED)
    for name, found in read_sets(data, retain, general, size).items():
        for example in found:
            if len(example.responses) < 3:
                raise ValueError(f"{name}: {example.id}: {NO_WRONG}")


def require(lms: Container[str], key: str, name: str, default: str) -> None:
    """Raises ValueError for a name other than the default that no LM has."""
    if name != default and name not in lms:
        raise ValueError(f"{key} is {name!r}, which is none of `lms`")


def read_sets(
    data: Sequence[Example], retain: Mapping[str, Any],
    general: Mapping[str, Mapping[str, Any]] | None, size: int,
) -> dict[str, Sequence[Example]]:  # fmt: skip
    """The items to forget and those of each set to keep, by name."""
    sets = {"forget": data, "retain": wrapped(retain, "test")}
    for name, source in (general or {}).items():
        if name in sets:
            raise ValueError(f"general has a set {name!r}, which is a name of its own")
        sets[name] = wrapped(source, "test")
    return {name: found[:size] if size else found for name, found in sets.items()}


def nats(
    lm: LM, data: Sequence[Example], score, *, tokenizer, batch_size: int, length: int
) -> Float[np.ndarray, "N G"]:
    """-log P̄ of every response in nats per token, shortest items first.

    NaN where an item has fewer responses than another. What does not fit in `length` is cut,
    or its item is dropped and has no row, as the tokenizer's rule for long rows has it.
    """
    found: list[np.ndarray] = []
    for batch in eval_batches(data, tokenizer, batch_size=batch_size, length=length):
        logps = np.asarray(score(lm, batch._replace(extra=None)).logps, np.float64)
        count = np.asarray(batch.mask).sum(-1)
        loss = -logps.sum(-1) / np.maximum(count, 1)
        valid = np.asarray(batch.valid)
        found.extend(np.where(valid, loss, np.nan)[valid[:, 0]])
    out = np.full((len(found), max(map(len, found))), np.nan)
    for row, values in zip(out, found, strict=True):
        row[: len(values)] = values
    return out


def log_ratio(
    losses: Float[np.ndarray, "N G"], *, geometric: bool = False
) -> Float[np.ndarray, " N"]:
    """log R of each item in nats: above 0 where wrong answers are the likelier ones.

    It is finite for finite losses, where P̄ itself may be too small for a float.

    Args:
      losses: nats per token of the answer, of it in other words, and of wrong answers; NaN
        for a wrong answer that is not there.
      geometric: the mean over wrong answers is the geometric one.

    Raises:
      ValueError: an item without a wrong answer.
    """
    if losses.shape[1] < 3 or np.isnan(losses[:, 2:]).all(1).any():
        raise ValueError(NO_WRONG)
    other, wrong = losses[:, 1], losses[:, 2:]
    if geometric:
        return other - np.nanmean(wrong, 1)
    least = np.nanmin(wrong, 1)
    return other - least + np.log(np.nanmean(np.exp(least[:, None] - wrong), 1))


def probability(
    losses: Float[np.ndarray, "N G"], *, options: bool
) -> Float[np.ndarray, " N"]:
    """P̄ of each answer, or its share among the answer and the wrong ones.

    Args:
      losses: as for `log_ratio`.
      options: whether it is the share.
    """
    if not options:
        return np.exp(-losses[:, 0])
    with np.errstate(over="ignore"):  # a share of 0
        return 1 / (1 + np.nansum(np.exp(losses[:, :1] - losses[:, 2:]), 1))


def forget_quality(
    ours: Float[np.ndarray, " N"], theirs: Float[np.ndarray, " M"]
) -> tuple[float, float]:
    """(p-value, statistic) of the two-sample test between truth ratios.

    The test reads ranks alone, so that log R does for R.
    """
    found = scipy.stats.ks_2samp(ours, theirs)
    return float(found.pvalue), float(found.statistic)


def harmonic(values: Sequence[float]) -> float:
    """Harmonic mean of numbers >= 0; 0 as soon as one of them is."""
    x = np.asarray(values, np.float64)
    return 0.0 if (x <= 0).any() else float(len(x) / (1 / x).sum())


def overlaps(
    lm: LM, data: Sequence[Example], generate, key, max_new: int, *, tokenizer,
    batch_size: int, length: int,
) -> list[Overlap]:  # fmt: skip
    """ROUGE-L of the greedy response to each prompt with its first response."""
    out = []
    asked = Examples(data, lambda e: e._replace(responses=[], feedback=(), columns={}))
    for i, p in enumerate(
        prompt_batches(asked, tokenizer, batch_size=batch_size, length=length)
    ):
        got = jax.device_get(
            generate(lm, p.tokens, p.lengths, key, max_new=max_new, temperature=0.0)
        )
        said = texts(got.batch, tokenizer)
        for b in np.flatnonzero(p.valid):
            first = data[i * batch_size + int(b)]._replace(feedback=())
            wanted = response_text(first)
            out.append(rouge_l(said[b][0], wanted))
    return out
