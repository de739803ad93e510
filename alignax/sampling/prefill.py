"""Prefill: how the target reads the prompts, and then the drawn tokens.

WHOLE does the prefill of whole prompts. `after` reuses the KV cache of a prefix that all
prompts begin with. A method that changes the prefill has a Reader of its own; guides,
drafts and every setting of `generate` work with any Reader.
"""

import dataclasses
import functools
import operator
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
    """Prefill and decoding step of a target; the first axis of a state is B or N.

    Attributes:
      begin: prefill, traced: (lm, prompts [B, P], lengths [B], slots) -> (h [B, 1, D] after
        each prompt, a state for rows of up to `slots` tokens).
      step: traced: (lm, state, tokens [N, K], positions [N, K]) -> (h [N, K, D], the state
        with the tokens). Positions are indices of the row; one may be written again.
      check: on the host: (prompts, lengths) raises ValueError for prompts that it refuses.
      check_lm: on the host: (lm) raises ValueError for a model that it refuses.
    """

    begin: Callable[..., Any]
    step: Callable[..., Any]
    check: Callable[..., None] = lambda prompts, lengths: None
    check_lm: Callable[[LM], None] = lambda lm: None


def traced(reader: Reader) -> tuple[Partial, Partial]:
    """begin and step as arguments for a compiled function."""
    begin, step = (
        f if isinstance(f, Partial) else Partial(f) for f in (reader.begin, reader.step)
    )
    return begin, step


def last(h: Array, at: Array) -> Array:
    """[B, 1, D] of h [B, T, D] at position `at` [B]."""
    return jnp.take_along_axis(h, at[:, None, None], 1)


def _begin(lm: LM, prompts, lengths, slots: int):
    empty = transformer.init_cache(lm.config, len(prompts), slots)
    h, cache = transformer.hidden(lm, prompts, cache=empty)
    return last(h, lengths - 1), cache


def _step(lm: LM, cache: Cache, tokens, positions):
    return transformer.hidden(lm, tokens, positions, cache=cache)


WHOLE = Reader(Partial(_begin), Partial(_step))


def common(prompts: Sequence[Sequence[int]]) -> int:
    """How many ids all prompts begin with; at least one id of each prompt is left."""
    if not len(prompts):
        return 0
    rows = sorted(
        map(tuple, prompts)
    )  # the first and the last have the shortest common prefix
    most = min(map(len, rows)) - 1
    same = [a == b for a, b in zip(rows[0], rows[-1], strict=False)]
    return min(most, [*same, False].index(False))


def after(lm: LM, ids: Sequence[int] | Int[np.ndarray, " S"]) -> Reader:
    """Prefill of a prefix now, for prompts that begin with it. *Exact*, up to rounding.

    Args:
      lm: the target.
      ids: the prefix.

    Returns:
      Reader. It refuses a prompt that does not begin with the prefix, or has nothing after
      it. A text may begin with the prefix as a string, but not as tokens. It also refuses
      a model other than `lm`, and keeps `lm` alive for that. The same arrays are accepted
      at once; copies of them cost one comparison of all weights in every call.

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

    return Reader(
        Partial(_after, _read(lm, jnp.asarray(known))), WHOLE.step, check,
        functools.partial(_same, lm),
    )  # fmt: skip


def _same(known: LM, lm: LM) -> None:
    """Raises ValueError unless the keys and values of `known` are those of `lm`.

    Whether an LM is traced is not known: it is accepted.
    """
    mine, theirs = jax.tree.leaves(known.params), jax.tree.leaves(lm.params)
    if any(isinstance(x, jax.core.Tracer) for x in (*mine, *theirs)):
        return
    configs = [dataclasses.replace(x.config, vocab_size=0) for x in (known, lm)]
    told = "the prefill was done with another model: "
    if configs[0] != configs[1]:  # `limit_ids` changes the number of ids alone
        fields = [dataclasses.asdict(c) for c in configs]
        other = [k for k in fields[0] if fields[0][k] != fields[1][k]]
        raise ValueError(
            told + f"the configs differ in {', '.join(other)}; call prefill.after again"
        )
    if len(mine) == len(theirs) and all(map(operator.is_, mine, theirs)):
        return
    gone = any(isinstance(x, jax.Array) and x.is_deleted() for x in mine)
    if gone or not _equal(known, lm):
        raise ValueError(told + "the weights differ; call prefill.after again")


def _equal(one: LM, other: LM) -> bool:
    """Whether two LMs of one config have equal weights, stacked or not."""
    forms = []
    for lm in (one, other):
        shapes = jax.eval_shape(transformer.unstack, lm).params
        found = jax.tree_util.tree_leaves_with_path(shapes)
        forms.append([(path, x.shape, x.dtype) for path, x in found])
    if forms[0] != forms[1]:
        return False
    try:
        return bool(_equal_values(one, other))
    except ValueError:  # on other devices: compared on the host
        one, other = jax.device_get((one, other))
        return bool(_equal_values(one, other))


@jax.jit
def _equal_values(one: LM, other: LM) -> Array:
    leaves = (jax.tree.leaves(transformer.unstack(lm).params) for lm in (one, other))
    same = [(a == b).all() for a, b in zip(*leaves, strict=True)]
    return jnp.stack(same).all()


@jax.jit
def _read(lm: LM, ids: Int[Array, " S"]) -> Cache:
    empty = transformer.init_cache(lm.config, 1, len(ids))
    cache = transformer.hidden(lm, ids[None], cache=empty)[1]
    assert cache is not None
    return cache


def _after(prefix: Cache, lm: LM, prompts, lengths, slots: int):
    rows, size = len(prompts), prefix.k[0].shape[2]

    def widen(x: Any) -> Any:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, slots - size), (0, 0)))
        return jnp.repeat(x, rows, 0)

    rest = prompts[:, size:]
    positions = jnp.broadcast_to(size + jnp.arange(rest.shape[1]), rest.shape)
    h, cache = _step(lm, jax.tree.map(widen, prefix), rest, positions)
    return last(h, lengths - 1 - size), cache
