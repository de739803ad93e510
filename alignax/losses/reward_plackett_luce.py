"""Plackett-Luce reward model: the likelihood of a whole ranking under scalar rewards.

  L = Σ_k log [1 + Σ_{i below k} exp(r_i - r_k)]

Source: Zhu et al. 2023 (K-wise comparisons), https://arxiv.org/abs/2301.11270; with two
responses it is the pairwise loss of `reward_model`
Differs from the paper: a response is compared with those of strictly lower feedback
only. Without ties that is the paper's likelihood; tied responses are never compared.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Scores

NEEDS = ("values",)


def loss(policy: Scores, batch: Batch) -> tuple[Float[Array, " B"], Metrics]:
    """Negative log-likelihood of the order that the feedback gives.

    Args:
      policy: values [B, G, T], G >= 2; the reward is that of the last scored token.
      batch: mask [B, G, T], feedback [B, G] (higher is better), valid [B, G].

    Returns:
      [B] values in nats, 0 where nothing is ordered, and metrics 'accuracy' (share of
      ordered pairs ranked right, ties count half; 0.5 where there are none) and
      'margin' (mean gap of rewards in an ordered pair).

    Raises:
      ValueError: a single response to each prompt.
    """
    if batch.tokens.shape[1] < 2:
        raise ValueError(
            "reward_plackett_luce orders responses, but the batch holds one a prompt: use "
            "data with two or more, or losses.reward_regression for single rewards"
        )
    reward = masked.last(policy.values, batch.mask)
    below = batch.feedback[:, None, :] < batch.feedback[:, :, None]  # [b, k, i]
    below &= batch.valid[:, None, :] & batch.valid[:, :, None]
    gap = reward[:, None, :] - reward[:, :, None]
    # log(1 + Σ exp) around its largest term, so that nothing overflows
    term = jnp.where(below, gap, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(term.max(-1), 0.0))
    value = top + jnp.log(jnp.exp(-top) + jnp.exp(term - top[..., None]).sum(-1))
    ahead = jnp.where(below, -gap, 0.0)
    compared = jnp.maximum(below.sum((1, 2)), 1)
    return value.sum(-1), {
        "accuracy": (jnp.sign(ahead).sum((1, 2)) / compared + 1) / 2,
        "margin": ahead.sum((1, 2)) / compared,
    }
