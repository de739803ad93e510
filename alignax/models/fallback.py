"""Where a faster path cannot go: what a program is compiled for, and saying so once."""

import functools
import logging

import jax

log = logging.getLogger(__name__)


def platform() -> str:
    """What is compiled for: the default device's, which may be one that is only described."""
    device = getattr(jax.config, "jax_default_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


@functools.cache
def say_once(line: str) -> None:
    """Logs a line the first time it is said in a process."""
    log.warning(line)
