"""Preemption: SIGTERM sets a flag; the run saves its state, and can be resumed."""

import itertools
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(RuntimeError):
    """SIGTERM was received: the state is saved, and the same command resumes the run."""


class preemption:
    """Context in which SIGTERM only sets a flag; a call returns whether it was received.

    With several processes it is enough that one of them gets the signal: jax agrees on a
    step at which all of them stop, and there is no synchronisation at other steps. Orbax
    also asks jax by step when it saves, so the numbers passed here must be steps.
    """

    def __enter__(self):
        self._flag = threading.Event()
        self._calls = itertools.count(1)
        self._old: Any = None
        self._alone = jax.process_count() == 1  # else jax handles the signal
        if self._alone and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())
        return self

    def __call__(self, step: int | None = None) -> bool:
        """Whether to stop at `step`; without steps, at this call."""
        if self._alone:
            return self._flag.is_set()
        at = next(self._calls) if step is None else step
        return multihost_utils.reached_preemption_sync_point(at)

    def __exit__(self, *_):
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
