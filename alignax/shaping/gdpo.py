"""Several rewards, each normalised within its group before they are added.

  r ← Σ_k w_k (r_k - mean(r_k)) / (std(r_k) + ε),   std with G - 1 degrees of freedom

Normalised after they are added, as GRPO does, different combinations of rewards get one
advantage: with two rewards, a group of (0, 0), (1, 0) and one of (0, 0), (1, 1). And a reward
of a large spread hides the others. With `constant` as the advantage and `whiten`, which
normalises over the rollout, this is GDPO: see configs/gdpo.py.

Source: Liu et al. 2026, https://arxiv.org/abs/2601.05242
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number
from alignax.shaping import group_norm

STAGE = "reward"
BASELINE = "group"
NEEDS = ("members",)
RANGES = {"eps": "(0, inf)"}
PREFIX = "reward/"  # of the members' rewards in Batch.extra


def shape(
    batch: Batch, baseline: Float[Array, "B R"] | None, *,
    weights: tuple[tuple[str, float], ...] = (), eps: Number = 1e-4,
) -> Float[Array, "B G T"]:  # fmt: skip
    """The weighted sum of the members' normalised rewards, on the last scored token.

    Args:
      batch: extra['reward/LABEL'] [B, G], as the reward `ensemble` gives them, without its
        scales; valid [B, G]. The feedback is not read.
      baseline: not read.
      weights: (label, w) of members; 1 for those that are not named.
      eps: ε, in units of each reward.

    Returns:
      [B, G, T] rewards of tokens.

    Raises:
      ValueError: rewards without members, or a weight of no member.
    """
    extra = batch.extra or {}
    found = {
        k.removeprefix(PREFIX): v for k, v in extra.items() if k.startswith(PREFIX)
    }
    if not found:
        raise ValueError(
            "shaping.gdpo normalises each of several rewards: set rollout.reward to an "
            "ensemble, {'name': 'ensemble', 'members': {label: ..., label: ...}}"
        )
    own = dict(weights)
    if unknown := sorted({*own} - {*found}):
        raise ValueError(
            f"shaping.gdpo has weights of {unknown}, which are not among {sorted(found)}"
        )
    total = jnp.zeros(batch.valid.shape)
    for label in sorted(found):
        alone = batch._replace(feedback=found[label], advantages=None)
        each = group_norm.shape(alone, baseline, scale=1.0, eps=eps)
        last = masked.last(each, masked.scored(batch))
        total += own.get(label, 1.0) * last
    return masked.earned(batch, total)
