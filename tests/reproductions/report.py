"""What the reproductions share: rows that can fail, the style of a figure, the table."""

import json
import pathlib
import re
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from alignax.reports.curves import BLUE, GREEN, GREY, ORANGE, PINK

jax.config.update("jax_platforms", "cpu")  # the numbers of a laptop, on any machine

SEEDS = 6  # the fewest whose range is a 95 % interval of the median: 1 - 2 / 2⁶ = .97
RESULTS = pathlib.Path(__file__).parents[2] / "launch" / "results"
COLORS = (BLUE, ORANGE, GREEN, PINK, GREY, "#56B4E9")
INTRODUCTION = """# Reproductions

What papers claim, measured at the size of a laptop, each claim beside a control (an
ablation or a wrong sign) for which it has to be false. Toys show that a mechanism is
there; they do not replicate a table of results on large models.

`make repro` runs all of it and writes this file, `make repro ARGS=npo` one of them and its
rows. It fails where a claim that held does not hold any more, where a control passes, and
where a claim that proved false comes true.

Measured is the median [least, most] of {seeds} seeds: the range is a {cover:.0f} %
interval of the median, whatever the distribution. A claim holds where it does so for every seed; its
control has to be false for some, and unless it is for all, the verdict says for how many. InfAlign
has two seeds; its intervals are 95 % bootstraps over pairs of a prompt and a seed.
A number without an interval has nothing random in it. Where a claim did not come out, the
verdict is **no** and why. Seconds are wall time on two CPU cores that may have had other
work too; in brackets, processor time.
"""
HEADER = ("claim", "predicted", "measured", "control", "verdict")


class Row(NamedTuple):
    """One claim: what was predicted, what came out, and what came out of the control."""

    claim: str
    predicted: str
    measured: str
    control: str
    verdict: str
    surprise: str = ""  # why the reproduction fails, if it does


def check(
    claim: str, predicted: str, holds: Callable[..., bool], measured: Any, control: Any
) -> Row:
    """A row whose claim is to hold for every seed, and its control not to.

    Args:
      claim: in a few words; after "control:", what was done otherwise.
      predicted: the number or the relation that the paper or its specification states.
      holds: the claim as a predicate of one seed's number, or numbers.
      measured, control: a number, an array with one for each seed, or a tuple of those.
    """
    row = Row(claim, predicted, text(measured), text(control), "holds")
    true, passed = _each(holds, measured), _each(holds, control)
    if not true.all():
        return _surprise(row, f"false for {(~true).sum()} of {true.size}")
    if passed.all():
        return _surprise(row, f"its control passes, with {row.control}")
    if passed.any():
        rare = f"holds (control false for {(~passed).sum()} of {passed.size} seeds)"
        row = row._replace(verdict=rare)
    return row


def false(
    claim: str, predicted: str, holds: Callable[..., bool], measured: Any,
    beside: Any = "", *, cause: str,
) -> Row:  # fmt: skip
    """A row whose prediction proved false; should it come true, that is worth knowing.

    Args:
      claim: in a few words; after "beside:", what else is shown.
      predicted: the number or the relation that the paper or its specification states.
      holds: the claim as a predicate of one seed's number, or numbers.
      measured: a number, an array with one for each seed, or a tuple of those.
      beside: as measured, for comparison; nothing is asked of it.
      cause: why the prediction fails.
    """
    true = _each(holds, measured)
    some = f" ({true.sum()} of {true.size} seeds)" if true.any() else ""
    row = Row(claim, predicted, text(measured), text(beside), f"**no**{some}: {cause}")
    return _surprise(row, "it holds after all") if true.all() else row


def _each(holds: Callable[..., bool], value: Any) -> NDArray[np.bool_]:
    """The predicate for each seed."""
    parts = value if isinstance(value, tuple) else (value,)
    columns = np.broadcast_arrays(*map(np.atleast_1d, parts))
    return np.array([bool(holds(*seed)) for seed in zip(*columns, strict=True)])


def _surprise(row: Row, why: str) -> Row:
    problem = f"{row.claim}: predicted {row.predicted}, measured {row.measured}: {why}"
    return row._replace(verdict="**FAILS**", surprise=problem)


def text(value: Any) -> str:
    """Numbers to three digits, with the range of several; a tuple's are separated by /."""
    if isinstance(value, tuple):
        return " / ".join(map(text, value))
    if isinstance(value, str):
        return value
    if np.ndim(value) == 0:
        return f"{float(value):.3g}"
    return f"{np.median(value):.3g} [{np.min(value):.3g}, {np.max(value):.3g}]"


