"""D²O: human negatives alone are compared with the policy's own samples.

  h = β/K Σ_i log π(y_i)/π⁻(y_i) - α log π(y⁻)/π⁺(y⁻)
  L = -log σ(h)

π⁻ is a harmful and π⁺ a helpful reference; both may be the same frozen model. By convexity
L is at most the mean of the K losses of single pairs. K = 1 with one reference is DPO.

Source: Duan et al. 2024, https://arxiv.org/abs/2403.03419
Differs from the paper: the samples y_i are those of the data; the loss does not sample from
the policy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import lists, masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "helpful_logps", "harmful_logps")
FORMS = ("groups", "pairs", "unscored")
RANGES = {"beta": "(0, inf)", "alpha": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, alpha: Number = 0.1
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss between the mean of K own samples and a human negative.

    Args:
      policy: logps [B, K+1, T]; the negative is the last valid response of a prompt, the
        valid ones before it are its samples, so K may differ from prompt to prompt.
      batch: valid [B, K+1]; extra 'helpful_logps' and 'harmful_logps' [B, K+1, T]. A
        prompt whose negative must not be used has no valid response.
      beta: KL strength on the samples, > 0.
      alpha: KL strength on the negative, > 0.

    Returns:
      [B] values in nats, 0 without a sample, and metrics 'accuracy' (share of prompts with
      h > 0, ties count half), 'margin' (h), 'log_ratio_samples' (mean over the samples)
      and 'log_ratio_negative' (nats).

    Raises:
      ValueError: a single response per prompt.
    """
    lists.check(batch, "d2o compares", "the samples first and the negative last")
    after = jnp.cumsum(batch.valid[:, ::-1], -1)[:, ::-1]  # valid ones from here on
    negative = batch.valid & (after == 1)
    sample = batch.valid & (after > 1)
    from_harmful = (policy.logps - batch.extra["harmful_logps"]).sum(-1)
    from_helpful = (policy.logps - batch.extra["helpful_logps"]).sum(-1)
    own = masked.response_mean(from_harmful, sample)
    human = jnp.where(negative, from_helpful, 0.0).sum(-1)
    margin = beta * own - alpha * human
    return jnp.where(sample.any(-1), -jax.nn.log_sigmoid(margin), 0.0), {
        "accuracy": masked.accuracy(margin),
        "margin": margin,
        "log_ratio_samples": own,
        "log_ratio_negative": human,
    }
