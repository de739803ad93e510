"""How a sampler reads with its target: the prompts once, then what was drawn.

WHOLE reads prompts from their first token. `after` a prefix that all prompts begin with
reads what follows it. A method that changes how a prompt is read brings a Reader of its
own; guides, drafts and every setting of `generate` hold over it as over the model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Int

from alignax.batch import LM
from alignax.models import transformer
from alignax.models.transformer import Cache


class Reader(NamedTuple):
    """Two functions that are traced, and one that is not; a state has N or B in front.

    Attributes:
      begin: (lm, prompts [B, P], lengths [B], slots) -> (h [B, 1, D] after each prompt,
        a state with room for rows of so many tokens).
      step: (lm, state, tokens [N, K], positions [N, K]) -> (h [N, K, D], the state with
        the tokens in it). Positions are places in the row; one may be written again.
      check: (prompts, lengths) raises ValueError for prompts that it cannot read.
    """

    begin: Callable[..., Any]
    step: Callable[..., Any]
    check: Callable[..., None] = lambda prompts, lengths: None


def traced(reader: Reader) -> tuple[Partial, Partial]:
    """begin and step as arguments for a compiled function."""
    begin, step = (
        f if isinstance(f, Partial) else Partial(f) for f in (reader.begin, reader.step)
    )
    return begin, step


def last(h: Array, at: Array) -> Array:
    """[B, 1, D] of h [B, T, D] at place `at` [B]."""
    return jnp.take_along_axis(h, at[:, None, None], 1)


def _begin(lm: LM, prompts, lengths, slots: int):
    empty = transformer.init_cache(lm.config, len(prompts), slots)
    h, cache = transformer.hidden(lm, prompts, cache=empty)
    return last(h, lengths - 1), cache


def _step(lm: LM, cache: Cache, tokens, positions):
    return transformer.hidden(lm, tokens, positions, cache=cache)


WHOLE = Reader(Partial(_begin), Partial(_step))


def common(prompts: Sequence[Sequence[int]]) -> int:
    """How many ids all prompts begin with; each keeps at least one of its own."""
    if not len(prompts):
        return 0
    rows = sorted(map(tuple, prompts))  # the first and the last differ first
    most = min(map(len, rows)) - 1
    same = [a == b for a, b in zip(rows[0], rows[-1], strict=False)]
    return min(most, [*same, False].index(False))


def after(lm: LM, ids: Sequence[int] | Int[np.ndarray, " S"]) -> Reader:
    """Reads a prefix now, for prompts that begin with it. *Exact*, up to rounding.

    Args:
      lm: the one that will read the rest.
      ids: the prefix.

    Returns:
      Reader, which refuses a prompt that does not begin with the prefix or has nothing
      behind it: as text it may be cut into other tokens than the beginning of a longer
      one.

    Raises:
      ValueError: no ids.
    """
    if not len(ids):
        raise ValueError("the prefix is empty; WHOLE reads whole prompts")
    size, known = len(ids), np.asarray(ids, np.int32)

    def check(prompts, lengths):
        for i, (row, n) in enumerate(zip(prompts, lengths, strict=True)):
            same = [*(row[: min(n, size)] == known[:n]), False]
            if n <= size or not all(same[:size]):
                raise ValueError(
                    f"prompt {i} has {n} tokens and parts from the prefix of {size} at "
                    f"token {same.index(False)}"
                )

    return Reader(Partial(_after, _read(lm, jnp.asarray(known))), WHOLE.step, check)


@jax.jit
def _read(lm: LM, ids: Int[Array, " S"]) -> Cache:
    empty = transformer.init_cache(lm.config, 1, len(ids))
    cache = transformer.hidden(lm, ids[None], cache=empty)[1]
    assert cache is not None
    return cache


def _after(prefix: Cache, lm: LM, prompts, lengths, slots: int):
    rows, size = len(prompts), prefix.k[0].shape[1]

    def widen(x: Any) -> Any:
        x = jnp.pad(x, ((0, 0), (0, slots - size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.repeat(x, rows, 0)

    rest = prompts[:, size:]
    positions = jnp.broadcast_to(size + jnp.arange(rest.shape[1]), rest.shape)
    h, cache = _step(lm, jax.tree.map(widen, prefix), rest, positions)
    return last(h, lengths - 1 - size), cache
