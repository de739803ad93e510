"""Distillation: the exact forward or reverse KL to a frozen teacher, or a mixture of both.

  L = Σ_t w_t [(1-λ) KL(π_teacher ‖ π) + λ KL(π ‖ π_teacher)]

Source: Agarwal et al. 2023 (GKD), https://arxiv.org/abs/2306.13649; λ = 0 is word-level
distillation (Kim & Rush 2016, https://arxiv.org/abs/1606.07947)
Differs from the paper: a mixture of the two KLs, not of the two distributions (which would
be a Jensen-Shannon divergence); the data decide whose responses are scored.
Differs from TRL: all response tokens of a step have the same weight, in every micro-batch.
"""

from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("kl", "forward_kl")
FORMS = ("demonstrations", "labelled", "pairs", "groups", "unscored")
RANGES = {"reverse": "[0, 1]"}


def loss(
    policy: Scores, batch: Batch, *, reverse: Number = 0.5, reduction: str = "token"
) -> tuple[Float[Array, " B"], Metrics]:
    """Weighted KL between student and teacher on every valid response, in nats.

    Args:
      policy: kl and forward_kl [B, G, T], to the LM 'ref', which is the teacher.
      batch: mask, valid.
      reverse: λ, weight of KL(π ‖ π_teacher), in [0, 1]; 0 covers modes, 1 seeks them.
      reduction: 'token' (all scored tokens of a step equal), 'sequence' or 'constant'.

    Returns:
      [B] values and metrics 'kl' (policy to teacher) and 'forward_kl' (teacher to
      policy), mean nats per scored token of the prompt's responses.
    """
    value = (1 - reverse) * policy.forward_kl + reverse * policy.kl
    scored = masked.scored(batch)
    metrics = {
        "kl": masked.per_prompt(policy.kl, scored),
        "forward_kl": masked.per_prompt(policy.forward_kl, scored),
    }
    return masked.reduce_tokens(value, batch, reduction), metrics
