"""Ranking accuracy: how often the model ranks chosen above rejected.

  implicit reward   β Σ_t [log π(y) - log π_ref(y)]   (any β > 0 gives the same ranking)
  policy            Σ_t log π(y)
  reward model      its scalar head

A row may have several rejected responses, as those of RewardBench 2: it is right if chosen
is above all of them. Where rows name their subset, the accuracy of each subset and the mean
of these are reported too.

Source: Chen et al. 2024, https://arxiv.org/abs/2405.19534; strict comparison, ties wrong,
as RewardBench does (Lambert et al. 2024), https://arxiv.org/abs/2403.13787; several rejected
responses as in RewardBench 2 (Malik et al. 2025), https://arxiv.org/abs/2506.01937
Differs from the paper: the idealised accuracy, which needs the labellers' agreement, is
not computed. The mean is over subsets, each with the same weight; RewardBench's sections and
their weights, and the rule for rows with several correct responses (subset 'Ties' of
RewardBench 2), are not applied.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from alignax import masked
from alignax.batch import LM, Batch, Example, Metrics, form
from alignax.data import Examples, as_kind
from alignax.inputs.source import eval_batches
from alignax.reports.metrics import bootstrap, mean_of, wilson


class Ranked(NamedTuple):
    """Rows by one score.

    Attributes:
      gaps: score of chosen less the highest of the rejected ones; above 0 is right.
      ids: of the rows.
    """

    gaps: list[float]
    ids: list[str]


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, reference: str = "ref", subset: str = "subset",
) -> Metrics:  # fmt: skip
    """Share of rows ranked correctly, with a Wilson interval.

    Two responses with scores are a pair whose chosen side has the higher score; two
    without any are (chosen, rejected), which `check` does not accept of the data of a run.
    More responses are one chosen with the score 1 and rejected ones with 0.

    Args:
      reference: name in `lms` of the frozen model; without it only the policy's own
        ranking is reported.
      subset: column of the rows with the name of their subset.

    Returns:
      For a model with a value head 'accuracy' and 'margin'. Otherwise
      'policy_accuracy' and, with a reference, 'accuracy' and 'log_ratio_gap' (nats) of the
      log-ratio. A margin or gap is that to the highest rejected response. 'pairs' is the
      number of rows. With subsets, for each accuracy also '<subset>/accuracy' and
      'mean_accuracy', over subsets; rows without one count in 'accuracy' alone.

    Raises:
      ValueError: a row that is no pair, or a tie; rows of one id in two subsets.
    """
    del key, generate
    subsets = _subsets(data, subset)
    data = Examples(data, _ranked, getattr(data, "report", None))
    found = {kind: Ranked([], []) for kind in ("policy", "implicit", "reward")}
    batches = eval_batches(data, tokenizer, batch_size=batch_size, length=length)
    for k, batch in enumerate(batches):
        ids = batches.ids(k)
        if lm.config.value_head:
            values = score(lm, batch, needs=("values",)).values
            last = masked.last(jnp.asarray(values), jnp.asarray(batch.mask))
            _add(found["reward"], np.asarray(last), batch, ids)
            continue
        policy = score(lm, batch).logps.sum(-1)
        _add(found["policy"], policy, batch, ids)
        if reference in lms:
            ref = score(lms[reference], batch).logps.sum(-1)
            _add(found["implicit"], policy - ref, batch, ids)
    out: Metrics = {}
    for kind, prefix in (("policy", "policy_"), ("implicit", ""), ("reward", "")):
        if found[kind].ids:
            out["pairs"] = len(found[kind].ids)
            out |= _accuracies(found[kind], subsets, f"{prefix}accuracy")
            if not prefix:
                gap = "margin" if kind == "reward" else "log_ratio_gap"
                out |= bootstrap(found[kind].gaps).named(gap)
    return out


def check(lms: Sequence[str], data: Sequence[Example], **_) -> None:
    """Raises ValueError for a row that is not one chosen response and rejected ones."""
    del lms
    for i in range(len(data)):
        _ranked(data[i], in_order=False)


def _subsets(data: Sequence[Example], column: str) -> dict[str, str]:
    """{id of a row: its subset}, after each row was checked."""
    found: dict[str, str] = {}
    for i in range(len(data)):
        row = _ranked(data[i])
        name = str(row.columns.get(column, ""))
        if found.setdefault(row.id, name) != name:
            raise ValueError(
                f"{row.id}: rows with this id are in the subsets {found[row.id]!r} and "
                f"{name!r}"
            )
    return found


def _add(out: Ranked, scores: np.ndarray, batch: Batch, ids: Sequence[str]) -> None:
    """Adds the rows of a batch; `ids` are of its first rows, the others fill it up."""
    scores, valid = np.asarray(scores)[: len(ids)], np.asarray(batch.valid)[: len(ids)]
    keep = valid[:, 0] & valid[:, 1:].any(-1)
    rejected = np.where(valid[:, 1:], scores[:, 1:], -np.inf).max(-1)
    out.gaps.extend((scores[:, 0] - rejected)[keep].tolist())
    out.ids.extend(id for id, kept in zip(ids, keep, strict=True) if kept)


def _accuracies(found: Ranked, subsets: Mapping[str, str], name: str) -> Metrics:
    """An accuracy of all rows, of each subset, and the mean of these."""
    right = np.array(found.gaps) > 0
    out: Metrics = wilson(int(right.sum()), len(right)).named(name)
    of_row = np.array([subsets[id] for id in found.ids])
    each = {
        part: wilson(int(right[of_row == part].sum()), int((of_row == part).sum()))
        for part in sorted({*of_row.tolist()} - {""})
    }
    for part, interval in each.items():
        out |= interval.named(f"{part}/{name}")
    return out | (mean_of([*each.values()]).named(f"mean_{name}") if each else {})


def _ranked(example: Example, in_order: bool = True) -> Example:
    """The chosen side first. A prompt alone is counted by whatever reads the rows.

    Args:
      example: a row.
      in_order: two responses without scores are (chosen, rejected).
    """
    kind, many = form(example), len(example.responses)
    if kind == "prompts" or (kind == "unscored" and many == 2 and in_order):
        return example
    scores = [*example.feedback]
    if kind == "groups" and many > 2 and sorted(scores) == [0.0] * (many - 1) + [1.0]:
        at = scores.index(1.0)
        order = [at, *(i for i in range(many) if i != at)]
        return example._replace(
            responses=[example.responses[i] for i in order],
            feedback=tuple(scores[i] for i in order),
        )
    try:
        return as_kind(example, "pairs")
    except ValueError as error:
        raise ValueError(
            f"{example.id}: ranking_accuracy needs pairs (chosen, rejected), or one chosen "
            f"response with several rejected ones: {error}"
        ) from error
