"""Q of every next token at once, in the logits of an LM, for guides over the vocabulary.

  L = Σ_t w_t { ½ (Q(s_t, y_t) - r)² + κ c² KL(p ‖ π)(s_t) }
  Q(s, v) = b(s) + c log(π(v | s) / p(v | s))

b is the scalar head on the prefix before a token. Every Q(s, ·) has this form, with
b = c log Σ_v p e^{Q / c}; the normalisation of π is no restriction, and c only sets the
scale. On rollouts of p the minimum at κ = 0 is Q(s, v) = E[r | s v]. The KL regularises Q
of tokens that no rollout contains: for a small Q it is half the variance of Q under p, so that
κ shrinks differences of Q by 1 / (1 + κ).

Source: Mudgal et al. 2023 (controlled decoding), https://arxiv.org/abs/2310.17022; Q as a
log-ratio: Rafailov et al. 2024, https://arxiv.org/abs/2404.12358, Richemond et al. 2024,
https://arxiv.org/abs/2405.19107
Differs from the papers: the first has a network with one output per token, the last
regresses whole responses; here the target of every token's Q is its response's reward.
"""

from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps", "state_values", "forward_kl")
FORMS = ("labelled", "groups")
REQUIRES = {  # of rollouts: all samples of the reference, which is p
    "rollout.keep": "all",
    "rollout.policy": "ref",
}
RANGES = {"scale": "(0, inf)", "penalty": "[0, inf)"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    scale: Number = 1.0,
    penalty: Number = 0.1,
    reduction: str = "sequence",
) -> tuple[Float[Array, " B"], Metrics]:
    """Half the squared error of Q at every scored token, plus the KL penalty.

    Args:
      policy: logps, forward_kl (to the reference, which is p) and state_values [B, G, T].
      batch: ref_logps [B, G, T]; feedback [B, G], the reward of the whole response; mask
        [B, G, T]; valid [B, G]. The responses are samples of the reference.
      scale: c, above 0, reward per nat; the same as in guided decoding.
      penalty: κ, at least 0.
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and metrics 'value' (mean b), 'value_error' (mean square of Q - r),
      'advantage' (mean Q - b of the sampled tokens) and 'kl' (nats per token).
    """
    advantage = scale * (policy.logps - masked.reference(batch))
    error = (policy.state_values + advantage - batch.feedback[..., None]) ** 2
    total = 0.5 * error + penalty * scale**2 * policy.forward_kl
    keep = masked.scored(batch)
    return masked.reduce_tokens(total, batch, reduction), {
        "value": masked.per_prompt(policy.state_values, keep),
        "value_error": masked.per_prompt(error, keep),
        "advantage": masked.per_prompt(advantage, keep),
        "kl": masked.per_prompt(policy.forward_kl, keep),
    }
