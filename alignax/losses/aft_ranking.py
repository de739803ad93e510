"""Alignment fine-tuning on rankings: each response keeps its own boundary.

  s   = 1/|y| Σ_t log π(y),   B_j = min_{i above j} s_i - c,   T_ij = 2 B_j - s_i (constant)
  L   = log [1 + Σ_{i above j} (exp(s_j - s_i) + exp(T_ij - s_j))] - λ s_best

`constraint` is that of `aft`: 'boundary' as above; 'detached' drops the second exponential
and the gradient of s_j in the first; 'none' only drops the second exponential. With two
levels of feedback the two losses are one.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.02144
Differs from the paper: B_j carries the binary boundary over to rankings, as the least
likely of all responses above j; we could not confirm that the paper takes the same
minimum. λ = 1 and the default slack c = 0.1 are ours. Ties are never compared; of several
best responses the first is imitated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
RANGES = {"slack": "[0, inf)", "lam": "[0, inf)"}
CONSTRAINTS = ("none", "detached", "boundary")


def loss(
    policy: Scores,
    batch: Batch,
    *,
    constraint: str = "boundary",
    slack: Number = 0.1,
    lam: Number = 1.0,
) -> tuple[Float[Array, " B"], Metrics]:
    """Constrained alignment of every ordered pair of a prompt's responses.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: mask [B, G, T], feedback [B, G] (higher is better), valid [B, G].
      constraint: one of CONSTRAINTS.
      slack: distance of a boundary below the least likely of the better responses, nats
        per token, >= 0; read by 'boundary' alone.
      lam: λ, weight of the best response's mean nats per token, >= 0.

    Returns:
      [B] values, and metrics 'accuracy' (share of ordered pairs ranked right, ties count
      half; 0.5 where there are none), 'margin' (mean gap of an ordered pair, nats per
      token) and 'nll' (of the best response, nats per token).

    Raises:
      ValueError: an unknown constraint, or a single response to each prompt.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(
            f"aft_ranking: unknown constraint {constraint!r}; "
            f"known: {', '.join(CONSTRAINTS)}"
        )
    if batch.tokens.shape[1] < 2:
        raise ValueError(
            "aft_ranking ranks responses, but the batch holds one a prompt: use data with "
            "two or more (for pairs from a file set config.data.kind='pairs')"
        )
    score = policy.logps.sum(-1) / jnp.maximum(batch.mask.sum(-1), 1)
    above = batch.feedback[:, :, None] > batch.feedback[:, None, :]  # [b, i, j]
    above &= batch.valid[:, :, None] & batch.valid[:, None, :]
    better = score[:, :, None]
    pushed = jax.lax.stop_gradient(score) if constraint == "detached" else score
    terms = [pushed[:, None, :] - better]
    if constraint == "boundary":
        boundary = jnp.where(above, better, jnp.inf).min(1, keepdims=True) - slack
        rest = jax.lax.stop_gradient(2 * boundary - better)
        terms.append(rest - score[:, None, :])
    # log(1 + Σ exp) around its largest term, so that nothing overflows
    term = jnp.concatenate([jnp.where(above, t, -jnp.inf) for t in terms], -1)
    top = jax.lax.stop_gradient(jnp.maximum(term.max((1, 2)), 0.0))
    spread = jnp.exp(term - top[:, None, None]).sum((1, 2))
    value = top + jnp.log(jnp.exp(-top) + spread)
    best = jnp.argmax(jnp.where(batch.valid, batch.feedback, -jnp.inf), -1)
    nll = -jnp.take_along_axis(score, best[:, None], -1)[:, 0]
    ahead = jnp.where(above, better - score[:, None, :], 0.0)
    compared = jnp.maximum(above.sum((1, 2)), 1)
    return jnp.where(batch.valid.any(-1), value + lam * nll, 0.0), {
        "accuracy": (jnp.sign(ahead).sum((1, 2)) / compared + 1) / 2,
        "margin": ahead.sum((1, 2)) / compared,
        "nll": nll,
    }
