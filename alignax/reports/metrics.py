"""Metrics of a run: metrics.jsonl, trackers, samples; intervals and FLOPs.

    writer = Writer(workdir, step=state.step)
    writer.write(step, {"train/loss": loss})           one line, one record
    writer.samples(step, [{"prompt": x, "policy": y}]) samples.jsonl and samples.md

Only process 0 writes. Intervals of 95 % are written as three keys: `name`, `name/lo`,
`name/hi`; `curves.py` draws them as bands.
"""

import json
import logging
import math
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignax.batch import Metrics
from alignax.models.stored import expanded
from alignax.reports import trackers

log = logging.getLogger(__name__)

Z95 = 1.959964  # the two-sided 95 % quantile of a normal

# Dense bfloat16 FLOP/s of one device, by jax's `device_kind`; the first match wins.
PEAK_FLOPS = (
    (r"TPU v4", 275e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v6 ?(lite|e)", 918e12),
    (r"A100", 312e12),
    (r"H100 PCIe", 756e12),
    (r"H100", 989e12),
    (r"H200", 989e12),
)


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    lo: float
    hi: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.lo:.3f}, {self.hi:.3f}]"

    def named(self, name: str) -> dict[str, float]:
        """The interval as three metrics: `name`, `name/lo` and `name/hi`."""
        return {name: self.value, f"{name}/lo": self.lo, f"{name}/hi": self.hi}


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a proportion; it stays inside [0, 1] at 0 and at n.

    Args:
      successes: how many of the n succeeded, in [0, n]; a tie may count as a half.
      n: trials, at least 1.

    Raises:
      ValueError: no trials, or successes outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson got {successes} successes of {n} trials")
    p = successes / n
    scale = 1 + Z95**2 / n
    center = (p + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return Interval(p, max(0.0, center - half), min(1.0, center + half))


def mean_of(intervals: Sequence[Interval]) -> Interval:
    """The mean of independent proportions, each with the same weight, and its interval.

    Source: the limits of the parts are combined by the method of variance estimates
    recovery (Zou and Donner 2008, https://doi.org/10.1002/sim.3095); of one part they are
    its own.

    Args:
      intervals: of the parts, at least one.
    """
    parts = np.array(intervals, np.float64)
    value, lo, hi = parts.T
    mean, many = float(value.mean()), len(parts)
    below = math.sqrt(float(((value - lo) ** 2).sum())) / many
    above = math.sqrt(float(((hi - value) ** 2).sum())) / many
    return Interval(mean, max(0.0, mean - below), min(1.0, mean + above))


def bootstrap(values: Any, *, seed: int = 0, num_resamples: int = 1000) -> Interval:
    """Percentile bootstrap of a mean, resampling prompts.

    Args:
      values: f[n], one finite number per prompt. Average over the samples of a prompt
        first: rows of one prompt are not independent.
      seed: of the resampling.
      num_resamples: number of resampled means.

    Returns:
      The mean and its interval; the interval of a single prompt is the whole line.

    Raises:
      ValueError: values is not one-dimensional, empty, or not finite.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise ValueError(
            f"bootstrap got values of shape {x.shape} with "
            f"{np.count_nonzero(~np.isfinite(x))} not finite; expected finite f[n], n > 0"
        )
    if x.size == 1:
        return Interval(float(x[0]), -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    means = [x[rng.integers(x.size, size=x.size)].mean() for _ in range(num_resamples)]
    lo, hi = np.quantile(means, (0.025, 0.975))
    return Interval(float(x.mean()), float(lo), float(hi))


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, by its `device_kind`; None if unknown."""
    for pattern, flops in PEAK_FLOPS:
        if re.search(pattern, device_kind):
            return flops
    return None


def flops_per_token(num_params: int, kind: str, *, frozen: int = 0) -> float:
    """FLOPs per token of a dense model's matrix products, without attention.

    Args:
      num_params: parameters that enter a matrix product (the head, not the embedding).
      kind: 'train' (forward and backward: 6 per parameter) or 'forward' (2 per parameter).
      frozen: further parameters without a gradient, as the base of adapters: the backward
        pass goes through them, but needs no product for their own gradient (4 per
        parameter).

    Raises:
      ValueError: another kind.
    """
    cost = {"train": 6.0, "forward": 2.0}
    if kind not in cost:
        raise ValueError(f"flops_per_token has no kind '{kind}'; it takes {list(cost)}")
    return cost[kind] * num_params + min(cost[kind], 4.0) * frozen


def mfu(flops: float, seconds: float, devices: Sequence[Any]) -> float | None:
    """Model FLOPs utilisation: FLOP/s of the model over the peak of the devices.

    Args:
      flops: of the whole step, over all devices.
      seconds: duration of the step.
      devices: the jax devices it ran on.

    Returns:
      A share in [0, 1], or None if the peak of a device is not known.
    """
    peaks = [peak_flops(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if not peaks or len(known) < len(peaks):
        return None
    return flops / (seconds * sum(known))


class Writer:
    """Appends metrics and samples to the files of a workdir."""

    def __init__(
        self,
        workdir: Any,
        *,
        step: int = 0,
        lines: Mapping[str, int] | None = None,
        tracked_by: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the files of a run that continues from `step`.

        Lines that an earlier process wrote past `step` are dropped (all of them at step 0)
        and counted in the log: the run computes those steps again.

        Args:
          workdir: a folder, local or remote (gs://...); it is created.
          step: the step that was restored, 0 for a new run.
          lines: what `lines` was when that step was saved: further lines of the step
            itself, as those of the last evaluation, are dropped too.
          tracked_by: names of trackers: see `trackers.find`.
          config: plain dict that these may show.

        Raises:
          OSError: a tracker does not start.
          ValueError: an unknown tracker, or a damaged line in a file.
        """
        self._enabled = jax.process_index() == 0
        self._trackers: list[trackers.Tracker] = []
        self._opened: tuple[trackers.Tracker, ...] = ()
        self.lines: dict[str, int] = {}  # of each file; what a checkpoint notes
        if not self._enabled:
            return
        self._remote = epath.Path(workdir) if "://" in str(workdir) else None
        # Object stores cannot append: files are written locally, and copied as a whole.
        self._temporary = tempfile.TemporaryDirectory() if self._remote else None
        self._folder = pathlib.Path(
            self._temporary.name if self._temporary else workdir
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl", trackers.NOTE):
            if self._remote and (self._remote / name).exists():
                (self._folder / name).write_bytes((self._remote / name).read_bytes())
        dropped = {}
        for name in ("metrics.jsonl", "samples.jsonl"):
            most = (lines or {}).get(name)
            self.lines[name], dropped[name] = _truncate(self._folder / name, step, most)
        rows = _read(self._folder / "samples.jsonl")
        (self._folder / "samples.md").unlink(missing_ok=True)
        self._append("samples.md", "".join(map(_markdown, rows)))
        self.flush()  # what was dropped is not to be read again
        start = trackers.Start(
            self._folder, step, dict(config or {}), _read(self._folder / "metrics.jsonl"),
            dropped["metrics.jsonl"], remote=self._remote is not None,
        )  # fmt: skip
        self._trackers = [trackers.begin(name, start) for name in tracked_by]
        self._opened = tuple(self._trackers)
        if self._trackers:
            self.flush()

    def write(self, step: int, metrics: Metrics) -> None:
        """Writes one line: the step and its scalars.

        Raises:
          ValueError: a metric is not a number; the message names it.
        """
        if not self._enabled:
            return
        values = scalars(metrics)
        self._append("metrics.jsonl", _line({"step": int(step), **values}))
        self.lines["metrics.jsonl"] += 1
        for tracker in list(self._trackers):
            try:
                tracker.write(int(step), values)
            except Exception:  # of a service or of the user's: the run is worth more
                log.exception(
                    "%r failed at step %d: it gets no more metrics", tracker, step
                )
                self._trackers.remove(tracker)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows of text (column -> text or number) to samples.jsonl and samples.md."""
        if not self._enabled:
            return
        for i, row in enumerate(rows):
            full = {"step": int(step), "index": i, **_on_host(row)}
            self._append("samples.jsonl", _line(full))
            self.lines["samples.jsonl"] += 1
            self._append("samples.md", _markdown(full))

    def flush(self) -> None:
        """Copies the files to a remote workdir; a local one is always up to date."""
        if self._enabled and self._remote:
            self._remote.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if path.is_file():
                    (self._remote / path.name).write_bytes(path.read_bytes())

    def close(self) -> None:
        """Copies the files to a remote workdir, and closes the trackers."""
        self.flush()
        for tracker in self._opened:
            try:
                tracker.close()
            except Exception:
                log.exception("%r did not close", tracker)
        if self._opened:
            self.flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, text: str) -> None:
        if text:
            path = self._folder / name
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:  # it names no file where the disk is full
                raise OSError(f"cannot write {path}: {error.strerror}") from error


def scalars(metrics: Metrics) -> dict[str, float]:
    """Metrics as Python floats, moved from the devices in one transfer.

    Raises:
      ValueError: a metric is not a number; the message names it.
    """
    out = {}
    for name, value in _on_host(metrics).items():
        if isinstance(value, str) or np.shape(value) != ():
            what = "text" if isinstance(value, str) else f"shape {np.shape(value)}"
            raise ValueError(
                f"metric '{name}' has {what}, expected a number; rows of text go to "
                "Writer.samples"
            )
        out[name] = float(value)
    return out


def read(workdir: Any) -> list[dict[str, float]]:
    """The lines of WORKDIR/metrics.jsonl, in order, with nan and inf as numbers.

    Raises:
      FileNotFoundError: the workdir has no metrics.jsonl.
    """
    if "://" not in str(workdir):
        workdir = expanded(workdir)
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: has this run written metrics?")
    return [{k: float(v) for k, v in row.items()} for row in _read(path)]


def _on_host(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with host arrays, in the order of its columns (a jax tree would sort them)."""
    return dict(zip(row, jax.device_get(list(row.values())), strict=True))


def _line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON, where nan and inf are the strings float() reads."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            value = value.item()
        finite = not isinstance(value, float) or math.isfinite(value)
        return value if finite else str(value)

    row = {name: plain(value) for name, value in row.items()}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _read(path: Any) -> list[dict[str, Any]]:
    """Rows of a JSONL file; the last line is left out if a kill made it incomplete.

    Raises:
      OSError: the file cannot be read; it is named.
      ValueError: another line is damaged; it is named.
    """
    if not path.exists():
        return []
    try:
        data = path.read_bytes()
    except OSError as error:  # that of reading names no file
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    # not splitlines(): samples may contain U+2028 and other breaks, which JSON keeps
    lines = [line for line in data.split(b"\n") if line]
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(_row(line, of_text=path.name == "samples.jsonl"))
        except (ValueError, RecursionError) as error:
            if i < len(lines) - 1:
                raise ValueError(
                    f"{path}:{i + 1} is not JSON that a run wrote ({error}): delete that "
                    "line, or put a copy of the file back"
                ) from error
            log.warning("%s:%d is a torn line, left out", path, i + 1)
    return rows


def _row(line: bytes, *, of_text: bool) -> dict[str, Any]:
    """The row in a line of samples.jsonl (of text), or of metrics.jsonl: numbers.

    Raises:
      ValueError, RecursionError: it is no such row.
    """
    row = json.loads(line.decode("utf-8"))
    needs = ("step", "index") if of_text else ("step",)
    if not isinstance(row, dict) or not all(
        isinstance(row.get(key), int | float) for key in needs
    ):
        raise ValueError("it is no row with " + " and ".join(f"'{k}'" for k in needs))
    if of_text:
        return row
    for key, value in row.items():
        try:
            float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"'{key}' is {value!r:.40}, expected a number") from None
    return row


def _truncate(path: pathlib.Path, step: int, most: int | None) -> tuple[int, int]:
    """Drops the rows past `step` (all of them at 0) or `most`, and logs how many.

    Returns:
      How many are left, and how many were dropped.
    """
    rows = _read(path)
    kept = [row for row in rows if step and row["step"] <= step][:most]
    if len(kept) < len(rows):
        log.warning(
            "%s: dropped %d lines past step %d, which the run computes again",
            path, len(rows) - len(kept), step,
        )  # fmt: skip
    if path.exists():
        new = path.with_suffix(".new")  # renamed when complete: a kill loses nothing
        new.write_text("".join(map(_line, kept)), encoding="utf-8")
        new.replace(path)
    return len(kept), len(rows) - len(kept)


def _markdown(row: Mapping[str, Any]) -> str:
    """A row of text as a Markdown section; `responses` and what is said of each together."""
    parts = [f"## step {row['step']}, sample {row['index']}\n"]
    texts = row.get("responses")
    texts = texts if isinstance(texts, list) else []

    def of_responses(name: str) -> bool:
        value = row[name]
        several = isinstance(value, list) and len(value) == len(texts)
        return bool(texts) and several and name != "prompt"  # a list of messages

    names = [name for name in row if name not in ("step", "index")]
    for name in names:
        if not of_responses(name):
            parts.append(f"**{name}**\n\n{_fenced(str(row[name]))}")
    for i, text in enumerate(texts):
        said = [
            f"{name} {row[name][i]:.4g}" if isinstance(row[name][i], float)
            else f"{name} {row[name][i]}"
            for name in names
            if name != "responses" and of_responses(name)
        ]  # fmt: skip
        title = f"**response {i + 1}**" + (": " + ", ".join(said) if said else "")
        parts.append(f"{title}\n\n{_fenced(str(text))}")
    return "\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    """A text in a fence that is longer than any in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"
