"""Checkpoints: a thin module over Orbax.

A step holds three items: 'params', 'rest' (optimiser state, running means, average)
and 'meta' (JSON: model config, resolved config, data position, seed, the tree's shapes,
a checksum and the version that wrote it). A committed step is never written again. A
checkpoint that cannot be read back is logged and the one before it is used; a checkpoint
of another model, or of a newer version, is an error, never a fallback.
"""

import contextlib
import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding

import alignax
from alignax.batch import LM, Params
from alignax.models.sharding import path_string, spec
from alignax.models.stored import expanded
from alignax.models.transformer import ModelConfig

# Raised when a checkpoint gets something that an earlier version cannot read.
FORMAT = 1
AVERAGE = "average:"  # in front of the path of a run: see `load_lm`
log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """No checkpoint can be read, or it belongs to another model or a newer version."""


class NoAverage(CheckpointError):
    """A checkpoint has no average of the parameters."""


class NewerVersion(CheckpointError):
    """A checkpoint that this version cannot read, since a newer one wrote it."""


def manager(
    folder, *, keep: int = 3, asynchronous: bool = True
) -> ocp.CheckpointManager:
    """Opens (or makes) a folder of checkpoints and keeps the newest `keep`."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_of_a_thread)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=asynchronous,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(absolute(folder), options=options)


def shapes(tree) -> dict[str, list]:
    """{path: [shape, dtype]} of a tree, as JSON."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(p): [list(x.shape), str(x.dtype)] for p, x in leaves}


@jax.jit
def checksum(tree):
    """A weighted sum of the bits of every leaf (modulo 2^32): the same on every mesh.

    The weight of an element depends on its place, so that a permutation changes the sum.
    """

    def one(x):
        whole: Any = {4: jnp.uint32, 2: jnp.uint16}.get(x.dtype.itemsize)
        bits = jax.lax.bitcast_convert_type(x, whole) if whole else x
        place, stride = jnp.uint32(1), 2
        for axis in reversed(range(x.ndim)):
            index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            place = place + index * np.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return (bits.astype(jnp.uint32) * place).sum(dtype=jnp.uint32)

    leaves = jax.tree.leaves(tree)
    return sum(
        (one(x) * np.uint32(2 * i + 1) for i, x in enumerate(leaves)), np.uint32(0)
    )


def fingerprint(params: Params) -> str:
    """The checksum of parameters as 8 hex digits: whether weights are the same."""
    return f"{int(checksum(params)):08x}"


def save(
    manager: ocp.CheckpointManager, state, *, model: ModelConfig, meta: dict[str, Any]
) -> None:
    """Saves a TrainState at its own step, unless that step is there already.

    A committed step that reads back is neither written again nor deleted: a kill in
    between would lose it.

    Args:
      manager: from `manager`.
      state: a TrainState.
      model: the policy's config; `load_lm` needs nothing else.
      meta: JSON to save with it (data position, seed, resolved config).
    """
    rest, step = _rest(state), int(state.step)
    sums = _sums(state.params, rest)
    if _committed(manager, step, sums):
        return
    meta = {
        **meta,
        "written_by": {"alignax": alignax.__version__, "format": FORMAT},
        "model": dataclasses.asdict(model),
        "shapes": {"params": shapes(state.params), "rest": shapes(rest)},
        "checksum": sums,
    }
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        rest=ocp.args.StandardSave(rest),
        meta=ocp.args.JsonSave(meta),
    )
    with _named(manager, step):
        manager.save(step, args=args, force=True)


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until what is being saved is on the disk.

    Raises:
      OSError: it could not be written.
    """
    with _named(manager, manager.latest_step()):
        manager.wait_until_finished()


def _not_of_a_thread(record: logging.LogRecord) -> bool:
    """Leaves out what is logged of a failed save in a thread, which `_named` raises anyway.

    It is several tracebacks long, and some of it comes after the error: asyncio logs the
    failed writes of one save that nobody waited for when the process ends.
    """
    message = str(record.msg)
    return not (
        "_SignalingThread.run() raised an exception" in message
        or ("Failed to run" in message and "Handler Commit operations" in message)
        or "Save Finalize thread" in message
        or ("was never retrieved" in message and "orbax-checkpoint" in message)
    )


def quiet_threads() -> None:
    """Leaves out what the writes of a failed save report when they end after it.

    A save whose first write failed closes its event loop; each other write then reports
    "Event loop is closed" from a thread, in the middle of what the program prints. Only a
    program may call this: it replaces `sys.unraisablehook`.
    """
    report = sys.unraisablehook

    def hook(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            report(event)

    sys.unraisablehook = hook


@contextlib.contextmanager
def _named(manager: ocp.CheckpointManager, step: int | None) -> Iterator[None]:
    """Names the checkpoint in an error of writing it, which may come from a thread."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(
            f"checkpoint {step} in {manager.directory} could not be saved: {_line(error)}"
        ) from error


