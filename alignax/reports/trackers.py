"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, or a user's own.

A tracker is a function that takes a `Start` and returns an object with `write(step,
metrics)` and `close()`. A config names it: trackers=('tensorboard', 'my_module.tracker').
Only process 0 calls it.
"""

import importlib
import importlib.util
import json
import pathlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from alignax import plugin
from alignax.reports import events


class Start(NamedTuple):
    """What a tracker is started with.

    Attributes:
      folder: of the run, or of a local copy that is uploaded to it.
      step: that was restored; 0 for a new run.
      config: of the run.
      rows: the lines of metrics.jsonl up to that step: {"step": 1, "train/loss": .7, ...}.
      dropped: how many lines past that step an earlier process wrote. The run computes
        those steps again, so a tracker should not show them.
      remote: whether the folder is uploaded from time to time only, so that a kill may
        have lost what was written there.
    """

    folder: pathlib.Path
    step: int
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    dropped: int
    remote: bool = False


@runtime_checkable
class Tracker(Protocol):
    """What receives the metrics of a run."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the scalars of a step; steps never decrease."""

    def close(self) -> None:
        """Ends the run's process, which may go on later in another one."""


def find(name: str) -> Callable[[Start], Tracker]:
    """A tracker by its name in a config.

    Raises:
      ValueError: it is neither one of KNOWN nor a function that can be imported, or its
        library is not installed.
    """
    if name == "wandb" and not _is_installed("wandb"):
        raise ValueError(
            "trackers: wandb needs its extra: pip install 'alignax[wandb]'"
        )
    if name in KNOWN:
        return KNOWN[name]
    try:
        return plugin.function(name, "trackers")
    except ValueError as error:
        raise ValueError(f"{error}, or one of {sorted(KNOWN)}") from None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # it was put into sys.modules by hand
        return sys.modules.get(name) is not None


def begin(name: str, start: Start) -> Tracker:
    """Starts a tracker.

    Raises:
      OSError: it does not start; the message has its name and its error.
    """
    try:
        return find(name)(start)
    except Exception as error:
        raise OSError(f"tracker {name!r} does not start: {error}") from error


class TensorBoard:
    """Writes an event file; its header makes TensorBoard drop what was logged past it."""

    def __init__(self, start: Start):
        self._path = events.create(start.folder, start.step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._path.open("ab") as file:
            file.write(events.scalars(step, metrics))

    def close(self) -> None:
        pass


# In a workdir: the ids of its W&B runs, the last step that was logged, whether it closed.
NOTE = "wandb.json"


class WeightsAndBiases:
    """Logs to a W&B run, whose id is kept in the workdir: a resumed run goes on there.

    W&B cannot delete steps. If it got steps that are computed again, they and all before
    them go to a new W&B run of the same group. Steps that it did not get are sent later.
    """

    def __init__(self, start: Start):
        """Begins or goes on with a W&B run."""
        wandb = importlib.import_module("wandb")
        self._note = start.folder / NOTE
        known: dict[str, Any] = {"ids": [], "last": 0, "closed": True}
        if self._note.exists():
            known = json.loads(self._note.read_text())
        void = known["last"] > start.step or (start.remote and not known["closed"])
        if void or not known["ids"]:
            known = {"ids": [*known["ids"], uuid.uuid4().hex[:8]], "last": 0}
        self._known = known
        self._run = wandb.init(
            project="alignax", name=start.folder.name, id=known["ids"][-1],
            group=known["ids"][0], resume="allow", dir=str(start.folder),
            config=dict(start.config),
        )  # fmt: skip
        for row in start.rows:
            if row["step"] > known["last"]:
                values = {k: float(v) for k, v in row.items() if k != "step"}
                self._run.log(values, step=int(row["step"]))
        self._write(start.step, closed=False)

    def _write(self, last: int, *, closed: bool) -> None:
        self._known |= {"last": last, "closed": closed}
        part = self._note.with_suffix(".part")
        part.write_text(json.dumps(self._known))
        part.replace(self._note)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)
        self._write(step, closed=False)

    def close(self) -> None:
        self._run.finish()
        self._write(self._known["last"], closed=True)


KNOWN: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases,
}  # fmt: skip
