"""SIGTERM as a flag: a run saves its state, and the same command goes on from there."""

import itertools
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(RuntimeError):
    """SIGTERM came: the state is saved, and the same command goes on from there."""


class preemption:
    """Context in which SIGTERM only raises a flag; calling it tells whether it came.

    Among several processes it is enough that one of them gets the signal: jax agrees on a
    step at which all are told, with no wait at any other. Orbax asks jax the same, by
    step, when it saves; so the numbers handed in here are steps too.
    """

    def __enter__(self):
        self._flag = threading.Event()
        self._calls = itertools.count(1)
        self._old: Any = None
        self._alone = jax.process_count() == 1  # else jax listens to the signal
        if self._alone and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())
        return self

    def __call__(self, step: int | None = None) -> bool:
        """Whether to stop at `step`, or at this call where nothing has steps."""
        if self._alone:
            return self._flag.is_set()
        at = next(self._calls) if step is None else step
        return multihost_utils.reached_preemption_sync_point(at)

    def __exit__(self, *_):
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