def _committed(manager: ocp.CheckpointManager, step: int, sums: dict[str, int]) -> bool:
    """Whether a step is there and reads back; one that does not is set aside."""
    if step not in manager.all_steps():
        return False
    wait(manager)
    try:
        there = _meta(manager, step)["checksum"]
    except Exception as error:
        _unreadable(step, manager.directory, error)
        _set_aside(manager, [step])
        return False
    if not _same(there, sums):
        log.warning(
            "%s holds a step %d of other numbers: it is kept, and this one is not saved",
            manager.directory, step,
        )  # fmt: skip
    return True


def prune(manager: ocp.CheckpointManager, keep: int) -> None:
    """Deletes all but the newest `keep` steps, as a kill may have left half of an old one.

    Call it when the newest is known to read back.
    """
    for step in sorted(manager.all_steps())[:-keep]:
        manager.delete(step)


def records(manager: ocp.CheckpointManager) -> list[dict[str, Any]]:
    """The metas of the steps that read back, in the order of their steps."""
    found = []
    for step in sorted(manager.all_steps()):
        try:
            found.append({**_meta(manager, step), "step": step})
        except Exception as error:
            _unreadable(step, manager.directory, error)
    return found


def restore(manager: ocp.CheckpointManager, state):
    """The newest checkpoint that can be read, in `state`'s shapes and shardings.

    Args:
      manager: from `manager`.
      state: a TrainState with the shapes, dtypes and shardings to restore.

    Returns:
      (TrainState, meta), or None if there is no checkpoint.

    Raises:
      CheckpointError: the checkpoint is of another model (the first difference is
        named), or checkpoints exist and none can be read.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    rest = _rest(state)
    for step in steps:
        where = manager.directory / str(step)
        try:
            meta = _meta(manager, step)
            saved, sums = meta["shapes"], meta["checksum"]
        except Exception as error:
            _unreadable(step, manager.directory, error)
            continue
        _refuse_newer(meta, where)
        _compare(saved["params"], shapes(state.params), where)
        found = _abstract(rest, _narrower(saved["rest"], rest))
        _compare(saved["rest"], shapes(found), where)
        try:
            args = ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(state.params)),
                rest=ocp.args.StandardRestore(found),
            )
            got = manager.restore(step, args=args)
            if not _same(sums, _sums(got.params, got.rest)):
                raise CheckpointError("its checksum differs from the saved one")
        except Exception as error:
            _unreadable(step, manager.directory, error)
            continue
        if step != steps[0]:
            log.warning("falling back to checkpoint %d in %s", step, manager.directory)
            _set_aside(manager, [s for s in steps if s > step])
        whole = jax.tree.map(lambda x, want: x.astype(want.dtype), got.rest, rest)
        fields = {k: v for k, v in whole.items() if k != "step"}
        return state._replace(step=whole["step"], params=got.params, **fields), meta
    if steps:
        raise CheckpointError(
            f"none of the checkpoints {steps} in {manager.directory} reads back"
        )
    return None


def holds(folder) -> bool:
    """Whether a folder is that of a run, or its 'best' or 'checkpoints'."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        return False
    return (folder / "checkpoints").is_dir() or any(
        p.name.isdigit() for p in folder.iterdir()
    )


def load_lm(folder, *, average: bool = False, mesh: Mesh | None = None) -> LM:
    """The policy of the newest checkpoint that can be read.

    Args:
      folder: of a run (its 'checkpoints' are read), or a folder of checkpoints such as
        WORKDIR/best.
      average: with the average of the parameters that the run kept, instead of these.
      mesh: on which its parameters are placed; None reads them to the host.

    Raises:
      CheckpointError: the folder holds no checkpoint that can be read, one of a newer
        version, or one without an average.
    """
    folder = absolute(folder)
    inner = folder / "checkpoints"
    place = inner if inner.is_dir() else folder
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def on(path: str, shape: list[int]) -> jax.sharding.Sharding:
        """A sharding is given: the mesh that saved the parameters may not exist here."""
        return NamedSharding(mesh, spec(path, tuple(shape), mesh)) if mesh else host

    with _reader(place) as read:
        for step in sorted(read.all_steps(), reverse=True):
            try:
                meta = _meta(read, step)
                _refuse_newer(meta, place / str(step))
                target: dict[str, Any] = {}
                for path, (shape, dtype) in meta["shapes"]["params"].items():
                    if average:  # of float32, whatever the dtype of the parameters
                        own = meta["shapes"]["rest"].get(f"average/{path}")
                        dtype = own[1] if own else dtype
                    *parents, name = path.split("/")
                    node = functools.reduce(
                        lambda d, k: d.setdefault(k, {}), parents, target
                    )
                    node[name] = jax.ShapeDtypeStruct(
                        shape, dtype, sharding=on(path, shape)
                    )
                wanted = "average" if average else "params"
                if wanted not in meta["checksum"]:
                    raise NoAverage(
                        f"{place / str(step)} has no average of the parameters: its run "
                        "kept none, or an earlier version wrote it"
                    )
                if average:
                    params = _average(read, step, target)
                else:
                    args = ocp.args.Composite(params=ocp.args.StandardRestore(target))
                    params = read.restore(step, args=args).params
                if int(checksum(params)) != meta["checksum"][wanted]:
                    raise CheckpointError("its checksum differs from the saved one")
                fields = {k: _tuples(v) for k, v in meta["model"].items()}
                return LM(ModelConfig(**fields), params)
            except (NewerVersion, NoAverage):
                raise
            except Exception as error:
                _unreadable(step, place, error)
    raise CheckpointError(f"no checkpoint that reads back in {folder}")


