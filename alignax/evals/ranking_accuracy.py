"""Ranking accuracy: how often the model ranks chosen above rejected.

  implicit reward   β Σ_t [log π(y) - log π_ref(y)]   (any β > 0 gives the same ranking)
  policy            Σ_t log π(y)
  reward model      its scalar head

Source: Chen et al. 2024, https://arxiv.org/abs/2405.19534; strict comparison, ties wrong,
as RewardBench does (Lambert et al. 2024), https://arxiv.org/abs/2403.13787
Differs from the paper: the idealised accuracy, which needs the labellers' agreement, is
not computed.
"""

import jax.numpy as jnp
import numpy as np

from alignax import masked
from alignax.batch import LM, Metrics
from alignax.inputs.source import eval_batches
from alignax.reports.metrics import bootstrap, wilson


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, reference: str = "ref",
) -> Metrics:  # fmt: skip
    """Share of pairs ranked correctly, with a Wilson interval.

    Args:
      reference: name in `lms` of the frozen model; without it only the policy's own
        ranking is reported.

    Returns:
      For a model with a value head 'accuracy' and 'margin'. Otherwise
      'policy_accuracy' and, with a reference, 'accuracy' and 'log_ratio_gap' (nats) of the
      log-ratio. 'pairs' is the number of pairs.
    """
    del key, generate
    pieces: dict[str, list] = {"policy": [], "implicit": [], "reward": []}
    for batch in eval_batches(data, tokenizer, batch_size=batch_size, length=length):
        if batch.tokens.shape[1] != 2:
            raise ValueError(
                "ranking_accuracy needs pairs (chosen, rejected), the data have "
                f"{batch.tokens.shape[1]} responses each; data.pairing makes pairs of more"
            )
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
