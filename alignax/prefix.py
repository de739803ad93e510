"""A prefix that many prompts share, read once: its keys and values, and what follows it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignax.batch import LM
from alignax.models import transformer
from alignax.models.transformer import Cache


class Prefix(NamedTuple):
    """S tokens in front of every prompt."""

    ids: Int[Array, " S"]
    cache: Cache  # of one row and S slots


def common(prompts: Sequence[Sequence[int]]) -> int:
    """How many ids all prompts begin with; each keeps at least one of its own."""
    if not len(prompts):
        return 0
    rows = sorted(map(tuple, prompts))  # the first and the last differ first
    most = min(map(len, rows)) - 1
    same = [a == b for a, b in zip(rows[0], rows[-1], strict=False)]
    return min(most, [*same, False].index(False))


@jax.jit
def compute(lm: LM, ids: Int[Array, " S"]) -> Prefix:
    """Reads a prefix, for every call that follows."""
    empty = transformer.init_cache(lm.config, 1, ids.shape[0])
    cache = transformer.hidden(lm, ids[None], cache=empty)[1]
    assert cache is not None
    return Prefix(ids, cache)


def read(
    lm: LM, prefix: Prefix, rest: Int[Array, "B R"], length: int
) -> tuple[Float[Array, "B R D"], Cache]:
    """Reads what follows the prefix in B prompts. *Exact*: as reading both, but for rounding.

    Args:
      lm: whose prefix it is.
      prefix: from `compute`.
      rest: ids after the prefix, right-padded.
      length: slots of the cache; S + R at least.

    Returns:
      Hidden states after each of `rest`, and the cache [B, length] of prefix and rest.

    Raises:
      ValueError: a cache that is too short.
    """
    rows, many = rest.shape
    size = len(prefix.ids)
    if size + many > length:
        raise ValueError(
            f"length={length} is too short for {size} tokens and {many} after them"
        )

    def widen(x: Any) -> Any:
        x = jnp.pad(x, ((0, 0), (0, length - size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.repeat(x, rows, 0)

    cache = jax.tree.map(widen, prefix.cache)
    positions = jnp.broadcast_to(size + jnp.arange(many), rest.shape)
    h, cache = transformer.hidden(lm, rest, positions, cache=cache)
    assert cache is not None
    return h, cache


def split(prompts: Sequence[Sequence[int]], prefix: Sequence[int]) -> list[list[int]]:
    """What each prompt has after the prefix.

    Raises:
      ValueError: a prompt that does not begin with it, or has nothing after it: the text
        of a prefix may be cut into other tokens than the beginning of a longer one.
    """
    n = len(prefix)
    out = []
    for i, ids in enumerate(prompts):
        if list(ids[:n]) != list(prefix) or len(ids) <= n:
            same = [a == b for a, b in zip(ids, prefix, strict=False)]
            at = [*same, False].index(False)
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens and parts from the prefix of {n} at "
                f"token {at}"
            )
        out.append(list(ids[n:]))
    return out
