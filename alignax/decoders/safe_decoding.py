"""SafeDecoding: the first tokens of a response are tilted towards a safer model.

  π*(v | s) ∝ max(p + α (p_expert - p), ε)(v | s)   on S(s), for the first m tokens

S is the intersection of the k best tokens of both models, at the smallest k that leaves at
least c of them.

Xu et al. 2024, https://arxiv.org/abs/2402.08983 (α = 3, m = 2, c = 5). If the first
words refuse a jailbreak, the rest of the response does too; it is the target's own.

Differs from the paper: p is the target after all logits processors, and tokens that these
exclude stay excluded. The released code is always greedy over the first m tokens; here the
temperature of the call decides. ε is its floor for negative values.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from alignax.batch import LM
from alignax.sampling import guide_models
from alignax.sampling.guides import Guide, by_position

FLOOR = 1e-8  # ε
RANGES = {
    "alpha": "[0, inf)", "first": "[0, inf)", "common": "[1, inf)",
    "expert_temperature": "(0, inf)",
}  # fmt: skip


def guide(
    lms: dict[str, LM],
    *,
    expert: str = "expert",
    alpha: float = 3.0,
    first: int = 2,
    common: int = 5,
    expert_temperature: float = 1.0,
) -> Guide:
    """An *exact* vector guide: the distribution above, which is that of the method.

    Args:
      lms: has the expert, whose ids are the target's.
      expert: its name; it is also a draft to speculate with.
      alpha: α; 0 is the target on S, 1 the expert on S.
      first: m, tokens of a response, after any prefill.
      common: c, fewest tokens of S.
      expert_temperature: of the expert; usually the temperature of the call.

    Returns:
      A Guide whose state is the KV cache of the expert and the lengths of the prompts.

    Raises:
      ValueError: a name that `lms` does not have.
    """
    models = guide_models.find(lms, expert)
    numbers = tuple(map(jnp.float32, (alpha, expert_temperature)))
    counts = tuple(map(jnp.int32, (first, common)))
    return Guide(
        Partial(_init, models),
        Partial(_update, models, numbers, counts),
        keep=by_position,
    )


def _init(models, tokens, lengths, length):
    return guide_models.init(models, tokens, lengths, length), lengths


def _update(models, numbers, counts, state, tokens, start, logits):
    alpha, temperature = numbers
    first, common = counts
    caches, lengths = state
    logits, (expert,), after = guide_models.rows(models, caches, tokens, start, logits)
    forbidden = jnp.isneginf(logits)
    expert = jnp.where(forbidden, -jnp.inf, expert / temperature)
    p, p_expert = jax.nn.softmax(logits), jax.nn.softmax(expert)
    moved = jnp.log(jnp.maximum(p + alpha * (p_expert - p), FLOOR))
    # a token is in the intersection at k if k is above its worse rank
    worse = jnp.maximum(_ranks(logits), _ranks(expert))
    last = jnp.minimum(common, logits.shape[-1]) - 1
    most = jnp.take(jnp.sort(worse, -1), last, -1)[..., None]
    moved = jnp.where((worse <= most) & ~forbidden, moved, -jnp.inf)
    position = start[:, None] + jnp.arange(tokens.shape[1])
    early = position + 1 - lengths[:, None] < first
    return jnp.where(early[..., None], moved, logits), (after, lengths)


def _ranks(x):
    """0 for the best; of equals the lower id ranks first."""
    return jnp.argsort(jnp.argsort(-x, -1, stable=True), -1)
