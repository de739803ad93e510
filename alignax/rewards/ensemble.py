"""Several rewards as one: their mean, their minimum, or the mean less their disagreement.

  mean  r = 1/M Σ_m s_m r_m
  min   r = min_m s_m r_m                          worst-case optimisation
  std   r = mean_m s_m r_m - k std_m s_m r_m       lower confidence bound
  var   r = mean_m s_m r_m - k var_m s_m r_m       uncertainty-weighted optimisation

A policy that is trained against one reward exploits its errors; members that were trained
independently rarely err on the same responses.

Source: Coste et al. 2023, https://arxiv.org/abs/2310.02743 (mean, min and var)
Differs from the paper: members may be any rewards, with a scale s each; std is in the
units of the reward.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignax import rewards
from alignax.batch import LM, Batch, Example

RULES = ("mean", "min", "std", "var")
RANGES = {"k": "[0, inf)"}


def reward(
    batch: Batch, texts: list[list[str]], lms: dict[str, LM], tokenizer=None,
    score: Callable | None = None, examples: Sequence[Example] | None = None, *,
    members: Mapping[str, Any], rule: str = "mean", k: float = 1.0,
    scales: Mapping[str, float] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:  # fmt: skip
    """Scores responses with every member and combines them by a rule.

    Args:
      batch: prompts and responses.
      texts: B groups of G responses.
      lms: frozen LMs that members read.
      tokenizer, score, examples: passed on to the members.
      members: {label: a reward's name, or {'name': ..., its hyper-parameters}}.
      rule: one of RULES.
      k: of 'std' and 'var', >= 0: weight of the disagreement.
      scales: s by label, default 1 each: for members in different units.

    Returns:
      [B, G] rewards, 0 on invalid responses; and those of each member, without its scale.

    Raises:
      ValueError: no members, an unknown rule, a scale of no member, or an error in a
        member, with its label.
    """
    members, scales = dict(members), dict(scales or {})
    if not members:
        raise ValueError("rewards.ensemble has no members: {label: {'name': ...}, ...}")
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}")
    if unknown := sorted(set(scales) - set(members)):
        raise ValueError(f"scales of {unknown}, which are not among {sorted(members)}")
    found: dict[str, np.ndarray] = {}
    for label, member in members.items():
        try:
            judge = rewards.load(member)
            found[label] = rewards.call(
                judge, batch, texts, lms, tokenizer=tokenizer, score=score,
                examples=examples,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"member {label!r}: {error}") from error
    r = np.stack([scales.get(label, 1.0) * found[label] for label in found])
    if rule == "min":
        return r.min(0), found
    spread = {"mean": 0.0, "std": r.std(0), "var": r.var(0)}[rule]
    return r.mean(0) - k * spread, found
