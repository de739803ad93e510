"""Policy gradient with clipped ratios: REINFORCE, GRPO, Dr. GRPO and DAPO.

  L = -Σ_t w_t min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t),   ρ_t = π(y_t)/π_old(y_t)

At the first step on a rollout ρ = 1 and the gradient is REINFORCE's,
-Σ w_t A_t ∇log π(y_t). The weights w are those of a mean over all tokens of the step (DAPO,
which clips at .2 and .28), over each response and then over responses (GRPO), or over a
constant length (Dr. GRPO). The KL to the reference is in the loss in policy_gradient_kl, in
the reward with shaping/kl.

Source: Williams 1992, https://doi.org/10.1007/BF00992696; Schulman et al. 2017,
https://arxiv.org/abs/1707.06347; Shao et al. 2024, https://arxiv.org/abs/2402.03300; Liu
et al. 2025, https://arxiv.org/abs/2503.20783; Yu et al. 2025,
https://arxiv.org/abs/2503.14476
Differs from the papers: nothing; the hyper-parameters select the method.
"""

from jaxtyping import Array, Float

from alignax import masked, ratios
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "old_logps", "advantages")
FORMS = ("prompts",)
RANGES = {"clip_low": "(0, 1]", "clip_high": "(0, inf]", "cap": "(1, inf]"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
    cap: Number = float("inf"),
    reduction: str = "token",
) -> tuple[Float[Array, " B"], Metrics]:
    """Surrogate of the expected advantage.

    Args:
      policy: logps [B, G, T].
      batch: old_logps, advantages, mask [B, G, T]; valid [B, G].
      clip_low, clip_high: ε, clipping range of a ratio below and above 1.
      cap: c of dual clipping: where A < 0, ρ counts as at most c > 1.
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and metrics 'ratio', 'clipped' (share of tokens), 'approx_kl' (nats per
      token, to the behaviour policy).
    """
    gain, metrics = ratios.clipped_surrogate(policy, batch, clip_low, clip_high, cap)
    return -masked.reduce_tokens(gain, batch, reduction), metrics
