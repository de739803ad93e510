"""f-DPO: DPO regularised by another divergence from the reference than the reverse KL.

  ρ = Σ_t log π/π_ref;  s = f'(e^ρ) up to a constant
  L = -log σ(β (s⁺ - s⁻))

  divergence     f'(u)                     s
  reverse_kl     log u + 1                 ρ
  forward_kl     -1/u                      -e^-ρ
  js             log(2u / (1 + u))         log σ(ρ)
  alpha          (u^(α-1) - 1) / (α-1)     (e^((α-1)ρ) - 1) / (α-1)

Source: Wang et al. 2023, https://arxiv.org/abs/2309.16240
Differs from the paper: its α is 1 - α here, as in TRL; α = 0 and α = 1 are the two KLs in
either convention. Exponents are clipped at CEILING, beyond which a side has no gradient.
Differs from TRL: its 'alpha_divergence' is clipped at 80 and its 'forward_kl' not at all.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "alpha": "[0, 1]"}
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
CEILING = 40.0  # nats; float32 still holds the square of a gradient of e^40


def loss(
    policy: Scores,
    batch: Batch,
    *,
    beta: Number = 0.1,
    divergence: str = "alpha",
    alpha: Number = 0.5,
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on the difference of the rewards implied by a divergence.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: strength of the divergence, > 0.
      divergence: one of DIVERGENCES.
      alpha: α of divergence='alpha', in [0, 1]: 0 is the forward KL, 1 the reverse KL.

    Returns:
      As `pairs.outcome`, of β times the scores s; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).

    Raises:
      ValueError: unknown divergence.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"unknown divergence {divergence!r}; known: {', '.join(DIVERGENCES)}"
        )

    def score(log_ratio):
        if divergence == "reverse_kl":
            return log_ratio
        if divergence == "js":
            return jax.nn.log_sigmoid(log_ratio)
        power = jnp.asarray(-1.0 if divergence == "forward_kl" else alpha - 1.0)
        limit = power == 0  # where the quotient is ρ
        power = jnp.where(limit, 1.0, power)
        quotient = jnp.expm1(jnp.minimum(power * log_ratio, CEILING)) / power
        return jnp.where(limit, log_ratio, quotient)

    log_ratios = pairs.log_ratios(policy, batch)
    chosen, rejected = beta * score(log_ratios[0]), beta * score(log_ratios[1])
    return pairs.outcome(
        batch, -jax.nn.log_sigmoid(chosen - rejected), chosen, rejected,
        log_ratio_chosen=log_ratios[0], log_ratio_rejected=log_ratios[1],
    )  # fmt: skip
