"""Gradient ascent: unlearning by maximising the negative log-likelihood of forget rows.

  forget: L = 1/|y| Σ_t log π(y)
  retain: L = -c/|y| Σ_t log π(y)

With c = 0 it is plain gradient ascent. It is not bounded below; NPO is.

Source: the baselines of Zhang et al. 2024, https://arxiv.org/abs/2404.05868, and of TOFU
(Maini et al. 2024), https://arxiv.org/abs/2401.06121, where c = 1 is gradient difference
Differs from the paper: every response has the same weight, not every token of a
micro-batch; the share of forget rows in a step (config.mixture) also weighs the two terms.
"""

from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("labelled",)
RANGES = {"retain_weight": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, retain_weight: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Mean log-probability of forget rows, and its negative on retain rows.

    Args:
      policy: logps [B, G, T].
      batch: mask [B, G, T]; feedback [B, G], <= 0.5 on forget rows and > 0.5 on retain
        rows; valid [B, G].
      retain_weight: weight c of a retain row's mean nats per token, >= 0.

    Returns:
      [B] values, means over a prompt's responses, and metrics 'forget_nll' and
      'retain_nll' (nats per token): means over a prompt's forget or retain rows, 0
      without any.
    """
    nll = -masked.token_mean(policy.logps, batch)
    return masked.forget_retain(
        batch, -nll, retain_weight * nll,
        forget={"forget_nll": nll}, retain={"retain_nll": nll},
    )  # fmt: skip
