"""Guide models: LMs that a guide evaluates beside the target, with a KV cache each.

The target and its guide models have one tokenizer. Their tables may be padded to different
sizes: an id that one of them lacks is never drawn under the guide.
"""

from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from alignax import logprob, value_heads
from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling.guides import Guide, by_position


def find(lms: dict[str, LM], *names: str, value_head: bool = False) -> tuple[LM, ...]:
    """LMs of one tokenizer, limited to the ids that all of them have.

    Args:
      lms: by name.
      names: those to return.
      value_head: whether they need a scalar value head.

    Raises:
      ValueError: a name that `lms` does not have, an LM of another tokenizer than the
        run's, or no value head.
    """
    for name in names:
        if name not in lms:
            raise ValueError(f"no LM {name!r}; there are {sorted(lms)}")
        if value_head and not lms[name].config.value_head:
            raise ValueError(f"LM {name!r} has no scalar head (value_head=True)")
        logprob.check_tokenizer(lms[name], name)
    common = min(lms[name].config.vocab_size for name in names)
    return tuple(transformer.limit_ids(lms[name], common) for name in names)


def init(models: tuple[LM, ...], tokens, lengths, length: int) -> Any:
    """`Guide.init`: the KV caches of the models after the prefill."""
    del lengths  # padding is never attended
    rows = tokens.shape[0]
    return tuple(
        transformer.hidden(
            lm, tokens, cache=transformer.init_cache(lm.config, rows, length)
        )[1]
        for lm in models
    )


def read(models: tuple[LM, ...], caches, tokens, start) -> tuple[list[Array], Any]:
    """Hidden states [N, K, D] after each token of a block, and the caches."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    states, after = [], []
    for lm, cache in zip(models, caches, strict=True):
        h, cache = transformer.hidden(lm, tokens, positions, cache=cache)
        states.append(h)
        after.append(cache)
    return states, tuple(after)


def rows(
    models: tuple[LM, ...], caches, tokens, start, logits: Float[Array, "N K V"]
) -> tuple[Float[Array, "N K V"], list[Array], Any]:
    """Log-probabilities of the next token under each of the models.

    Args:
      models: from `find`.
      caches: of theirs.
      tokens: [N, K].
      start: position of the first, [N].
      logits: of the target.

    Returns:
      (the target's logits, -inf on ids that the models lack; log-probabilities
      [N, K, V] of each model in nats, 0 on these ids; the caches).
    """
    size = logits.shape[-1]
    states, after = read(models, caches, tokens, start)
    found = [on_ids(lm, h, size) for lm, h in zip(models, states, strict=True)]
    common = min(lm.config.vocab_size for lm in models)
    if common < size:
        logits = jnp.where(jnp.arange(size) < common, logits, -jnp.inf)
    return logits, found, after


def on_ids(lm: LM, h: Float[Array, "N K D"], size: int) -> Float[Array, "N K V"]:
    """Log-probabilities in nats of the first `size` ids; 0 on those that it lacks."""
    logps = logprob.rows(transformer.limit_ids(lm, size), h)
    return jnp.pad(logps, ((0, 0), (0, 0), (0, size - logps.shape[-1])))


def value(lm: LM, h: Float[Array, "N K D"]) -> Float[Array, "N K"]:
    """The scalar value head, in float32, as in the kernel."""
    kernel = lm.params["value_head"]["kernel"].astype(jnp.float32)
    return jnp.einsum("nkd,d->nk", h.astype(jnp.float32), kernel, precision="highest")


def of_values(
    lm: LM, scale: float, *, centre: float = 0.0, radius: float = float("inf")
) -> Guide:
    """A scalar guide: g = scale V of every prefix, V the squashed head of `lm`.

    Args:
      lm: has a scalar head.
      scale: nats per unit of value; any sign.
      centre, radius: of `value_heads.squash`; g is bounded if the radius is finite.
    """
    ends = [scale * (centre + side * radius) if scale else 0.0 for side in (-1, 1)]
    numbers = tuple(map(jnp.float32, (scale, centre, radius)))
    return Guide(
        Partial(init, (lm,)), Partial(_values, (lm,), numbers), kind="scalar",
        lo=min(ends), hi=max(ends), keep=by_position,
    )  # fmt: skip


def _values(models, numbers, caches, tokens, start, logits):
    del logits  # a scalar guide depends on prefixes alone
    scale, centre, radius = numbers
    (h,), after = read(models, caches, tokens, start)
    return scale * value_heads.squash(value(models[0], h), centre, radius), after
