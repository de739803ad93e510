"""Every state that a kill can leave on disk, copied in one run, and resumed one by one.

    states = record(run, root, copies)        one run: a copy at each file-system event
    end = ending(root)                        what it left at its end
    lost = resume(run, root, states[i], end)  the run goes on from a copy; [] if all is equal

Python reports an event before it happens, so that a copy is what a kill at that event leaves.
Events are those of `EVENTS` and every opening for writing, of any path under `root`, from all
threads. What is not Python (the arrays that Orbax writes) is copied as far as it has come.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

EVENTS = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link",
    "os.symlink", "shutil.rmtree",
}  # fmt: skip
# What may differ from an undisturbed run: clocks, plots, counts of starts, leases.
FREE = re.compile(
    r"events\.out\.tfevents\..*|.*\.png|starts\.json(\.part)?|\.?owner\.json.*|stacks-.*"
)
CLOCK = re.compile(r"(tokens_per_second|sampling|judging|scoring|updating|mfu)$")


class State(NamedTuple):
    """A copy of the folder of a run."""

    number: int  # of the event, from 1
    event: str  # what was about to happen
    folder: pathlib.Path


class _Recorder:
    """The hook of this process: Python has none that can be taken away again."""

    def __init__(self) -> None:
        self.root = ""
        self.copies = pathlib.Path()
        self.states: list[State] = []
        self.seen: set[str] = set()
        self.count = 0
        self.lock = threading.Lock()
        self.busy = threading.local()
        self.installed = False

    def hook(self, event: str, args: tuple) -> None:
        if not self.root or getattr(self.busy, "on", False):
            return
        if event not in EVENTS and not (event == "open" and _writes(args)):
            return
        self.busy.on = True
        try:
            paths = [p for p in _paths(event, args) if p.startswith(self.root)]
            if paths:
                with self.lock:  # other threads wait before their own event
                    self.take(f"{event} {paths[0]}")
        finally:
            self.busy.on = False

    def take(self, event: str) -> None:
        self.count += 1
        folder = self.copies / f"{self.count:04d}"
        for _ in range(5):
            # what is not Python goes on meanwhile, and may rename what is just read
            with contextlib.suppress(FileNotFoundError):
                mark = digest(pathlib.Path(self.root))
                if mark not in self.seen:
                    copy(pathlib.Path(self.root), folder)
                    self.seen.add(mark)
                    self.states.append(State(self.count, event, folder))
                return
            shutil.rmtree(folder, ignore_errors=True)


_RECORDER = _Recorder()


def record(
    run: Callable[[], Any], root: pathlib.Path, copies: pathlib.Path
) -> list[State]:
    """Calls `run`, which writes below `root`; returns the distinct states in their order."""
    if not _RECORDER.installed:
        sys.addaudithook(_RECORDER.hook)
        _RECORDER.installed = True
    root.mkdir(parents=True, exist_ok=True)
    copies.mkdir(parents=True)
    _RECORDER.states, _RECORDER.seen, _RECORDER.count = [], set(), 0
    _RECORDER.copies, _RECORDER.root = copies, f"{root}{os.sep}"
    try:
        run()
    finally:
        _RECORDER.root = ""
    return _RECORDER.states


def events() -> int:
    """How many events the last recorded run had."""
    return _RECORDER.count


def resume(
    run: Callable[[], Any], root: pathlib.Path, state: State, end: dict[str, Any]
) -> list[str]:
    """Lets a run go on from a copy, and compares how it ends.

    Args:
      run: the same run.
      root: of its files, which are replaced by the copy.
      state: from `record`.
      end: `ending` of the undisturbed run.

    Returns:
      What differs, in words.
    """
    shutil.rmtree(root, ignore_errors=True)
    copy(state.folder, root)
    before = committed(root)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run()
    now = ending(root)
    lost = [f"{k} differs" for k in sorted({*end, *now}) if end.get(k) != now.get(k)]
    begun = [*map(int, re.findall(r"resumed at step (\d+)", said.getvalue()))]
    # every folder of checkpoints is read again, but for those of a stage that follows
    if sum(begun) < sum(max(steps) for steps in before.values()):
        lost.append(f"resumed at {begun}, though {before} were committed")
    return lost


def committed(root: pathlib.Path) -> dict[str, list[int]]:
    """{folder of a run: its committed steps}."""
    found: dict[str, list[int]] = {}
    for mark in root.rglob("checkpoints/*/_CHECKPOINT_METADATA"):
        if mark.parent.name.isdigit():
            name = str(mark.parent.parent.parent.relative_to(root))
            found.setdefault(name, []).append(int(mark.parent.name))
    return found


def ending(root: pathlib.Path) -> dict[str, Any]:
    """All that a run leaves and that does not depend on the clock, by name."""
    out: dict[str, Any] = {}
    for folder in [*root.rglob("checkpoints"), *root.rglob("best")]:
        out |= _checkpoints(folder, str(folder.relative_to(root)))
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        inside = {"checkpoints", "best"} & {*path.relative_to(root).parts}
        if inside or path.is_dir() or FREE.fullmatch(path.name):
            continue
        if path.name == "metrics.jsonl":
            out[name] = [
                {k: v for k, v in row.items() if not CLOCK.search(k)}
                for row in map(json.loads, path.read_text().splitlines())
            ]
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                out[name] = {k: arrays[k].tobytes() for k in arrays.files}
        else:
            out[name] = path.read_bytes()
    return out


def _checkpoints(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Steps, arrays and records of a folder of checkpoints."""
    out: dict[str, Any] = {}
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(), rest=ocp.args.StandardRestore(),
        meta=ocp.args.JsonRestore(),
    )  # fmt: skip
    with ocp.CheckpointManager(folder) as manager:
        for step in manager.all_steps():
            got = manager.restore(step, args=items)
            for kind, tree in (("params", got.params), ("rest", got.rest)):
                for path, array in _leaves(tree):
                    out[f"{name}/{step}/{kind}{path}"] = np.asarray(array).tobytes()
            out[f"{name}/{step}/meta"] = json.dumps(got.meta, sort_keys=True)
    left = {p.name for p in folder.iterdir()}
    out[f"{name} as listed"] = sorted(left)
    return out


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        pairs = list(tree.items())
    elif isinstance(tree, list | tuple):
        pairs = [(str(i), x) for i, x in enumerate(tree)]
    else:
        return [] if tree is None else [(path, tree)]
    return [leaf for k, v in pairs for leaf in _leaves(v, f"{path}/{k}")]


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a folder whose files may vanish meanwhile."""
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        there = target / path.relative_to(source)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if path.is_dir():
                there.mkdir(parents=True, exist_ok=True)
            else:
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(path.read_bytes())


def digest(root: pathlib.Path) -> str:
    """Of the names and contents under a folder, without what is free."""
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if FREE.fullmatch(path.name):
            continue
        whole.update(f"\0{path.relative_to(root)}\0".encode())
        with contextlib.suppress(OSError):
            if path.is_file():
                whole.update(path.read_bytes())
    return whole.hexdigest()


def _writes(args: tuple) -> bool:
    mode, flags = args[1], args[2] if len(args) > 2 else 0
    if isinstance(mode, str) and any(c in mode for c in "wax+"):
        return True
    return bool(flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _paths(event: str, args: tuple) -> list[str]:
    """The paths of an event; those of a folder that is open by its descriptor too."""
    out = []
    folder = next((a for a in args[1:] if isinstance(a, int) and a > 2), None)
    for a in args[:2]:
        if not isinstance(a, str | bytes | os.PathLike):
            continue
        path = os.fsdecode(a)
        if not os.path.isabs(path) and folder is not None and event != "open":
            with contextlib.suppress(OSError):
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        out.append(os.path.abspath(path))
    return out
