"""Alignment fine-tuning: right answers above wrong ones, which are kept within reach.

  s   = 1/|y| Σ_t log π(y),   B = min_p s_p - c,   T_p = 2B - s_p (a constant)
  L   = log [1 + Σ_p Σ_n (exp(s_n - s_p) + exp(T_p - s_n))] - λ s_ref

p runs over positives, n over negatives. Each pair is at rest where s_n = B: above it a
negative is pushed down, below it up again. `constraint` says how negatives are kept:
'boundary' as above; 'detached' drops the second exponential and the gradient of s_n in
the first; 'none' only drops the second exponential.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.02144
Differs from the paper: the reference answer y_ref is the first positive of a prompt; the
weight λ = 1 and the default slack c = 0.1 are ours, the paper tunes c.
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
    """Constrained alignment of every (positive, negative) pair of a prompt.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: mask [B, G, T], feedback [B, G] (> 0.5 is a positive), valid [B, G].
      constraint: one of CONSTRAINTS.
      slack: distance of the boundary below the least likely positive, nats per token,
        >= 0; read by 'boundary' alone.
      lam: λ, weight of the reference answer's mean nats per token, >= 0.

    Returns:
      [B] values (0 for a prompt without a positive), and metrics 'accuracy' (share of
      pairs ranked right, ties count half; 0.5 where there are none), 'margin' (mean gap
      of a pair), 'score_negative' (mean over negatives, 0 without) and 'nll', in nats per
      token.

    Raises:
      ValueError: an unknown constraint, or a single response to each prompt.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(
            f"aft: unknown constraint {constraint!r}; known: {', '.join(CONSTRAINTS)}"
        )
    if batch.tokens.shape[1] < 2:
        raise ValueError(
            "aft compares responses, but the batch holds one a prompt: use data with two or "
            "more (for pairs from a file set config.data.kind='pairs'), or losses.sft"
        )
    score = policy.logps.sum(-1) / jnp.maximum(batch.mask.sum(-1), 1)
    positive = batch.valid & (batch.feedback > 0.5)
    negative = batch.valid & ~positive
    pair = positive[:, :, None] & negative[:, None, :]  # [b, p, n]
    pushed = jax.lax.stop_gradient(score) if constraint == "detached" else score
    terms = [pushed[:, None, :] - score[:, :, None]]
    if constraint == "boundary":
        boundary = jnp.where(positive, score, jnp.inf).min(-1, keepdims=True) - slack
        rest = jax.lax.stop_gradient(2 * boundary - score)
        terms.append(rest[:, :, None] - score[:, None, :])
    # log(1 + Σ exp) around its largest term, so that nothing overflows
    term = jnp.concatenate([jnp.where(pair, t, -jnp.inf) for t in terms], -1)
    top = jax.lax.stop_gradient(jnp.maximum(term.max((1, 2)), 0.0))
    spread = jnp.exp(term - top[:, None, None]).sum((1, 2))
    value = top + jnp.log(jnp.exp(-top) + spread)
    first = jnp.argmax(positive, -1)[:, None]
    nll = -jnp.take_along_axis(jnp.where(positive, score, 0.0), first, -1)[:, 0]
    ahead = jnp.where(pair, score[:, :, None] - score[:, None, :], 0.0)
    compared = jnp.maximum(pair.sum((1, 2)), 1)
    likelihood = jnp.where(negative, score, 0.0).sum(-1)
    return value + lam * nll, {
        "accuracy": (jnp.sign(ahead).sum((1, 2)) / compared + 1) / 2,
        "margin": ahead.sum((1, 2)) / compared,
        "score_negative": likelihood / jnp.maximum(negative.sum(-1), 1),
        "nll": nll,
    }
