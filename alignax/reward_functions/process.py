"""What a function of the user's own changes of this process is put back after its call.

These are what a run depends on: the settings of JAX, which decide how numbers are computed,
the current folder, which paths of the config are relative to, and what SIGTERM and Ctrl-C
do. Seeds, the environment and threads of a function are its own: a run uses none of them.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from alignax.models import fallback

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def kept(name: str) -> Iterator[None]:
    """Puts the process back after the block, and logs what was changed, once.

    Args:
      name: of what runs in the block, for the message.
    """
    settings: Any = jax.config
    before, folder = settings.values, _folder()
    heard = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        after = settings.values  # a property that collects all of them at each reading
        changed = [k for k, v in before.items() if after[k] is not v and after[k] != v]
        for key in changed:
            settings.update(key, before[key])
        if folder and _folder() != folder:
            os.chdir(folder)
            changed.append("the current folder")
        if threading.current_thread() is threading.main_thread():
            for number, handler in heard.items():
                # None: it was set outside Python, and cannot be put back
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
                    changed.append(f"what {number.name} does")
        if changed:
            fallback.say_once(
                f"{name} changes {', '.join(changed)}: put back after every call"
            )


def _folder() -> str:
    """The current folder; '' if it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return ""
