"""Learning curves of a run as pictures, for `python -m alignax.plots WORKDIR`.

Reads WORKDIR/metrics.jsonl and, for a run with stages, WORKDIR/STAGE/metrics.jsonl. Writes
learning_curves.png (losses, rewards, evaluations) and details.png (optimiser, padding and
all other metrics). A metric `x` with `x/lo` and `x/hi` is drawn with its interval.
"""

import math
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from alignax.reports import metrics

Row = dict[str, float]  # one line of metrics.jsonl

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B6B6B"
SMOOTH_ABOVE = 60  # points; longer training curves are drawn faint, with a running mean


class Panel(NamedTuple):
    """One small plot: the keys whose part after 'train/' or 'eval/' matches."""

    title: str
    unit: str
    pattern: str
    line: float | None = None  # a level to mark: chance, or no change
    share: bool = False  # in [0, 1]
    from_zero: bool = False  # the axis starts at 0, so that noise does not look large
    smooth: bool = True  # False for values that are set, not measured


LEARNED = (
    Panel("Loss", "nats", r"(^|/)loss$"),
    Panel("Preference accuracy", "share of pairs", r"(^|/|_)accuracy$", 0.5, True),
    Panel("Win rate", "share of prompts", r"(^|/)(win_rate|strict_wins)$", 0.5, True),
    Panel("Margin", "reward, chosen − rejected", r"(^|/)margin$", 0.0),
    Panel("Reward", "", r"(^|/)(?!\w*_(?:std|min|max)$)(\w+_)?reward(_\w+)?(/[^/]+)?$"),
    Panel("Log-ratio to reference", "nats / response", r"(^|/)log_ratio(_\w+)?$", 0.0),
    Panel(
        "KL to reference", "nats / response", r"(^|/)(?!approx_)(\w+_)?kl(_\w+)?$", 0.0
    ),
    Panel("Negative log-likelihood", "nats / token", r"(^|/)nll$"),
    Panel("Log-probability", "nats / response", r"(^|/)log_prob$"),
    Panel("Throughput", "real tokens / s", r"(^|/)tokens_per_second$", from_zero=True),
)
DETAILS = (
    Panel("Perplexity", "", r"(^|/)perplexity$"),
    Panel("KL to the behaviour policy", "nats / token", r"(^|/)approx_kl$", 0.0),
    Panel("Entropy", "nats / token", r"(^|/)entropy$"),
    Panel("Tokens of a response", "", r"(^|/)tokens(_p\d+)?$", from_zero=True),
    Panel("Gradient norm", "", r"(^|/)grad_norm$"),
    Panel("Learning rate", "", r"(^|/)lr$", smooth=False),
    Panel("Padding", "share of tokens", r"(^|/)padding$", None, True),
    Panel("Model FLOPs utilisation", "share of peak", r"(^|/)mfu$", None, True),
)


def plot(workdir: str | pathlib.Path) -> list[pathlib.Path]:
    """Draws the metrics of a run into its workdir.

    Args:
      workdir: a local folder with a metrics.jsonl, in it or in the folders of its stages.

    Returns:
      Paths of the pictures.

    Raises:
      FileNotFoundError: there is no metrics.jsonl.
      ValueError: every metrics.jsonl is empty.
    """
    workdir = pathlib.Path(workdir)
    stages = _stages(workdir)
    figures = {
        "learning_curves.png": [(name, rows, _learned(rows)) for name, rows in stages],
        "details.png": [(name, rows, _details(rows)) for name, rows in stages],
    }
    written = []
    for file, parts in figures.items():
        parts = [part for part in parts if part[2]]
        if parts:
            figure = _figure(parts, f"{workdir.resolve().name}")
            figure.savefig(workdir / file, dpi=130)
            written.append(workdir / file)
    return written


def _stages(workdir: pathlib.Path) -> list[tuple[str, list[Row]]]:
    """(name, rows) of each stage, in the order in which they were written."""
    files = [workdir / "metrics.jsonl", *workdir.glob("*/metrics.jsonl")]
    files = [file for file in files if file.exists()]
    if not files:
        raise FileNotFoundError(
            f"{workdir} has no metrics.jsonl, nor has a folder in it: is it a workdir?"
        )
    files.sort(key=lambda file: (file.stat().st_mtime, str(file)))
    stages = [(file.parent, metrics.read(file.parent)) for file in files]
    found = [
        ("" if folder == workdir else folder.name, rows)
        for folder, rows in stages
        if rows
    ]
    if not found:
        raise ValueError(f"{files[0]} is empty: the run has not made a step yet")
    return found


