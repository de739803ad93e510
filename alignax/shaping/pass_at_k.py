"""Advantages for the best of k responses: pass@k where rewards are 0 or 1, max@k in general.

  J = E[max of the rewards of k samples]
  A_i = n / C(n, k) Σ_{I ∋ i, |I| = k} (max_{j ∈ I} r_j - max_{j ∈ I, j ≠ i} r_j)
      = n / C(n, k) Σ_{j < i} C(j - 1, k - 2) (r_(i) - r_(j)),   r_(1) <= .. <= r_(n), k > 1
  k = 1: A_i = r_i less the mean of the others, as in rloo

so that the mean over the n responses of A_i ∇log π(y_i) is an unbiased estimate of ∇J. The
subtracted term is independent of y_i, since the samples are. A response counts by how much it
raises the best of the sets that it is in: the lowest of a group gets 0, and what is right
where most are right gets little. RL for the mean does the opposite of what a user needs who
takes the best of k.

Source: Walder and Karkhanis 2025, https://arxiv.org/abs/2505.15201 (all subsets, and the
baseline without the sample); Tang et al. 2025, https://arxiv.org/abs/2503.19595 (k = n)
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch
from alignax.shaping import rloo

STAGE = "advantage"
BASELINE = "group"
RANGES = {"k": "[1, inf)"}


def check(*, k: float) -> None:
    """Raises ValueError if k is no whole number."""
    if not isinstance(k, int):
        raise ValueError(f"shaping.pass_at_k: k is {k}, expected a whole number")


def shape(
    batch: Batch, baseline: Float[Array, "B R"] | None, *, k: int = 2
) -> Float[Array, "B G T"]:
    """The same advantage on every token of a response.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; valid [B, G].
      baseline: not read.
      k: how many responses the best is taken of. A group with fewer valid ones has
        advantages of 0.

    Returns:
      [B, G, T] advantages; those of k > 1 are at least 0.
    """
    if k == 1:
        return rloo.shape(batch, baseline)
    reward, valid = masked.token_rewards(batch).sum(-1), batch.valid
    order = jnp.argsort(jnp.where(valid, reward, jnp.inf), -1)
    r = jnp.take_along_axis(jnp.where(valid, reward, 0.0), order, -1)
    weights = jnp.asarray(weights_of(reward.shape[-1], k))[valid.sum(-1)]  # [B, G]
    above = jnp.tril(r[..., None] - r[..., None, :], -1)  # r_(i) - r_(j) where j < i
    gain = (above * weights[..., None, :]).sum(-1)
    out = jnp.take_along_axis(gain, jnp.argsort(order, -1), -1)
    return masked.spread(batch, jnp.where(valid, out, 0.0))


def weights_of(group: int, k: int) -> Float[np.ndarray, "n group"]:
    """n C(j - 1, k - 2) / C(n, k) for n = 0..group and ranks j = 1..n; 0 elsewhere."""
    out = np.zeros((group + 1, group), np.float32)
    for n in range(k, group + 1):
        for j in range(k - 1, n + 1):
            out[n, j - 1] = n * math.comb(j - 1, k - 2) / math.comb(n, k)
    return out
