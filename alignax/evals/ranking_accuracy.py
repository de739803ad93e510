"""Ranking accuracy: how often the model ranks chosen above rejected.

  implicit reward   β Σ_t [log π(y) - log π_ref(y)]   (any β > 0 gives the same ranking)
  policy            Σ_t log π(y)
  reward model      its scalar head

Source: Chen et al. 2024, https://arxiv.org/abs/2405.19534; strict comparison, ties wrong,
as RewardBench does (Lambert et al. 2024), https://arxiv.org/abs/2403.13787
Differs from the paper: the idealised accuracy, which needs the labellers' agreement, is
not computed.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from alignax import masked
from alignax.batch import LM, Example, Metrics, form
from alignax.data import Examples, as_kind
from alignax.inputs.source import eval_batches
from alignax.reports.metrics import bootstrap, wilson


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, reference: str = "ref",
) -> Metrics:  # fmt: skip
    """Share of pairs ranked correctly, with a Wilson interval.

    Two responses with scores are a pair whose chosen side has the higher score; two
    without any are (chosen, rejected), which `check` does not accept of the data of a run.

    Args:
      reference: name in `lms` of the frozen model; without it only the policy's own
        ranking is reported.

    Returns:
      For a model with a value head 'accuracy' and 'margin'. Otherwise
      'policy_accuracy' and, with a reference, 'accuracy' and 'log_ratio_gap' (nats) of the
      log-ratio. 'pairs' is the number of pairs.

    Raises:
      ValueError: a row that is no pair, or a tie.
    """
    del key, generate
    for i in range(len(data)):
        _pair(data[i])
    data = Examples(data, _pair, getattr(data, "report", None))
    pieces: dict[str, list] = {"policy": [], "implicit": [], "reward": []}
    for batch in eval_batches(data, tokenizer, batch_size=batch_size, length=length):
        keep = batch.valid[:, :2].all(-1)
        if lm.config.value_head:
            values = score(lm, batch, needs=("values",)).values
            pieces["reward"].append(
                np.asarray(masked.last(jnp.asarray(values), jnp.asarray(batch.mask)))[
                    keep, :2
                ]
            )
            continue
        policy = score(lm, batch).logps.sum(-1)
        pieces["policy"].append(policy[keep, :2])
        if reference in lms:
            ref = score(lms[reference], batch).logps.sum(-1)
            pieces["implicit"].append((policy - ref)[keep, :2])
    out: Metrics = {}
    for kind, prefix in (("policy", "policy_"), ("implicit", ""), ("reward", "")):
        if pieces[kind]:
            chosen, rejected = np.concatenate(pieces[kind]).T
            out["pairs"] = len(chosen)
            right = int((chosen > rejected).sum())
            out |= wilson(right, len(chosen)).named(f"{prefix}accuracy")
            if not prefix:
                gap = "margin" if kind == "reward" else "log_ratio_gap"
                out |= bootstrap(chosen - rejected).named(gap)
    return out


def check(lms: Sequence[str], data: Sequence[Example], **_) -> None:
    """Raises ValueError for a row that is neither a pair nor two responses with scores."""
    del lms
    for i in range(len(data)):
        _pair(data[i], in_order=False)


def _pair(example: Example, in_order: bool = True) -> Example:
    """The chosen side first. A prompt alone is counted by whatever reads the rows.

    Args:
      example: a row.
      in_order: two responses without scores are (chosen, rejected).
    """
    kind, two = form(example), len(example.responses) == 2
    if kind == "prompts" or (kind == "unscored" and two and in_order):
        return example
    try:
        return as_kind(example, "pairs")
    except ValueError as error:
        raise ValueError(
            f"{example.id}: ranking_accuracy needs pairs (chosen, rejected): {error}"
        ) from error