def _series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a key; if two lines have one step, the later one counts."""
    points = {row["step"]: row[key] for row in rows if key in row}
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps])


def _keys(rows: Iterable[Row]) -> list[str]:
    """Every metric in the order of its first appearance, without the ends of intervals."""
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    ends = {f"{key}/{end}" for key in keys for end in ("lo", "hi")}
    return [key for key in keys if key not in ends]


def _match(
    panels: Sequence[Panel], keys: Sequence[str]
) -> list[tuple[Panel, list[str]]]:
    """Panels with their keys; a key has one panel, and panels without keys are left out."""
    taken: dict[Panel, list[str]] = {}
    for key in keys:
        for panel in panels:
            if re.search(panel.pattern, key.partition("/")[2]):
                taken.setdefault(panel, []).append(key)
                break
    # training first: evaluations are drawn over it
    order = {panel: sorted(keys, key=_is_eval) for panel, keys in taken.items()}
    return [(panel, order[panel]) for panel in panels if panel in order]


def _learned(rows: Sequence[Row]) -> list[tuple[Panel, list[str]]]:
    """The known panels, then one for every other evaluation that has an interval."""
    keys = _keys(rows)
    known = _match(LEARNED, keys)
    rest = _others(keys, [*LEARNED, *DETAILS])
    all_keys = {key for row in rows for key in row}
    return known + [part for part in rest if f"{part[1][0]}/lo" in all_keys]


def _details(rows: Sequence[Row]) -> list[tuple[Panel, list[str]]]:
    """The panels of DETAILS, then one for every metric that has no panel yet."""
    keys = _keys(rows)
    drawn = {key for _, keys in _learned(rows) for key in keys}
    rest = _others(keys, [*LEARNED, *DETAILS])
    return _match(DETAILS, keys) + [part for part in rest if part[1][0] not in drawn]


def _others(
    keys: Sequence[str], panels: Sequence[Panel]
) -> list[tuple[Panel, list[str]]]:
    matched = {key for _, keys in _match(panels, keys) for key in keys}
    rest = [key for key in keys if key not in matched]
    return [
        (Panel(_words(key.partition("/")[2] or key), "", ""), [key]) for key in rest
    ]


def _is_eval(key: str) -> bool:
    return not key.startswith("train/")


def _words(name: str) -> str:
    words = name.replace("_", " ").replace("/", ": ")
    return words[:1].upper() + words[1:]


def _labels(keys: Sequence[str]) -> list[str]:
    """A label for each key of a panel, different from the others'."""
    labels = []
    for key in keys:
        kind, _, name = key.partition("/")
        group, _, metric = name.rpartition("/")
        if pair := re.search(r"_(chosen|rejected)$", metric):
            label = pair[1]
        elif kind != "eval":
            label = kind
        else:
            label = group.replace("_", " ") or kind
        labels.append(label)
    return [
        label if labels.count(label) == 1 else key.rpartition("/")[2].replace("_", " ")
        for key, label in zip(keys, labels, strict=True)
    ]


def _figure(parts: Sequence[tuple[str, Sequence[Row], Any]], title: str) -> Figure:
    """One band of small plots per stage, all in the columns of one grid."""
    widest = max(len(panels) for *_, panels in parts)
    columns = min(widest, 4 if len(parts) > 1 or widest > 6 else 3)
    heights = [math.ceil(len(panels) / columns) for *_, panels in parts]
    figure = Figure(
        figsize=(max(4.5, 3 * columns), 2.2 * sum(heights) + 0.3 * len(parts) + 0.4),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(sum(heights), columns)
    for band, (name, rows, panels) in enumerate(parts):
        top = sum(heights[:band])
        for i, (panel, keys) in enumerate(panels):
            axes = figure.add_subplot(grid[top + i // columns, i % columns])
            _draw(axes, panel, keys, rows)
            if name and i == 0:
                axes.text(
                    0, 1.25, name.replace("_", " "), transform=axes.transAxes,
                    fontsize=11, fontweight="bold", color=GREY,
                )  # fmt: skip
    return figure


def _draw(axes: Axes, panel: Panel, keys: Sequence[str], rows: Sequence[Row]) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8, color=GREY)
    axes.set_ylabel(panel.unit, fontsize=8, color=GREY)
    axes.tick_params(labelsize=8, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    if panel.line is not None:
        axes.axhline(panel.line, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    for key, label, color in zip(keys, _labels(keys), _colors(keys), strict=True):
        _curve(axes, rows, key, {"label": label, "color": color}, panel.smooth)
    if panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    steps = [row["step"] for row in rows]
    if min(steps) < max(steps):
        margin = 0.03 * (max(steps) - min(steps))
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if len(keys) > 1:
        axes.legend(fontsize=7.5, frameon=False, handlelength=1.2, borderaxespad=0.2)


def _colors(keys: Sequence[str]) -> list[str]:
    """Training is blue, evaluations are not; chosen is blue, rejected orange."""
    others = [ORANGE, GREEN, PINK, GREY, *(f"C{i}" for i in range(10))]
    out = []
    for key in keys:
        first = not _is_eval(key) and not key.endswith("rejected")
        if first and BLUE not in out:
            out.append(BLUE)
        else:
            out.append(next((c for c in others if c not in out), GREY))
    return out


def _curve(
    axes: Axes, rows: Sequence[Row], key: str, style: dict[str, Any], smooth: bool
) -> None:
    steps, values = _series(rows, key)
    color = style["color"]
    line = {"linewidth": 1.6, **style}
    if len(steps) > 1 and not _is_eval(key):
        if smooth and len(steps) > SMOOTH_ABOVE:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = _running_mean(values)
        axes.plot(steps, values, **line)
        return
    axes.plot(steps, values, marker="o", markersize=4, **line)
    lo_steps, lo = _series(rows, f"{key}/lo")
    hi_steps, hi = _series(rows, f"{key}/hi")
    if not len(lo) or not np.array_equal(lo_steps, hi_steps):
        return
    if len(lo) > 1:
        axes.fill_between(lo_steps, lo, hi, color=color, alpha=0.18, linewidth=0)
    else:
        axes.vlines(lo_steps, lo, hi, color=color, linewidth=1.6)
        axes.annotate(
            f"{values[-1]:.3g}", (steps[-1], values[-1]), (6, 0),
            textcoords="offset points", va="center", fontsize=8, color=color,
        )  # fmt: skip


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a thirtieth of the run, shorter at its ends; skips nan."""
    half = max(1, len(values) // 60)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    finite = (window[np.isfinite(window)] for window in windows)
    return np.array([window.mean() if window.size else np.nan for window in finite])