def figure(titles: Sequence[str], *, title: str) -> tuple[Figure, list[Axes]]:
    """A row of small plots in the style of alignax.plots."""
    drawing = Figure(figsize=(3.6 * len(titles), 2.9), layout="constrained")
    FigureCanvasAgg(drawing)
    drawing.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes = list(drawing.subplots(1, len(titles), squeeze=False)[0])
    for one, name in zip(axes, titles, strict=True):
        one.set_title(name, fontsize=10, loc="left")
        one.tick_params(labelsize=8, color=GREY)
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#E6E6E6", linewidth=0.7)
        one.set_axisbelow(True)
    return drawing, axes


def curve(axes: Axes, x: ArrayLike, seeds: ArrayLike, *, color: str, **style) -> None:
    """The median over the first axis of [SEEDS, len(x)], with the range shaded."""
    low, middle, high = np.quantile(seeds, (0, 0.5, 1), 0)
    axes.plot(x, middle, color=color, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def mark(axes: Axes, *, x: float | None = None, y: float | None = None) -> None:
    """A dashed line at a place or a level with a meaning."""
    style: dict[str, Any] = dict(color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    if x is not None:
        axes.axvline(x, **style)
    if y is not None:
        axes.axhline(y, **style)


def label(axes: Axes, x: str, y: str, *, legend: str = "best") -> None:
    """Names the axes and, unless legend is empty, tells labelled curves apart."""
    axes.set_xlabel(x, fontsize=8, color=GREY)
    axes.set_ylabel(y, fontsize=8, color=GREY)
    if legend:
        axes.legend(
            loc=legend, fontsize=7.5, frameon=False, handlelength=1.2, borderaxespad=0.2
        )


def finish(name: str, rows: Sequence[Row], drawing: Figure) -> list[Row]:
    """Saves the figure as launch/results/<name>.png, prints the table, returns rows.

    Raises:
      AssertionError: a row says otherwise than it was written to say.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    drawing.savefig(RESULTS / f"{name}.png", dpi=130)
    print(f"== {name} ==")
    print(aligned([HEADER, *(row[: len(HEADER)] for row in rows)]), flush=True)
    if surprises := [row.surprise for row in rows if row.surprise]:
        raise AssertionError("\n  ".join(["", *surprises]))
    return list(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def paper(docstring: str) -> tuple[str, str]:
    """The (authors and year, address) that a reproduction's docstring names first."""
    found = re.search(r"([A-Z]\S+ et al\. \d{4}), (https://[\w./-]*\w)", docstring)
    if not found:
        raise ValueError(
            "the docstring names no paper: 'Author et al. 2024, https://…'"
        )
    return found[1], found[2]


def write(name: str, docstring: str, rows: Sequence[Row], wall: float, cpu: float):
    """Puts a reproduction's results into launch/results/reproductions.{json,md}."""
    kept = RESULTS / "reproductions.json"
    results = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    authors, address = paper(docstring)
    results[name] = {
        "title": docstring.partition("\n\n")[0].replace("\n", " "),
        "paper": f"[{authors}]({address})",
        "rows": [dict(zip(HEADER, row, strict=False)) for row in rows],
        "seconds": f"{wall:.0f} ({cpu:.0f})",
    }
    results = dict(sorted(results.items()))
    text = json.dumps(results, indent=1, ensure_ascii=False)
    kept.write_text(text + "\n", "utf-8")
    kept.with_suffix(".md").write_text(markdown(results), "utf-8")


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table of every reproduction, and the figures below it."""
    head = ("paper", *HEADER, "seconds", "command")
    lines = [
        INTRODUCTION.format(seeds=SEEDS, cover=100 * (1 - 2 / 2**SEEDS)),
        _cells(head), "|---" * len(head) + "|",
    ]  # fmt: skip
    for name, one in results.items():
        for row in one["rows"]:
            command = f"`make repro ARGS={name}`"
            lines.append(_cells([one["paper"], *row.values(), one["seconds"], command]))
    for name, one in results.items():
        source = f"../../tests/reproductions/{name}.py"
        lines += ["", f"## {one['title']}", "", f"{one['paper']}, [{name}.py]({source})",
                  "", f"![{name}]({name}.png)"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(v.replace("|", "\\|") for v in values) + " |"


def now() -> NDArray[np.float64]:
    """(wall clock, processor time of all cores) in seconds, for differences."""
    used = sum(
        part.ru_utime + part.ru_stime
        for part in map(
            resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
    )
    return np.array([time.perf_counter(), used])
