"""Which platform a program is compiled for, and one log line where a kernel is not used."""

import functools
import logging

import jax

log = logging.getLogger(__name__)


def platform() -> str:
    """Platform of the default device, which may be a described one (see `preflight`)."""
    device = getattr(jax.config, "jax_default_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


@functools.cache
def say_once(line: str) -> None:
    """Logs a warning, once per process for the same line."""
    log.warning(line)
