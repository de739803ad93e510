"""A watchdog: writes stacks when a run hangs, and limits restarts that make no progress.

A run can hang without an error (a collective that one host never enters, a file system that
does not respond). After some minutes without a step, the stack of every thread is written
to WORKDIR/stacks-<process>.txt. A scheduler may restart a run that always dies at the same
step. After a number of starts in a row without a newer checkpoint the run refuses to start.
"""

import contextlib
import faulthandler
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from alignax.models import json_object
from alignax.runs import checkpoint, hosts, lease, workdirs
from alignax.runs.preemption import Preempted

STARTS = (
    "starts.json"  # in the workdir: {"step": of the checkpoint, "starts": from there}
)
WRONG = (ValueError, OSError)  # of a config or of a file: another start ends so too
log = logging.getLogger(__name__)


class Watchdog:
    """A context around a run; call it after every step."""

    def __init__(self, workdir: str, minutes: float):
        """Sets the folder and the time limit.

        Args:
          workdir: stacks are appended to stacks-<process>.txt there.
          minutes: without a call, until the stacks are written, and again each time that
            they pass; 0 never writes.
        """
        self._workdir = checkpoint.absolute(workdir)
        self._stacks = self._workdir / f"stacks-{jax.process_index()}.txt"
        self._seconds = 60 * minutes
        self._last = (time.monotonic(), 0)
        self._first: int | None = None  # step of the first call
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )

    def __call__(self, step: int) -> None:
        self._last = (time.monotonic(), step)
        self._first = step if self._first is None else self._first

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        failed = error is not None and self._first in (None, self._last[1])
        expected = KeyboardInterrupt, Preempted, *(WRONG if failed else ())
        ended = error is None or issubclass(error, expected)
        ended = ended and error is not lease.Taken  # the folder is another process's
        if ended and jax.process_index() == 0:
            forget(str(self._workdir))
            if failed and error is not Preempted:
                workdirs.release(str(self._workdir))

    def _watch(self) -> None:
        written = 0.0
        while not self._over.wait(min(self._seconds / 4, 10)):
            (since, step), now = self._last, time.monotonic()
            if now - max(since, written) >= self._seconds:
                written = now
                self._write(step, now - since)

    def _write(self, step: int, seconds: float) -> None:
        line = f"no step for {seconds / 60:.3g} minutes after step {step}"
        try:
            with tempfile.TemporaryFile("w+") as file:  # a bucket has no descriptor
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read()
            text = self._stacks.read_text() if self._stacks.exists() else ""
            text += f"{time.strftime('%FT%T')} {line}\n{stacks}\n"
            self._stacks.write_text(text)
            log.error("%s: every thread's stack is in %s", line, self._stacks)
        except OSError as error:
            log.error("%s, and its stacks could not be written: %s", line, error)


def forget(workdir: str) -> None:
    """Counts no start: this one did not crash."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            (checkpoint.absolute(workdir) / STARTS).unlink(missing_ok=True)


@contextlib.contextmanager
def counted(workdir: str, most: int) -> Iterator[None]:
    """Counts a start from the newest checkpoint before anything is read, on process 0.

    An error of the config or of a file inside this context does not count as a start, nor
    does Ctrl-C: the count is removed, with what else the start made.

    Args:
      workdir: of the run.
      most: starts from one step that are allowed; 0 does not count.

    Raises:
      ValueError: that many starts in a row began at this step and saved no newer
        checkpoint. With several hosts it is an OSError with that line.
    """
    folder, counts = checkpoint.absolute(workdir), most and jax.process_index() == 0
    hosts.agree(lambda: _count(folder, most) if counts else None)
    try:
        yield
    except (*WRONG, KeyboardInterrupt):
        if counts:
            forget(workdir)
            workdirs.release(workdir)
        raise


def _count(folder: Any, most: int) -> None:
    saved, path = folder / "checkpoints", folder / STARTS
    names = [p.name for p in saved.iterdir()] if saved.is_dir() else []
    step = max((int(name) for name in names if name.isdigit()), default=0)
    try:
        before = json_object.read(path, {"step": int, "starts": int})
    except (OSError, ValueError):  # no file, or one that is damaged
        before = {}
    starts = before["starts"] if before.get("step") == step else 0
    if starts >= most:
        raise ValueError(
            f"{starts} starts in a row from step {step} saved no newer checkpoint, so this "
            "one is refused. See how the last one ended (its log, "
            f"stacks-*.txt); then delete {path}, save more often "
            "(config.checkpoint.every) or allow more starts (config.watchdog.starts)"
        )
    part = folder / f"{STARTS}.part"  # renamed when complete
    with contextlib.suppress(OSError):  # `build` reports what is wrong with a workdir
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"step": step, "starts": starts + 1}))
        part.replace(path)
