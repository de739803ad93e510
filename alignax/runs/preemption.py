"""Preemption: SIGTERM or Ctrl-C sets a flag; the run saves its state, and can be resumed."""

import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

PATIENCE = (
    2.0  # seconds that a signal waits for the main thread, which may be compiling
)


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

    def __init__(self, *, drops: bool = False, leave: Callable[[], Any] | None = None):
        """Sets what a signal does.

        Args:
          drops: whether `drop_if_asked` raises Interrupted after a signal, which whoever
            opens this context then handles.
          leave: called in a program (`of_program`) before a signal ends the process with 75
            (EX_TEMPFAIL), from another thread. That happens while `unsaved` is False, if the
            main thread does not hear the signal for some time, as while XLA compiles.
        """
        self._drops = drops
        self._leave = leave if of_program else None
        self.unsaved = (
            False  # whether the process has done what the end of it would lose
        )

    def __enter__(self):
        _current.append(self)
        self._flag, self._interrupted = threading.Event(), False
        self._calls = itertools.count(1)
        self.name = "SIGTERM"  # of the signal
        self._old: dict[int, Any] = {}
        self._alone = jax.process_count() == 1  # else jax handles the signal
        if self._alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # None: it was set outside Python, and could not be put back
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._old[number] = signal.signal(number, self._stop)
        self._over = threading.Event()
        self._far: socket.socket | None = None
        if self._old and self._leave:
            near, self._far = socket.socketpair()
            self._far.setblocking(False)
            # written to as soon as a signal comes, whatever the main thread does
            to = self._far.fileno()
            self._other = signal.set_wakeup_fd(to, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(near,), daemon=True).start()
        return self

    def _listen(self, near: socket.socket) -> None:
        """Ends the process after a signal that the main thread does not hear."""
        with near:
            while (number := near.recv(1)) and number[0] not in self._old:
                pass
            # the flag: Python has run the handler, so the main thread goes on by itself
            if number and not self._flag.wait(PATIENCE) and not self.unsaved:
                assert self._leave
                self._leave()
                name = signal.Signals(number[0]).name
                said = f"{name}: nothing to save; the same command goes on"
                print(said, file=sys.stderr, flush=True)
                os._exit(os.EX_TEMPFAIL)
            self._over.wait()

    def _stop(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        self._flag.set()
        if number != signal.SIGINT:
            return
        # the handler stays: a function of the user's own is called between two signals, and
        # what is another one after it is put back
        if not self._interrupted:
            self._interrupted = True
            print("\nsaving; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        elif callable(old := self._old[number]):
            old(number, frame)
        else:
            raise KeyboardInterrupt

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
        self._over.set()
        if self._far:
            signal.set_wakeup_fd(self._other)
            self._far.close()  # which ends the thread, if no signal came


_current: list[preemption] = []  # contexts that are open, the innermost last
of_program = False  # whether the process is one of alignax, which sets this
