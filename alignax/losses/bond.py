"""BOND: distils the best-of-N distribution by both KL divergences.

  J = (1 - γ) KL(π_N ‖ π) + γ KL(π ‖ π_N)
  L = -(1 - γ) log π(y*) - γ 1/G Σ_g Σ_t min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t)

π_N is the distribution of the best of N responses of an anchor, and y* is a sample of it.
Fine-tuning on y* descends the first divergence, which covers all modes of π_N. The second
divergence seeks its modes. Its gradient is that of RL at a KL strength of 1 with the reward
(N - 1) log u, u the quantile under the anchor. The advantages A of the policy's own G
responses contain this reward and penalty (shaping.ctrl with transform 'best_of', shaping.kl
with beta 1). All log-probabilities are sums over tokens, log π(y|x).

Source: Sessa et al. 2024, https://arxiv.org/abs/2407.14622
Differs from the paper: ratios to the behaviour policy are clipped, for more than one step
per rollout.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked, ratios
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "old_logps", "advantages")
FORMS = ("prompts",)
REQUIRES = {  # of rollouts: at another N or KL strength the optimum is not π_N
    "shaping.ctrl.transform": "best_of",
    "shaping.ctrl.n": "rollout.anchor_samples",
    "shaping.kl.beta": 1.0,
}
RANGES = {"gamma": "[0, 1]", "clip_low": "(0, 1]", "clip_high": "(0, inf]"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    gamma: Number = 0.5,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
) -> tuple[Float[Array, " B"], Metrics]:
    """Imitation of the anchor's best of N, mixed with RL on the policy's own responses.

    Args:
      policy: logps [B, G + 1, T].
      batch: old_logps, advantages, mask [B, G + 1, T]; valid [B, G + 1]. The policy's own
        responses come first; the last slot is the anchor's best of N.
      gamma: γ, weight of KL(π ‖ π_N), in [0, 1]; 0 is fine-tuning, 1 a policy gradient.
      clip_low, clip_high: ε, clipping range of a ratio below and above 1.

    Returns:
      [B] values, nats; metrics 'nll' (nats, of the anchor's response), and of the policy's
      own responses 'ratio', 'clipped' (share of tokens), 'approx_kl' (nats per token, to
      the behaviour policy).

    Raises:
      ValueError: the batch holds one response per prompt, or is not of a rollout.
    """
    if batch.tokens.shape[1] < 2:
        raise ValueError(
            "BOND needs the anchor's best of N behind the policy's own responses, but the "
            "batch holds one response per prompt (config.rollout.anchor)"
        )
    keep = masked.scored(batch)
    own = batch._replace(mask=batch.mask[:, :-1], valid=batch.valid[:, :-1])
    log_rho = ratios.log_ratio(policy, batch)[:, :-1]
    advantages = jnp.where(keep, batch.advantages, 0.0)[:, :-1]
    gain = ratios.surrogate(log_rho, advantages, clip_low, clip_high, jnp.inf)
    backward = -gain.sum((1, 2)) / jnp.maximum(own.valid.sum(-1), 1)
    nll = -jnp.where(keep, policy.logps, 0.0)[:, -1].sum(-1)
    metrics = ratios.report(log_rho, own, clip_low, clip_high) | {"nll": nll}
    return (1 - gamma) * nll + gamma * backward, metrics
