"""Sharding: the mesh, the table of parameter specs, and the spec of a batch.

The policy, the reference and every frozen LM use the same table. It also covers the
optimiser state, since optax keeps the parameters' names at the end of its paths.
"""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignax.models import int8, lora, transformer

# ns_coeffs are constants in the state of Muon
PARAM_RULES = (*transformer.PARAM_RULES, *lora.PARAM_RULES, ("ns_coeffs$", P()))
AXES = ("data", "fsdp", "model")
BATCH = P(("data", "fsdp"))  # shards B; a group G is never split
LAYOUTS = ("packed", "grouped", "rows")  # what config.layout may be
log = logging.getLogger(__name__)


def make_mesh(shape: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first prod(shape) devices, axes ('data', 'fsdp', 'model').

    Args:
      shape: three sizes; one may be -1 and takes what is left.
      devices: all by default; `preflight` passes those of a described slice.

    Raises:
      ValueError: not three sizes, or more devices asked for than there are.
    """
    shape = list(shape)
    devices = jax.devices() if devices is None else list(devices)
    if len(shape) != 3 or shape.count(-1) > 1 or any(s < 1 and s != -1 for s in shape):
        raise ValueError(
            f"mesh shape {tuple(shape)} should be three sizes for {AXES}, one may be -1"
        )
    if -1 in shape:
        rest = -math.prod(shape)
        if len(devices) % rest:
            raise ValueError(
                f"mesh shape {tuple(shape)}: {rest} does not divide {len(devices)} devices"
            )
        shape[shape.index(-1)] = len(devices) // rest
    size = math.prod(shape)
    if size > len(devices):
        raise ValueError(
            f"mesh shape {tuple(shape)} needs {size} devices, there are {len(devices)}"
        )
    return jax.make_mesh(
        tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size]
    )


def path_string(path) -> str:
    """'blocks/attn/q/kernel' from a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules=PARAM_RULES) -> P:
    """The spec of one leaf: the first rule whose pattern its path matches.

    An axis that does not divide is replicated, with one logged line.

    Raises:
      ValueError: no rule matches; the path is named.
    """
    if not shape or math.prod(shape) == 1:
        return P()
    rule = next((rule for pattern, rule in rules if re.search(pattern, path)), None)
    if rule is None:
        raise ValueError(
            f"no sharding rule matches {path!r} {shape}; add one to PARAM_RULES"
        )
    if len(rule) > len(shape):  # a factored optimiser's statistics: small, replicated
        return P()
    axes = []
    for size, axis in zip(shape, rule, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            log.info(
                "%s: %d does not divide over %s=%d; replicated",
                path,
                size,
                axis,
                mesh.shape[axis],
            )
            axis = None
        axes.append(axis)
    return P(*axes)


def shardings(tree, mesh: Mesh, rules=PARAM_RULES):
    """A NamedSharding for every leaf of a tree of parameters or optimiser state."""

    def one(path, leaf):
        return NamedSharding(mesh, spec(path_string(path), np.shape(leaf), mesh, rules))

    return jax.tree_util.tree_map_with_path(one, tree)


def put_batch(batch, mesh: Mesh):
    """Puts this host's rows on the devices, B split over ('data', 'fsdp')."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def put_params(params, mesh: Mesh, dtype=None, *, donate: bool = False):
    """Places a parameter tree by the rule table; always a fresh copy, safe to donate.

    Weak types become strong: a step returns strong types, and would compile twice.

    Args:
      params: on host or device.
      mesh: from `make_mesh`.
      dtype: of the copy where it is wider than that of `params`; None keeps theirs.
      donate: whether the copy takes the memory of `params`, which are gone then; for
        what `placed` gave.
    """
    place = jax.jit(
        lambda tree: jax.tree.map(lambda x: x + jnp.zeros((), dtype or x.dtype), tree),
        out_shardings=shardings(params, mesh),
        donate_argnums=0 if donate else (),
    )
    return place(params)


def placed(params, mesh: Mesh):
    """A parameter tree placed by the rule table, without a copy of what is there already."""
    leaves, tree = jax.tree.flatten(params)
    wanted = jax.tree.leaves(shardings(params, mesh))
    others = [i for i, x in enumerate(leaves) if not _is_placed(x, wanted[i])]
    if others:
        place = jax.jit(
            lambda xs: [x + jnp.zeros((), x.dtype) for x in xs],
            out_shardings=[wanted[i] for i in others],
        )
        for i, x in zip(others, place([leaves[i] for i in others]), strict=True):
            leaves[i] = x
    return jax.tree.unflatten(tree, leaves)


def quantized(params, mesh: Mesh):
    """A frozen tree on the mesh in int8, from one that is anywhere; see `int8.quantize`.

    Both are on the devices at the end of it.
    """
    shapes = jax.eval_shape(int8.quantize, params)
    return jax.jit(int8.quantize, out_shardings=shardings(shapes, mesh))(params)


def is_placed(params, mesh: Mesh) -> bool:
    """Whether `placed` would copy nothing."""
    wanted = shardings(params, mesh)
    return all(map(_is_placed, jax.tree.leaves(params), jax.tree.leaves(wanted)))


def _is_placed(x, wanted: NamedSharding) -> bool:
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return known and not x.weak_type and x.committed and x.sharding == wanted


def num_shards(mesh: Mesh) -> int:
    """Parts that B is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def grid(layout: str, accumulate: int, mesh: Mesh) -> tuple[int, int] | None:
    """(shards, micro-batches) that batches are packed for; None for one row per response.

    Args:
      layout: of the config, one of LAYOUTS.
      accumulate: micro-batches.
      mesh: devices of the run.

    Raises:
      ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"config.layout is {layout!r}, expected one of {LAYOUTS}")
    return None if layout == "rows" else (num_shards(mesh), accumulate)


def check_hosts(mesh: Mesh) -> None:
    """Raises ValueError if the hosts cannot feed this mesh; logs devices that are unused."""
    hosts, devices = jax.process_count(), len(jax.devices())
    shards = num_shards(mesh)
    if hosts > 1 and (mesh.size != devices or shards % hosts):
        raise ValueError(
            f"mesh {dict(mesh.shape)} on {hosts} hosts: it must use all {devices} devices, "
            f"and data*fsdp={shards} must be a multiple of {hosts}, so that each host "
            "feeds rows of its own"
        )
    if mesh.size < devices:
        log.warning("the mesh uses %d of %d devices", mesh.size, devices)


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ValueError if a step's prompts do not divide over micro-batches and mesh."""
    shards = num_shards(mesh)
    if batch_size % (shards * accumulate):
        raise ValueError(
            f"batch_size={batch_size} does not divide over accumulate={accumulate} x "
            f"data*fsdp={shards}; use a multiple of {shards * accumulate}"
        )
