"""Preemption: SIGTERM or Ctrl-C sets a flag; the run saves its state, and can be resumed."""

import itertools
import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(RuntimeError):
    """SIGTERM or Ctrl-C came: the state is saved, and the same command resumes the run."""


class Interrupted(BaseException):
    """A signal came while work was done that can be dropped: see `drop_if_asked`.

    No Exception, so that a reward function or a caller of one does not catch it.
    """


def drop_if_asked() -> None:
    """Raises Interrupted where a signal came in a `preemption(drops=True)`.

    Called between the batches of long work that changes no state: rollouts, evaluations.
    With several processes it does nothing, since they have to stop at one step.
    """
    if _current and _current[-1].dropping():
        raise Interrupted(_current[-1].name)


class preemption:
    """Context in which SIGTERM or Ctrl-C sets a flag; a call returns whether one came.

    A second Ctrl-C raises KeyboardInterrupt at once.

    With several processes it is enough that one of them gets the signal: jax agrees on a
    step at which all of them stop, and there is no synchronisation at other steps. Orbax
    also asks jax by step when it saves, so the numbers passed here must be steps.
    """

    def __init__(self, *, drops: bool = False):
        """Sets what a signal does.

        Args:
          drops: whether `drop_if_asked` raises Interrupted after a signal, which whoever
            opens this context then handles.
        """
        self._drops = drops

    def __enter__(self):
        _current.append(self)
        self._flag = threading.Event()
        self._calls = itertools.count(1)
        self.name = "SIGTERM"  # of the signal
        self._old: dict[int, Any] = {}
        self._alone = jax.process_count() == 1  # else jax handles the signal
        if self._alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # None: it was set outside Python, and could not be put back
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._old[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        self._flag.set()
        if number == signal.SIGINT:
            signal.signal(number, self._old[number])
            print("\nsaving; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def __call__(self, step: int | None = None) -> bool:
        """Whether to stop at `step`; without steps, at this call."""
        if self._alone:
            return self._flag.is_set()
        at = next(self._calls) if step is None else step
        return multihost_utils.reached_preemption_sync_point(at)

    def dropping(self) -> bool:
        """Whether work of the moment is to be dropped."""
        return self._drops and self._alone and self._flag.is_set()

    def __exit__(self, *_):
        _current.remove(self)
        for number, old in self._old.items():
            signal.signal(number, old)


_current: list[preemption] = []  # contexts that are open, the innermost last
