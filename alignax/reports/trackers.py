"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, or a user's own.

A tracker is a function that takes a `Start` and returns an object with `write(step,
metrics)` and `close()`. A config names it: trackers=('tensorboard', 'my_module.tracker').
Only process 0 calls it.
"""

import importlib
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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
    """

    folder: pathlib.Path
    step: int
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    dropped: int


class Tracker(Protocol):
    """What receives the metrics of a run."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the scalars of a step; steps never decrease."""

    def close(self) -> None:
        """Ends the run's process, which may go on later in another one."""


def find(name: str) -> Callable[[Start], Tracker]:
    """A tracker by its name in a config.

    Raises:
      ValueError: it is neither one of KNOWN nor a function that can be imported.
    """
    if name in KNOWN:
        return KNOWN[name]
    try:
        return plugin.function(name, "trackers")
    except ValueError as error:
        raise ValueError(f"{error}, or one of {sorted(KNOWN)}") from None


class TensorBoard:
    """Writes an event file; its header makes TensorBoard drop what was logged past it."""

    def __init__(self, start: Start):
        self._path = events.create(start.folder, start.step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._path.open("ab") as file:
            file.write(events.scalars(step, metrics))

    def close(self) -> None:
        pass


NOTE = "wandb_id.txt"  # in a workdir: the id of its W&B run


class WeightsAndBiases:
    """Logs to a W&B run, whose id is kept in the workdir: a resumed run goes on there.

    W&B cannot delete steps. If steps are computed again, they and all before them go to a
    new W&B run of the same group.
    """

    def __init__(self, start: Start):
        """Begins or goes on with a W&B run.

        Raises:
          ImportError: wandb is not installed.
        """
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError(
                "logging to wandb needs its extra: pip install 'alignax[wandb]'"
            ) from error
        note = start.folder / NOTE
        ids = note.read_text().split() if note.exists() else []
        again = not ids or bool(start.dropped)
        if again:
            ids.append(uuid.uuid4().hex[:8])
            note.write_text("\n".join(ids))
        self._run = wandb.init(
            project="alignax", name=start.folder.name, id=ids[-1], group=ids[0],
            resume="allow", dir=str(start.folder), config=dict(start.config),
        )  # fmt: skip
        for row in start.rows if again else ():
            values = {k: float(v) for k, v in row.items() if k != "step"}
            self.write(int(row["step"]), values)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


KNOWN: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases,
}  # fmt: skip
