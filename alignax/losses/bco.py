"""Binary classifier optimisation: the implicit reward is the logit of a response's label.

  r = β Σ_t log π(y)/π_ref(y),   δ = ½ (mean of desirable r + mean of undesirable r)
  L = -log σ(r - δ) if y is desirable,   -w(x) log σ(δ - r) if it is not

δ is the shift at which this bound on the DPO loss is tightest. w(x) = p/(1 - p), p the
probability that a prompt like x comes from the desirable half, corrects for a distribution
of prompts that depends on the label.

Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656
Differs from the paper: responses of both labels share one mean, so a class is weighted by
its size. δ is half the sum of two running means, over earlier steps.
Differs from TRL: δ is an exponential mean that weighs both classes equally; there it is the
mean of all rewards since the start of the run. Its two means are part of the checkpoint.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("labelled",)
RANGES = {"beta": "(0, inf)"}
EMA = {"desirable": 0.0, "undesirable": 0.0}
COUPLED = True  # the running means are updated by class means over the whole step


def loss(
    policy: Scores,
    batch: Batch,
    *,
    ema: dict[str, Float[Array, ""]],
    beta: Number = 0.1,
) -> tuple[Float[Array, " B"], Metrics]:
    """Cross-entropy of the labels under σ(r - δ), mean over a prompt's responses.

    Args:
      policy: logps [B, G, T].
      batch: ref_logps [B, G, T], feedback [B, G] (> 0.5 is desirable), valid [B, G]. If
        `extra` has 'density_ratio' [B], it is w(x), clipped to [0.5, 10].
      ema: running means of the implicit reward, 'desirable' and 'undesirable'.
      beta: KL strength, > 0.

    Returns:
      [B] values in nats, and metrics 'accuracy' (share of responses on the right side of
      δ, ties count half), 'margin' (r - δ, negated for undesirable responses; means over
      a prompt's responses), 'shift' (δ), and scalars 'ema/desirable' and
      'ema/undesirable': the means over this batch, or the running mean if a class is absent.
    """
    reward = beta * masked.log_ratios(policy, batch)
    shift = (ema["desirable"] + ema["undesirable"]) / 2
    desirable = batch.feedback > 0.5
    margin = jnp.where(desirable, reward - shift, shift - reward)
    weight = jnp.ones_like(reward)
    if batch.extra and "density_ratio" in batch.extra:
        ratio = jnp.clip(batch.extra["density_ratio"], 0.5, 10.0)[:, None]
        weight = jnp.where(desirable, 1.0, ratio)

    def mean(x):
        return masked.response_mean(x, batch.valid)

    def observed(name, label):
        mine = batch.valid & label
        return jnp.where(mine.any(), masked.mean(reward, mine), ema[name])

    return mean(-weight * jax.nn.log_sigmoid(margin)), {
        "accuracy": mean(masked.accuracy(margin)),
        "margin": mean(margin),
        "shift": jnp.broadcast_to(shift, batch.valid.shape[:1]),
        "ema/desirable": observed("desirable", desirable),
        "ema/undesirable": observed("undesirable", ~desirable),
    }
