"""Contrastive decoding: tokens that a weak model also finds likely are penalised.

  π*(v | s) ∝ p(v | s)^{1+b} / p_amateur(v | s)^b   where p(v | s) >= a max p(· | s)

Li et al. 2022, https://arxiv.org/abs/2210.15097 (the best token by the ratio alone, the
limit b → ∞); with an exponent O'Brien and Lewis 2023, https://arxiv.org/abs/2309.09117;
with the amateur as the draft, Yuan et al. 2023, https://arxiv.org/abs/2311.08981.

Differs from the papers: p is the target after all logits processors, temperature included.
Yuan et al. reuse the logits of the draft; here the amateur is called again per block.
"""

import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.batch import LM
from alignax.sampling import guide_models
from alignax.sampling.guides import Guide, by_position

RANGES = {
    "weight": "[0, inf)",
    "plausible": "[0, 1]",
    "amateur_temperature": "(0, inf)",
}


def guide(
    lms: dict[str, LM],
    *,
    amateur: str = "amateur",
    weight: float = 0.5,
    plausible: float = 0.1,
    amateur_temperature: float = 1.0,
) -> Guide:
    """An *exact* vector guide: weight (log p - log p_amateur), -inf on the implausible.

    Args:
      lms: has the amateur, whose ids are the target's.
      amateur: its name; it is also the draft to speculate with. In a config 'layers:K' is
        the first K layers of the model itself, with its last norm and head (Chuang et al.
        2023, https://arxiv.org/abs/2309.03883, who choose K anew for every token). 'target',
        with generate.guide_prompt, is the model on another prompt.
      weight: b; 0 only removes implausible tokens.
      plausible: a, least share of the best token's probability.
      amateur_temperature: of p_amateur; above 1 fewer tokens are penalised.

    Returns:
      A Guide whose state is the KV cache of the amateur.

    Raises:
      ValueError: a name that `lms` does not have.
    """
    models = guide_models.find(lms, amateur)
    numbers = tuple(map(jnp.float32, (weight, plausible, amateur_temperature)))
    return Guide(
        Partial(guide_models.init, models),
        Partial(_update, models, numbers),
        keep=by_position,
    )


def _update(models, numbers, caches, tokens, start, logits):
    weight, plausible, temperature = numbers
    logits, (amateur,), after = guide_models.rows(models, caches, tokens, start, logits)
    keep = logits >= logits.max(-1, keepdims=True) + jnp.log(plausible)
    # the normaliser of either distribution is the same for all tokens
    tilted = (1 + weight) * logits - weight * amateur / temperature
    return jnp.where(keep, tilted, -jnp.inf), after
