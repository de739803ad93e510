"""Generation settings of a call, checked on the host and converted to arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from alignax.sampling import guides
from alignax.sampling.automaton import Automaton
from alignax.sampling.prefill import WHOLE, Reader
from alignax.sampling.processors import Processors
from alignax.sampling.response_state import Rules


class Request(NamedTuple):
    """B prompts, the generation settings of their N = B x G rows, and their seeds."""

    prompts: Array  # [B, P], prefill included
    lengths: Array  # [B]
    rules: Rules
    seeds: Array | None  # [B]


def parse(
    prompts,
    lengths,
    size: int,
    *,
    max_new: int,
    group: int,
    temperature: Any = 1.0,
    eos_ids: Sequence[int] = (),
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    repetition_penalty: Any = None,
    frequency_penalty: Any = None,
    presence_penalty: Any = None,
    logit_bias: Any = None,
    min_new: Any = None,
    limits: Any = None,
    stops: Automaton | None = None,
    grammar: Automaton | None = None,
    prefill: Any = None,
    prefill_lengths: Any = None,
    forced: Any = None,
    seeds: Any = None,
    reader: Reader = WHOLE,
) -> Request:
    """The settings of `decode.generate`, where each of them is described.

    Args:
      prompts: ids [B, P].
      lengths: [B].
      size: of the vocabulary.
      max_new: most tokens of a response.
      group: G.
      temperature: this and all others as in `generate`.

    Raises:
      ValueError: an argument out of its range, or prompts that the reader refuses.
    """
    if max_new < 1 or group < 1:
        raise ValueError(
            f"max_new={max_new}, group={group}; expected max_new >= 1, group >= 1"
        )
    prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths)
    known = check_prompts(prompts, lengths)
    b = len(prompts)
    if prefill is not None:
        prompts, lengths = prefilled(prompts, lengths, prefill, prefill_lengths)
    if known:
        reader.check(np.asarray(prompts), np.asarray(lengths))
    for name, table in (("stops", stops), ("grammar", grammar)):
        if table is not None and table.next.shape[1] != size:
            raise ValueError(
                f"{name} is over {table.next.shape[1]} tokens, expected "
                f"vocab_size={size}"
            )

    def row(name, value, low, high: float = np.inf, dtype: Any = np.float32):
        if value is None:
            return None
        return per_row(name, value, b, group, low, high, dtype)

    tiny = np.finfo(np.float32).tiny
    temperatures = row("temperature", temperature, 0)
    assert temperatures is not None
    if np.ndim(temperature) == 0:
        temperatures = jnp.float32(temperature)
    processors = Processors(
        temperatures,
        row("repetition_penalty", repetition_penalty, tiny),
        row("frequency_penalty", frequency_penalty, -np.inf),
        row("presence_penalty", presence_penalty, -np.inf),
        bias(logit_bias, b, group, size),
        row("top_k", top_k, 0, dtype=np.int32),
        row("top_p", top_p, tiny, 1),
        row("min_p", min_p, 0, 1),
    )
    if not all(0 <= token < size for token in eos_ids):
        raise ValueError(f"eos_ids are {list(eos_ids)}, expected ids 0..{size - 1}")
    rules = Rules(
        processors, jnp.asarray(sorted(eos_ids), jnp.int32),
        row("min_new", min_new, 0, max_new, np.int32),
        row("limits", limits, 1, max_new, np.int32),
        stops, grammar, forced_ids(forced, b, group, max_new, size),
    )  # fmt: skip
    rows = None if seeds is None else jnp.asarray(ids("seeds", seeds, (b,)))
    return Request(prompts, lengths, rules, rows)


def ragged(
    prompts: Sequence[Sequence[int]],
    *,
    smallest: int = 16,
    longest: int | None = None,
    shared: int = 0,
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, " B"]]:
    """Lists of ids as padded arrays; P - shared is a power of two, for few compilations.

    Args:
      prompts: ids, at least one each.
      smallest: P - shared is at least this.
      longest: a prompt may not be longer; None = no bound.
      shared: ids that all prompts begin with, of which the prefill is already done.

    Raises:
      ValueError: no prompt, an empty one, or one that is too long; says which.
    """
    sizes = [len(p) for p in prompts]
    if not sizes or not min(sizes):
        raise ValueError(f"prompts have {sizes} tokens, expected at least 1 each")
    if longest is not None and max(sizes) > longest:
        raise ValueError(
            f"prompt {int(np.argmax(sizes))} has {max(sizes)} tokens, expected at most "
            f"{longest}"
        )
    width = shared + max(smallest, 1 << (max(sizes) - shared - 1).bit_length())
    out = np.zeros((len(sizes), width), np.int32)
    for row, prompt in zip(out, prompts, strict=True):
        row[: len(prompt)] = prompt
    return out, np.array(sizes, np.int32)


def on_prompts(
    guide: guides.Guide | None, prompts: Any, lengths: Any, b: int, size: int
) -> guides.Guide | None:
    """The guide on its own prompts, where a call gives it any.

    Args:
      guide: of the call.
      prompts: ids [B, P], or None.
      lengths: [B]; None is P.
      b: B.
      size: of the vocabulary.

    Raises:
      ValueError: prompts without a guide, of another B, or with ids that do not exist.
    """
    if prompts is None:
        return guide
    if guide is None:
        raise ValueError("guide_prompts need a guide, which reads them")
    prompts = ids("guide_prompts", prompts, (b, None))
    if not ((prompts >= 0) & (prompts < size)).all():
        raise ValueError(
            f"guide_prompts have ids {prompts.min()}..{prompts.max()}, expected "
            f"0..{size - 1}"
        )
    lengths = np.full(b, prompts.shape[1]) if lengths is None else lengths
    lengths = jnp.asarray(ids("guide_lengths", lengths, (b,)), jnp.int32)
    check_prompts(jnp.asarray(prompts), lengths)
    return guides.reading(guide, jnp.asarray(prompts, jnp.int32), lengths)


def check_prompts(prompts: jax.Array, lengths: jax.Array) -> bool:
    """Raises ValueError for lengths out of range; False if their values are not known."""
    if isinstance(lengths, jax.core.Tracer) or not lengths.is_fully_addressable:
        return False
    sizes = np.asarray(lengths)
    if not ((sizes >= 1) & (sizes <= prompts.shape[1])).all():
        raise ValueError(
            f"lengths span {sizes.min()}..{sizes.max()}, expected 1..{prompts.shape[1]}: "
            "an empty prompt, or one longer than its row"
        )
    return True


def prefilled(
    prompts, lengths, prefill, prefill_lengths
) -> tuple[jax.Array, jax.Array]:
    """Prompts followed by the given beginning of the response."""
    b = len(prompts)
    prefill = ids("prefill", prefill, (b, None))
    many = prefill.shape[1]
    sizes = np.full(b, many) if prefill_lengths is None else np.asarray(prefill_lengths)
    if sizes.shape != (b,) or (sizes < 0).any() or (sizes > many).any():
        raise ValueError(f"prefill_lengths is {sizes}, expected [B={b}] in 0..{many}")
    return _behind(prompts, lengths, prefill, sizes)


@jax.jit
def _behind(prompts, lengths, prefill, sizes) -> tuple[jax.Array, jax.Array]:
    b, many = prefill.shape
    t = prompts.shape[1] + many
    at = jnp.arange(many)
    at = jnp.where(at < sizes[:, None], lengths[:, None] + at, t)
    wide = jnp.pad(prompts, ((0, 0), (0, many)))
    row = jnp.arange(b)[:, None]
    wide = wide.at[row, at].set(prefill.astype(prompts.dtype), mode="drop")
    return wide, lengths + sizes.astype(lengths.dtype)


def per_row(name: str, value, b: int, group: int, low, high, dtype) -> jax.Array:
    """One number, [B] or [B, G] as [N]."""
    value = np.asarray(value)
    if value.ndim == 1:
        value = value[:, None]
    if value.ndim > 2 or (value.ndim == 2 and value.shape not in ((b, 1), (b, group))):
        raise ValueError(
            f"{name} has shape {value.shape}, expected one number, [B={b}] or "
            f"[B, G={group}]"
        )
    if np.issubdtype(dtype, np.integer) and value.dtype.kind not in "iu":
        raise ValueError(f"{name} is {value.tolist()}, expected integers")
    if not ((value >= low) & (value <= high)).all():
        raise ValueError(f"{name} is {value.tolist()}, expected {low} to {high}")
    return jnp.asarray(np.broadcast_to(value, (b, group)).reshape(-1), dtype)


def ids(name: str, value, shape: tuple) -> np.ndarray:
    """Integers of this shape, in which None is any size."""
    value = np.asarray(value)
    fits = value.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits or value.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has shape {value.shape} and dtype {value.dtype}, expected integers "
            f"{shape}"
        )
    return value


def forced_ids(forced, b: int, group: int, max_new: int, v: int) -> jax.Array | None:
    """[B, F] ids or -1 as [N, F]."""
    if forced is None:
        return None
    forced = ids("forced", forced, (b, None))
    if (
        not 1 <= forced.shape[1] <= max_new
        or (forced < -1).any()
        or (forced >= v).any()
    ):
        raise ValueError(
            f"forced has {forced.shape[1]} places and ids {forced.min()}.."
            f"{forced.max()}, expected 1..max_new={max_new} places, ids -1..{v - 1}"
        )
    return jnp.repeat(jnp.asarray(forced), group, 0)


def bias(bias, b: int, group: int, v: int) -> jax.Array | None:
    """{id: nats}, [V] or [B, V] as [V] or [N, V]."""
    if bias is None:
        return None
    if isinstance(bias, Mapping):
        dense = np.zeros(v, np.float32)
        for token, nats in bias.items():
            if not 0 <= token < v:
                raise ValueError(f"logit_bias has id {token}, expected 0..{v - 1}")
            dense[token] = nats
        return jnp.asarray(dense)
    bias = np.asarray(bias, np.float32)
    if bias.shape not in ((v,), (b, v)):
        raise ValueError(
            f"logit_bias has shape {bias.shape}, expected [V={v}] or [B={b}, V={v}]"
        )
    return jnp.asarray(bias if bias.ndim == 1 else np.repeat(bias, group, 0))
