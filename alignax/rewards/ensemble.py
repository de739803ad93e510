"""Several rewards as one: their mean, their minimum, or the mean less their disagreement.

  mean  r = 1/M Σ_m s_m r_m
  sum   r = Σ_m s_m r_m                            as TRL combines reward functions
  min   r = min_m s_m r_m                          worst-case optimisation
  std   r = mean_m s_m r_m - k std_m s_m r_m       lower confidence bound
  var   r = mean_m s_m r_m - k var_m s_m r_m       uncertainty-weighted optimisation

A policy that is trained against one reward exploits its errors; members that were trained
independently rarely err on the same responses.

Source: Coste et al. 2023, https://arxiv.org/abs/2310.02743 (mean, min and var)
Differs from the paper: members may be any rewards, with a scale s each; std is in the
units of the reward.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from alignax import rewards
from alignax.reward_functions import calls
from alignax.reward_functions.calls import Responses

RULES = ("mean", "min", "std", "var", "sum")
RANGES = {"k": "[0, inf)", "scales": "(-inf, inf)"}


def reward(
    given: Responses, *, members: Mapping[str, Any], rule: str = "mean", k: float = 1.0,
    scales: Mapping[str, float] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:  # fmt: skip
    """Scores responses with every member and combines them by a rule.

    A member that gives None for a response is left out for that response.

    Args:
      given: B groups of G responses, and what members read.
      members: {label: a reward's name, or {'name': ..., its hyper-parameters}}.
      rule: one of RULES.
      k: of 'std' and 'var', >= 0: weight of the disagreement.
      scales: s by label, default 1 each: for members in different units.

    Returns:
      [B, G] rewards, 0 on invalid responses and NaN where no member gave any; and those of
      each member, without its scale.

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
    scaled = []
    for label, member in members.items():
        try:
            judged = calls.judge(rewards.load(member), given, none=True)
        except ValueError as error:
            raise ValueError(f"member {label!r}: {error}") from error
        found[label] = judged.values
        absent = np.where(judged.failed, np.nan, judged.values)
        scaled.append(scales.get(label, 1.0) * absent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of responses without any
        return combined(np.stack(scaled), rule, k), found


def combined(r: Float[np.ndarray, "M B G"], rule: str, k: float) -> np.ndarray:
    """[B, G] of M members by a rule; NaN of a member does not count."""
    if rule == "min":
        return np.nanmin(r, 0)
    if rule == "sum":
        return np.where(np.isnan(r).all(0), np.nan, np.nansum(r, 0))
    spread = {"mean": 0.0, "std": np.nanstd(r, 0), "var": np.nanvar(r, 0)}[rule]
    return np.nanmean(r, 0) - k * spread