def last_meta(folder) -> dict[str, Any]:
    """The meta of the newest checkpoint of a run that reads back, and its 'step'.

    Args:
      folder: of a run (its 'checkpoints' are read), or a folder of checkpoints.

    Returns:
      {} without one.
    """
    folder = absolute(folder)
    place = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if not place.is_dir():
        return {}
    with _reader(place) as manager:
        found = records(manager)
    return found[-1] if found else {}


def written_by(folder) -> str:
    """The version of alignax that wrote the newest checkpoint of a run; '' if unknown."""
    return last_meta(folder).get("written_by", {}).get("alignax", "")


def _reader(place: epath.Path) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints and changes nothing there."""
    # what read_only implies is set too: Orbax would warn that it sets it
    options = ocp.CheckpointManagerOptions(
        read_only=True, save_interval_steps=0, create=False
    )
    with _without_warning("Given directory is read only"):
        return ocp.CheckpointManager(place, options=options)


@contextlib.contextmanager
def _without_warning(start: str) -> Iterator[None]:
    """Drops the records of absl's log, which Orbax writes to, that begin with `start`."""
    logger = logging.getLogger("absl")

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(start)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _average(manager: ocp.CheckpointManager, step: int, target: Params) -> Params:
    """The average of the parameters, without the state of the optimiser beside it."""
    part = {"average": target}
    args = ocp.args.PyTreeRestore(
        part, restore_args=ocp.checkpoint_utils.construct_restore_args(part),
        partial_restore=True,
    )  # fmt: skip
    return manager.restore(step, args=ocp.args.Composite(rest=args)).rest["average"]


def absolute(path) -> epath.Path:
    """A local path made absolute, with the home folder for its ~; a remote one unchanged."""
    if "://" in str(path):
        return epath.Path(path)
    return epath.Path(expanded(path).absolute())


def _meta(manager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return manager.restore(step, args=args).meta


def _refuse_newer(meta: dict[str, Any], where) -> None:
    """Raises NewerVersion for a checkpoint with something that is unknown here."""
    by = meta.get("written_by", {"alignax": "an unknown version", "format": 0})
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(meta.get("model", {}).keys() - known)
    if by["format"] > FORMAT or unknown:
        fields = f", with the unknown fields {unknown} of its model" * bool(unknown)
        raise NewerVersion(
            f"checkpoint {where} was written by alignax {by['alignax']} (format "
            f"{by['format']}{fields}), and this is alignax {alignax.__version__} (format "
            f"{FORMAT}): go on with the newer version"
        )


def _set_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
    """Renames steps to folders beside that of the checkpoints; nothing is deleted."""
    for step in steps:
        name = f"{manager.directory.name}-{step}-unreadable-{time.time_ns()}"
        (manager.directory / str(step)).rename(manager.directory.parent / name)
    manager.reload()


def _unreadable(step: int, folder, error: Exception) -> None:
    log.warning(
        "checkpoint %d in %s does not read back: %s", step, folder, _line(error)
    )


def _line(error: Exception) -> str:
    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    # paths come first, and the cause last
    return line if len(line) <= 300 else f"{line[:140]} ... {line[-150:]}"


def _rest(state) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "ema": state.ema}
    return rest if state.average is None else {**rest, "average": state.average}


def _sums(params, rest) -> dict[str, int]:
    trees = {"params": params, "rest": rest}
    if "average" in rest:  # which can be read alone
        trees["average"] = rest["average"]
    return {name: int(checksum(tree)) for name, tree in trees.items()}


def _same(saved: dict[str, int], found: dict[str, int]) -> bool:
    """Whether two checksums agree; earlier versions saved none of the average."""
    return all(found.get(name) == value for name, value in saved.items())


def _abstract(tree, dtypes: Mapping[str, str] = MappingProxyType({})):
    """Shapes, dtypes and shardings of a tree; some of its leaves have another dtype."""

    def one(path, x):
        dtype = dtypes.get(path_string(path), x.dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def _narrower(saved: dict[str, list], tree) -> dict[str, str]:
    """{path: 'bfloat16'} of what is float32 in a tree and was bfloat16 when it was saved.

    Earlier versions kept second moments and averages in the dtype of the parameters.
    """
    pairs = ((path, saved.get(path), want) for path, want in shapes(tree).items())
    return {
        path: "bfloat16"
        for path, got, want in pairs
        if got == [want[0], "bfloat16"] and want[1] == "float32"
    }


def _compare(saved: dict[str, list], want: dict[str, list], where) -> None:
    for path in {**want, **saved}:
        if saved.get(path) != want.get(path):
            raise CheckpointError(
                f"checkpoint {where} is of another model or optimiser: {path} is "
                f"{saved.get(path, 'absent')} there and {want.get(path, 'absent')} here"
            )


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
