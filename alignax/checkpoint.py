"""Checkpoints: a thin module over Orbax.

A step holds three items: 'params', 'rest' (optimiser state, running means, average)
and 'meta' (JSON: model config, resolved config, data position, seed, the tree's shapes
and a checksum). A checkpoint that cannot be read back is named and the one before it
is used; a checkpoint of another model is an error, never a fallback.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from alignax.batch import LM
from alignax.models.transformer import ModelConfig
from alignax.sharding import path_string

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that does not fit what is asked of it."""


def manager(
    folder: str | Path, *, keep: int = 3, asynchronous: bool = True
) -> ocp.CheckpointManager:
    """Opens (or makes) a folder of checkpoints and keeps the newest `keep`."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=asynchronous,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def shapes(tree) -> dict[str, list]:
    """{path: [shape, dtype]} of a tree, as JSON."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(p): [list(x.shape), str(x.dtype)] for p, x in leaves}


@jax.jit
def checksum(tree):
    """A sum over the bits of every leaf (modulo 2^32): the same on every mesh."""

    def one(x):
        if x.dtype.itemsize == 4:
            return jax.lax.bitcast_convert_type(x, jnp.uint32).sum(dtype=jnp.uint32)
        if x.dtype.itemsize == 2:
            return jax.lax.bitcast_convert_type(x, jnp.uint16).sum(dtype=jnp.uint32)
        return x.astype(jnp.uint32).sum(dtype=jnp.uint32)

    # Position-dependent weights, so that two leaves that swap are noticed.
    leaves = jax.tree.leaves(tree)
    return sum(
        (one(x) * np.uint32(2 * i + 1) for i, x in enumerate(leaves)), np.uint32(0)
    )


def save(
    manager: ocp.CheckpointManager, state, *, model: ModelConfig, meta: dict[str, Any]
) -> None:
    """Saves a TrainState at its own step.

    Args:
      manager: from `manager`.
      state: a TrainState.
      model: the policy's config; `load_lm` needs nothing else.
      meta: JSON to keep beside it (data position, seed, resolved config).
    """
    rest = _rest(state)
    meta = {
        **meta,
        "model": dataclasses.asdict(model),
        "shapes": {"params": shapes(state.params), "rest": shapes(rest)},
        "checksum": int(checksum((state.params, rest))),
    }
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        rest=ocp.args.StandardSave(rest),
        meta=ocp.args.JsonSave(meta),
    )
    manager.save(int(state.step), args=args, force=True)


def restore(manager: ocp.CheckpointManager, state):
    """The newest checkpoint that reads back whole, in `state`'s shapes and shardings.

    Args:
      manager: from `manager`.
      state: a TrainState that shows shapes, dtypes and shardings.

    Returns:
      (TrainState, meta), or None if there is no checkpoint.

    Raises:
      CheckpointError: the checkpoint is of another model (the first difference is
        named), or checkpoints exist and none reads back.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    rest = _rest(state)
    for step in steps:
        try:
            meta = manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            ).meta
            saved = meta["shapes"]
        except Exception as error:
            log.warning(
                "checkpoint %d in %s does not read back: %s",
                step,
                manager.directory,
                _line(error),
            )
            continue
        _compare(saved["params"], shapes(state.params), manager.directory / str(step))
        _compare(saved["rest"], shapes(rest), manager.directory / str(step))
        try:
            args = ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(state.params)),
                rest=ocp.args.StandardRestore(_abstract(rest)),
            )
            got = manager.restore(step, args=args)
            if int(checksum((got.params, got.rest))) != meta["checksum"]:
                raise CheckpointError(
                    "its checksum differs from the one it was saved with"
                )
        except Exception as error:
            log.warning(
                "checkpoint %d in %s does not read back: %s",
                step,
                manager.directory,
                _line(error),
            )
            continue
        if step != steps[0]:
            log.warning("falling back to checkpoint %d in %s", step, manager.directory)
            for newer in [s for s in steps if s > step]:
                manager.delete(newer)  # the run will come to these steps again
        return state._replace(
            step=got.rest["step"], params=got.params, **_fields(got.rest)
        ), meta
    if steps:
        raise CheckpointError(
            f"none of the checkpoints {steps} in {manager.directory} reads back"
        )
    return None


def load_lm(folder: str | Path) -> LM:
    """The policy of the newest checkpoint that reads back in a run's folder.

    Raises:
      CheckpointError: the folder holds no checkpoint that reads back.
    """
    folder = Path(folder).absolute()
    for place in (folder, folder / "checkpoints"):
        if not place.is_dir():
            continue
        with manager(place, asynchronous=False) as read:
            for step in sorted(read.all_steps(), reverse=True):
                try:
                    names = ocp.args.Composite(
                        meta=ocp.args.JsonRestore(), params=ocp.args.StandardRestore()
                    )
                    got = read.restore(step, args=names)
                    fields = {k: _tuples(v) for k, v in got.meta["model"].items()}
                    return LM(
                        ModelConfig(**fields), jax.tree.map(np.asarray, got.params)
                    )
                except Exception as error:
                    log.warning(
                        "checkpoint %d in %s does not read back: %s",
                        step,
                        place,
                        _line(error),
                    )
    raise CheckpointError(f"no checkpoint that reads back in {folder}")


def _rest(state) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "ema": state.ema}
    return rest if state.average is None else {**rest, "average": state.average}


def _fields(rest) -> dict[str, Any]:
    return {k: v for k, v in rest.items() if k != "step"}


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def _compare(saved: dict[str, list], want: dict[str, list], where) -> None:
    for path in {**want, **saved}:
        if saved.get(path) != want.get(path):
            raise CheckpointError(
                f"checkpoint {where} is of another model or optimiser: {path} is "
                f"{saved.get(path, 'absent')} there and {want.get(path, 'absent')} here"
            )


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _line(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
            :300
        ]
    )
