"""One process per folder: the lease that a run holds on its workdir.

WORKDIR/owner.json names the process that writes there, and is written again at every beat. A
file that can only be replaced, as in a bucket, gives no mutual exclusion. So a lease is read
back after it was taken, at every beat and before every checkpoint: of two processes that
start at once, the one whose file was replaced stops.
"""

import contextlib
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

import jax
from etils import epath

from alignax.runs import checkpoint, hosts, workdirs

NAME = "owner.json"
BEAT = 10.0  # seconds between two beats
STALE = 3  # beats without a change, by the clock of who reads, after which it is stale
SETTLE = 0.5  # seconds until a new lease is read back
log = logging.getLogger(__name__)
BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")  # hosts may share their names
UNKNOWN = {"uuid": "unknown"}  # a lease that is damaged
_mine: set[str] = set()  # the leases that this process holds


class Taken(OSError):
    """Another process writes to the folder."""


class Lease:
    """A context around a run, in which no other one writes to its folder."""

    def __init__(self, workdir: str, beat: float = BEAT):
        """Sets the folder.

        Args:
          workdir: of the run.
          beat: seconds between two beats.
        """
        self._folder = checkpoint.absolute(workdir)
        self._seconds = beat
        self._uuid = uuid.uuid4().hex
        self._beats = 0
        self._lost = ""
        self._holds = jax.process_index() == 0
        self._since = 0.0
        self._over = threading.Event()
        self._lock = threading.Lock()  # between the thread of beats and `check`
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Takes the lease; waits up to three beats for one of a process that is not here.

        Raises:
          Taken: another process holds it. With several hosts it is an OSError.
          OSError: the folder cannot be written.
        """
        hosts.agree(lambda: self._take() if self._holds else None)
        if self._holds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Ends the beats and removes the lease, if it is still this one's."""
        if not self._holds:
            return
        self._over.set()
        self._thread.join()
        _mine.discard(self._uuid)
        # Not there, or not empty, for which etils raises ValueError.
        with contextlib.suppress(OSError, ValueError):
            if _parsed(_raw(self._folder)).get("uuid") == self._uuid:
                (self._folder / NAME).unlink()
            self._folder.rmdir()

    def settle(self) -> None:
        """Reads a new lease back, some time after it was taken.

        Raises:
          Taken: another process took it at the same time.
        """
        time.sleep(max(0.0, self._since + SETTLE - time.monotonic()) * self._holds)
        self.check()

    def check(self, *, read: bool = True) -> None:
        """Raises Taken if another process has taken the folder.

        Args:
          read: look at the file now, as before a checkpoint; or say what the last beat
            found, which costs nothing.
        """
        if read and self._holds:
            with self._lock:
                self._read_back()
        if self._lost:
            raise Taken(
                f"workdir {self._folder} was taken over by {self._lost}, since the beats of "
                "this process did not arrive there: this one stops"
            )

    def _take(self) -> None:
        workdirs.make(self._folder)
        raw, since = _raw(self._folder), time.monotonic()
        first = raw
        while raw:
            there = _parsed(raw)
            running = _runs(there)
            if running or raw != first:  # it beats
                raise Taken(
                    f"{_words(there)} writes to workdir {self._folder}: wait for its end, or "
                    "take another workdir"
                )
            waited = time.monotonic() - since
            if running is False or waited >= STALE * self._seconds:
                log.warning(
                    "%s ended without giving workdir %s back: it is taken over",
                    _words(there), self._folder,
                )  # fmt: skip
                part = self._folder / f".{NAME}.{there.get('uuid', '')}"
                part.unlink(missing_ok=True)
                break
            if waited < self._seconds / 4:
                log.info(
                    "%s may write to %s: waiting for it", _words(there), self._folder
                )
            time.sleep(self._seconds / 4)
            raw = _raw(self._folder)
        self._write()
        _mine.add(self._uuid)
        self._since = time.monotonic()

    def _write(self) -> None:
        content = {**_identity(os.getpid()), "uuid": self._uuid, "beat": self._beats}
        workdirs.write_json(self._folder / NAME, content, f".{NAME}.{self._uuid}")
        self._beats += 1

    def _read_back(self) -> bool:
        """Whether the lease is this one's; one that was deleted or damaged is written again."""
        there = _parsed(_raw(self._folder) or b"{}")
        if not there or there == UNKNOWN:  # deleted, or damaged
            self._write()
        elif there.get("uuid") != self._uuid:
            self._lost = _words(there)
        return not self._lost

    def _beat(self) -> None:
        while not self._over.wait(self._seconds):
            try:
                with self._lock:
                    if not self._read_back():
                        return
                    self._write()
            except (
                Exception
            ) as error:  # a bucket's has no common class; `check` reports it
                log.warning("%s cannot be written: %s", self._folder / NAME, error)


def _raw(folder: epath.Path) -> bytes:
    """The content of the file; b'' where there is none."""
    try:
        return (folder / NAME).read_bytes()
    except FileNotFoundError:
        return b""


def _parsed(raw: bytes) -> dict[str, Any]:
    """A lease; one that is damaged is of an unknown process."""
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else UNKNOWN


def _words(lease: dict[str, Any]) -> str:
    return f"process {lease.get('process', '?')} on host {lease.get('host', '?')}"


def _identity(pid: int) -> dict[str, Any]:
    """What tells a process from others, also from a later one of the same number."""
    space, started, boot = "", "", ""
    with contextlib.suppress(OSError):
        boot = BOOT.read_text().strip()
    with contextlib.suppress(OSError, IndexError):  # where there is no /proc
        space = os.readlink("/proc/self/ns/pid")
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        started = stat.rpartition(")")[2].split()[19]
    return {
        "host": socket.gethostname(), "boot": boot, "space": space, "process": pid,
        "started": started,
    }  # fmt: skip


def _runs(lease: dict[str, Any]) -> bool | None:
    """Whether the process of a lease runs; None if that cannot be seen from here."""
    pid = lease.get("process")
    if not isinstance(pid, int) or pid < 1:
        return None
    now = _identity(pid)
    lease = {"boot": now["boot"], **lease}  # earlier versions did not write it
    if any(lease.get(key) != now[key] for key in ("host", "boot", "space")):
        return None
    if pid == os.getpid():
        return lease.get("uuid") in _mine
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    if not now["started"]:
        return None
    return lease.get("started") == now["started"]
