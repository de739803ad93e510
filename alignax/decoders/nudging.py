"""Nudging: a small aligned model gives the tokens where a large base is unsure.

  π*(v | s) = p_base(v | s)    if max p_base(· | s) >= γ
              p_nudge(v | s)   otherwise

Fei et al. 2024, https://arxiv.org/abs/2410.09300 (γ = 0.4, greedy). The base is the target.

Speculation with the nudging model as draft accepts every draft where the base is unsure,
and a share 1 - TV(p_base, p_nudge) where it is sure, with one call of the base per round.

Differs from the paper: token by token, for models that share a vocabulary. In the paper the
models exchange whole words, as text, and the first is always the nudging model's.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.batch import LM
from alignax.sampling import guide_models
from alignax.sampling.guides import Guide, by_position

RANGES = {"gamma": "[0, inf)", "nudge_temperature": "(0, inf)"}


def guide(
    lms: dict[str, LM],
    *,
    nudge: str = "nudge",
    gamma: float = 0.4,
    nudge_temperature: float = 1.0,
) -> Guide:
    """An *exact* vector guide: its logits replace the target's where that is unsure.

    *Exact*: the distribution above. The base's probabilities are after all logits
    processors: the temperature changes how sure it is, and tokens that they exclude are
    excluded for the nudging model too.

    Args:
      lms: has the nudging model, whose ids are the target's.
      nudge: its name; it is also the draft to speculate with.
      gamma: γ; 0 is the target alone, anything above 1 the nudging model alone.
      nudge_temperature: of the nudging model; the same as of the call, if its drafts are to
        be accepted where it nudges.

    Returns:
      A Guide whose state is the KV cache of the nudging model.

    Raises:
      ValueError: a name that `lms` does not have.
    """
    models = guide_models.find(lms, nudge)
    numbers = tuple(map(jnp.float32, (gamma, nudge_temperature)))
    return Guide(
        Partial(guide_models.init, models),
        Partial(_update, models, numbers),
        keep=by_position,
    )


def _update(models, numbers, caches, tokens, start, logits):
    gamma, temperature = numbers
    logits, (nudge,), after = guide_models.rows(models, caches, tokens, start, logits)
    nudge = jnp.where(jnp.isneginf(logits), -jnp.inf, nudge / temperature)
    sure = jax.nn.softmax(logits).max(-1, keepdims=True) >= gamma
    return jnp.where(sure, logits, nudge), after
