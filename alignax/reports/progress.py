"""Progress of a run: a bar on a terminal, plain lines in a log."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from tqdm import tqdm

from alignax.batch import Metrics
from alignax.reports.metrics import scalars


@contextlib.contextmanager
def progress(
    num_steps: int,
    *,
    start: int = 0,
    name: str = "train",
    file: Any = None,
    every: float = 10.0,
) -> Iterator[Callable[[int, Metrics], None]]:
    """Yields `show(step, metrics)`: a bar on a terminal, plain lines in a log.

    Shows 'train/loss', 'train/rollout/reward' and '.../kl', 'train/tokens_per_second' and 'train/mfu' where they are given. The
    time left is estimated from the first call on, so that it excludes compilation.

    Args:
      num_steps: steps of the whole run.
      start: steps already made.
      name: printed before the bar.
      file: text stream, stderr by default.
      every: seconds between two plain lines; the first and last step are always shown.
    """
    file = file or sys.stderr
    enabled = jax.process_index() == 0
    tty = enabled and file.isatty()
    layout = "{desc} {n_fmt}/{total_fmt} {bar:20} {postfix}"
    bar = tqdm(
        total=num_steps, initial=start, desc=name, file=file, disable=not tty,
        bar_format=layout, dynamic_ncols=True,
    )  # fmt: skip
    first: tuple[int, float] | None = None
    shown = -math.inf

    def show(step: int, metrics: Metrics) -> None:
        nonlocal first, shown
        now = time.monotonic()
        first = first or (step, now)
        if not enabled:
            return
        if not tty and now - shown < every and step < num_steps:
            return
        shown = now
        parts = _summary(scalars(metrics))
        if first[0] < step < num_steps:
            left = (now - first[1]) / (step - first[0]) * (num_steps - step)
            parts.append(f"{tqdm.format_interval(left)} left")
        if tty:
            bar.n = step
            bar.set_postfix_str("  ".join(parts))
        else:
            print(f"{name} {step}/{num_steps}", *parts, sep="  ", file=file, flush=True)

    try:
        yield show
    finally:
        bar.close()


def _summary(values: Mapping[str, float]) -> list[str]:
    parts = []
    if "train/loss" in values:
        parts.append(f"loss {values['train/loss']:.4f}")
    for name in ("reward", "kl"):
        if f"train/rollout/{name}" in values:
            parts.append(f"{name} {values[f'train/rollout/{name}']:.3g}")
    if "train/tokens_per_second" in values:
        rate = tqdm.format_sizeof(values["train/tokens_per_second"])
        parts.append(f"{rate.strip()} tok/s")
    if "train/mfu" in values:
        parts.append(f"MFU {100 * values['train/mfu']:.1f} %")
    return parts
