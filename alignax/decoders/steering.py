"""Steering as a guide: the tilt from adding a vector to the hidden states.

  π*(v | s) ∝ p(v | s) (p(v | s; h + r u) / p(v | s; h))^weight

The same model is called twice, with u added to its residual stream after every layer and
without. If it is the target itself, without logits processors, and weight = 1, this is the
distribution of the steered model. As a guide it composes with other guides, drafts and
verification. `alignax.sampling.steering_vectors` estimates u from pairs of texts.

Zou et al. 2023, https://arxiv.org/abs/2310.01405; Wolf et al. 2024,
https://arxiv.org/abs/2401.16332
Differs from the papers: they steer the model, here steering defines a tilt; at a
temperature τ of the call the tilt is not divided by τ, unless weight = 1 / τ is given.
"""

from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling import guide_models, steering_vectors
from alignax.sampling.guides import Guide, by_position

RANGES = {"seed": "[0, inf)", "strength": "(-inf, inf)", "weight": "(-inf, inf)"}


def guide(
    lms: dict[str, LM],
    *,
    model: str = "target",
    vectors: Any = "random",
    strength: float = 1.0,
    layers: tuple[int, ...] = (),
    weight: float = 1.0,
    seed: int = 0,
) -> Guide:
    """An *exact* vector guide: weight (log p of the steered model - log p of the model).

    Args:
      lms: has the model that is steered, whose ids are the target's.
      model: its name.
      vectors: a path of [L, D] unit vectors as `numpy.save` writes them, the vectors, or
        'random': the control of any effect.
      strength: r, the norm of the vector that is added to each hidden state.
      layers: which are steered, negative ones from the end; () is all.
      weight: of the tilt; 0 does not change the target.
      seed: of random vectors.

    Returns:
      A Guide whose state is two KV caches, of the model steered and not.

    Raises:
      ValueError: a name that `lms` does not have, vectors of another shape, or a layer
        out of range.
    """
    models = guide_models.find(lms, model)
    push = strength * steering_vectors.load(vectors, *models, layers=layers, seed=seed)
    return Guide(
        Partial(_init, models, push),
        Partial(_update, models, push, jnp.float32(weight)),
        keep=by_position,
    )


def _init(models, push, tokens, lengths, length):
    plain = guide_models.init(models, tokens, lengths, length)
    cache = transformer.init_cache(models[0].config, len(tokens), length)
    steered = transformer.hidden(
        models[0], tokens, cache=cache, edit=steering_vectors.edit(push, 1.0)
    )[1]
    return *plain, steered


def _update(models, push, weight, caches, tokens, start, logits):
    plain, steered = caches
    logits, (before,), (plain,) = guide_models.rows(
        models, (plain,), tokens, start, logits
    )
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    h, steered = transformer.hidden(
        models[0],
        tokens,
        positions,
        cache=steered,
        edit=steering_vectors.edit(push, 1.0),
    )
    after = guide_models.on_ids(models[0], h, logits.shape[-1])
    return logits + weight * (after - before), (plain, steered)
