"""Proxy tuning: a large model, tilted by the change that tuning made to a small one.

  π*(v | s) ∝ p(v | s) (π_expert(v | s) / π_base(v | s))^weight

Liu et al. 2024, https://arxiv.org/abs/2401.08565; the same distribution is the emulated
fine-tuning of Mitchell et al. 2023, https://arxiv.org/abs/2310.12962, and, with the
target its own base and a weight below or above 1, the realignment of Liu et al. 2024,
https://arxiv.org/abs/2402.02992. The tilt is the implicit reward of a policy and its
reference, over beta: DPO yields both models.

Differs from the paper: log-probabilities are subtracted, not logits; the distribution
is the same.
"""

import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.batch import LM
from alignax.sampling import guide_models
from alignax.sampling.guides import Guide, by_position

RANGES = {"weight": "(-inf, inf)"}


def guide(
    lms: dict[str, LM],
    *,
    expert: str = "policy",
    base: str = "ref",
    weight: float = 1.0,
) -> Guide:
    """An *exact* vector guide: g = weight (log π_expert - log π_base).

    Args:
      lms: has both models; their ids are the target's.
      expert: name of the tuned one, which is also the draft to speculate with.
      base: name of what it was tuned from.
      weight: 1 is proxy tuning; 0 does not change the target.

    Returns:
      A Guide whose state is the KV caches of both models.

    Raises:
      ValueError: a name that `lms` does not have.
    """
    pair = guide_models.find(lms, expert, base)
    return Guide(
        Partial(guide_models.init, pair),
        Partial(_update, pair, jnp.float32(weight)),
        keep=by_position,
    )


def _update(pair, weight, caches, tokens, start, logits):
    logits, (tuned, plain), after = guide_models.rows(
        pair, caches, tokens, start, logits
    )
    return logits + weight * (tuned - plain), after
