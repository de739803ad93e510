"""Proxy tuning: a large model tilted by the difference that tuning made to a small one.

  π*(v | s) ∝ p(v | s) (π_expert(v | s) / π_base(v | s))^weight

Liu et al. 2024, https://arxiv.org/abs/2401.08565; the same law is the emulated
fine-tuning of Mitchell et al. 2023, https://arxiv.org/abs/2310.12962, and, with the target
its own base and a weight below or above 1, the realignment of Liu et al. 2024,
https://arxiv.org/abs/2402.02992. The tilt is the implicit reward of a policy and its
reference, over beta: both models are what DPO leaves behind.

Differs from the paper: log-probabilities are subtracted, not logits, which is the same law.
"""

import jax.numpy as jnp
from jax.tree_util import Partial

from alignax import logprob
from alignax.batch import LM
from alignax.guides import Guide, by_position
from alignax.models import transformer


def guide(
    lms: dict[str, LM],
    *,
    expert: str = "policy",
    base: str = "ref",
    weight: float = 1.0,
) -> Guide:
    """An *exact* vector guide: g = weight (log π_expert - log π_base).

    Args:
      lms: has both models; they share the target's vocabulary.
      expert: name of the tuned one, which is also the draft to speculate with.
      base: name of what it was tuned from.
      weight: 1 is proxy tuning; 0 leaves the target alone.

    Returns:
      A Guide whose state is the caches of both models.

    Raises:
      ValueError: a name that `lms` does not have, or two vocabularies.
    """
    for name in (expert, base):
        if name not in lms:
            raise ValueError(f"no LM {name!r}; there are {sorted(lms)}")
    pair = lms[expert], lms[base]
    sizes = [lm.config.vocab_size for lm in pair]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{expert} and {base} have vocabularies of {sizes} tokens")
    return Guide(
        Partial(_init, pair),
        Partial(_update, pair, jnp.float32(weight)),
        keep=by_position,
    )


def _init(lms, tokens, lengths, length):
    del lengths  # of a prompt, padding is never attended
    rows = tokens.shape[0]
    return tuple(
        transformer.hidden(
            lm, tokens, cache=transformer.init_cache(lm.config, rows, length)
        )[1]
        for lm in lms
    )


def _update(lms, weight, caches, tokens, start, logits):
    size = lms[0].config.vocab_size
    if logits.shape[-1] != size:
        raise ValueError(
            f"the target has {logits.shape[-1]} tokens, the guide's models have {size}"
        )
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    rows, after = [], []
    for lm, cache in zip(lms, caches, strict=True):
        h, new = transformer.hidden(lm, tokens, positions, cache=cache)
        rows.append(logprob.rows(lm, h))
        after.append(new)
    return logits + weight * (rows[0] - rows[1]), tuple(after)
