"""A time limit for a function of the user's own, in this process.

An interval timer signals the main thread. It stops loops, regular expressions, sockets, locks
and sleeps. It does not stop compiled code that does not return to Python, such as a program
of JAX: for that a run has its watchdog. A fork after JAX has started may deadlock, and a new
process cannot get a closure, so there is no other process.
"""

import contextlib
import contextvars
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


class TimeUp(BaseException):
    """The time is over. No `except Exception` of the function that is timed catches it."""


_usual = contextvars.ContextVar("seconds", default=0.0)


@contextlib.contextmanager
def by_default(seconds: float) -> Iterator[None]:
    """In the block a reward may take so many seconds per call; 0 is no limit."""
    token = _usual.set(seconds)
    try:
        yield
    finally:
        _usual.reset(token)


def usual() -> float:
    """Seconds of the `by_default` that is in force; 0 for no limit."""
    return _usual.get()


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeUp in the block when it has run for so many seconds; 0 is no limit.

    Only in the main thread, where Python handles signals; elsewhere there is no limit, and
    a warning. A timer that was set before goes on afterwards.
    """
    if not seconds or not available():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, left, again)


def available() -> bool:
    """Whether a limit can be set here; warns once if not."""
    main = threading.current_thread() is threading.main_thread()
    if main and hasattr(signal, "setitimer"):
        return True
    if not _warned:
        _warned.append(True)
        log.warning("no time limit for rewards: this is not the main thread")
    return False


_warned: list[bool] = []
