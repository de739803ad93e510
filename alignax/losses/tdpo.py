"""Token-level DPO: a penalty keeps the rejected side's sequence KL near the chosen side's.

  D(y) = Σ_t KL(π_ref(·|x, y_<t) ‖ π(·|x, y_<t))
  L = -log σ(β [h - α (D(y⁻) - sg D(y⁺))]),   h = log-ratio(y⁺) - log-ratio(y⁻)

Source: Zeng et al. 2024, https://arxiv.org/abs/2404.11999 (TDPO₂; with α = 1 and without
the stop-gradient sg it is TDPO₁)
Differs from the paper: nothing; the KL is exact, over the whole vocabulary.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps", "forward_kl")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "alpha": "[0, inf)"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    beta: Number = 0.1,
    alpha: Number = 0.5,
    detach_chosen: bool = True,
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on implicit rewards less a difference of sequence KLs.

    Args:
      policy: logps and forward_kl [B, 2, T], nats; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      alpha: weight of the difference of KLs, >= 0.
      detach_chosen: no gradient through the KL of the chosen side.

    Returns:
      As `pairs.outcome`, of implicit rewards (the accuracy and the margin are those of h);
      'kl_chosen' and 'kl_rejected' (nats per response).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    kl_chosen, kl_rejected = pairs.sides(policy.forward_kl.sum(-1), batch)
    held = jax.lax.stop_gradient(kl_chosen) if detach_chosen else kl_chosen
    value = -jax.nn.log_sigmoid(
        beta * (chosen - rejected - alpha * (kl_rejected - held))
    )
    return pairs.outcome(
        batch, value, beta * chosen, beta * rejected,
        kl_chosen=kl_chosen, kl_rejected=kl_rejected,
    )  # fmt: skip
