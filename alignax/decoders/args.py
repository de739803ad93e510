"""ARGS: the reward of the text so far is added to the logits of the best few tokens.

  π*(v | s) ∝ p(v | s) e^{w r(s v)}   on the k best tokens v of p(· | s)

Khanov et al. 2024, https://arxiv.org/abs/2402.01694. k is `candidates` of the call (10
in the paper, with w = 1); its temperature decides between greedy and stochastic.

Differs from the paper: its temperature divides logit and reward, ours the logit alone,
because logits processors are applied before the guide. At temperature τ, weight = w / τ
gives the paper's distribution (w = 1, τ = 0.7 there: 1.43); greedy, weight = w. The
reward is the scalar head of an LM with the target's vocabulary, on token ids instead of
text.
"""

from alignax.batch import LM
from alignax.sampling import guide_models
from alignax.sampling.guides import Guide

RANGES = {"weight": "[0, inf)"}


def guide(lms: dict[str, LM], *, reward: str = "reward", weight: float = 1.0) -> Guide:
    """An *exact* scalar guide: g(s, v) = weight r(s v), on the best tokens.

    *Exact*: the distribution on the `candidates` best tokens; all others have
    probability 0.

    Args:
      lms: has the reward model, which shares the target's vocabulary.
      reward: its name; it has a scalar head, evaluated after every candidate.
      weight: nats per unit of reward.

    Returns:
      A Guide whose state is the KV cache of the reward model. It has no bounds.

    Raises:
      ValueError: a name that `lms` does not have, or an LM without a scalar head.
    """
    (model,) = guide_models.find(lms, reward, value_head=True)
    return guide_models.of_values(model, weight)
