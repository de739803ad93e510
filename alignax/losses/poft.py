"""PoFT: the policy's likelihood of the data is preferred to that of aligned models.

  L = -log σ(β [m_π(y) - 1/M Σ_j m_j(y)] + γ),   m = 1/|y| Σ_t log p(y)

Its gradient is that of fine-tuning times σ(-·), so that data which are unlikely under the
aligned models soon have little weight.

Source: Fan et al. 2024, https://arxiv.org/abs/2412.12865
Differs from the paper: only response tokens are scored, under the policy and under the M
aligned models, which share the policy's tokenizer.
"""

import fnmatch

import jax
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "aligned*_logps")  # of every frozen LM named 'aligned*'
FORMS = ("demonstrations", "unscored")
RANGES = {"beta": "(0, inf)", "gamma": "(-inf, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 1.0, gamma: Number = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Bradley-Terry loss between the policy and the mean of M frozen models.

    Args:
      policy: logps [B, G, T]; every response is data to learn from (usually G=1).
      batch: mask [B, G, T], valid [B, G]; extra [B, G, T] of each of the M >= 1 models:
        'aligned_logps', or any other column called 'aligned*_logps'.
      beta: scale of the difference of mean log-probabilities, > 0.
      gamma: added to the logit; below 0 the target likelihood is above the aligned models'.

    Returns:
      [B] values in nats, means over a prompt's responses, and metrics 'gradient_weight'
      (factor of the fine-tuning gradient, in (0, 1)), 'margin' (policy - aligned, nats
      per token) and 'nll' (nats per token).

    Raises:
      ValueError: no column of an aligned model.
    """
    names = sorted(fnmatch.filter(batch.extra or (), NEEDS[1]))
    if not names:
        raise ValueError(
            f"poft compares with aligned models, but the batch has no {NEEDS[1]!r}"
        )
    score = masked.token_mean(policy.logps, batch)
    each = [masked.token_mean(batch.extra[name], batch) for name in names]
    aligned = sum(each) / len(each)
    logit = beta * (score - aligned) + gamma

    def mean(x):
        return masked.response_mean(x, batch.valid)

    return mean(-jax.nn.log_sigmoid(logit)), {
        "gradient_weight": mean(jax.nn.sigmoid(-logit)),
        "margin": mean(score - aligned),
        "nll": mean(-score),
    }
