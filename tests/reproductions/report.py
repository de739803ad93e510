"""What the reproductions share: rows that can fail, the style of a figure, the table."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignax.plots import BLUE, GREEN, GREY, ORANGE, PINK

jax.config.update("jax_platforms", "cpu")  # the numbers of a laptop, on any machine

RESULTS = pathlib.Path(__file__).parents[2] / "launch" / "results"
COLORS = (BLUE, ORANGE, GREEN, PINK, GREY)


class Row(NamedTuple):
    """One claim: what was predicted, what came out, and what came out of the control."""

    name: str
    predicted: str
    measured: str
    control: str


def check(
    name: str, predicted: str, holds: Callable[..., bool], measured: Any, control: Any
) -> Row:
    """A row whose claim holds of what was measured and fails of the control.

    Args:
      name: the claim in a few words.
      predicted: the number or the relation that the paper or its specification states.
      holds: the claim as a predicate.
      measured, control: a number, or a tuple that `holds` takes apart.

    Raises:
      AssertionError: the claim is false, or the control passes as well.
    """
    row = Row(name, predicted, text(measured), text(control))
    if not _holds(holds, measured):
        raise AssertionError(f"{name}: predicted {predicted}, measured {row.measured}")
    if _holds(holds, control):
        raise AssertionError(f"{name}: its control passes as well, with {row.control}")
    return row


def false(
    name: str,
    predicted: str,
    holds: Callable[..., bool],
    measured: Any,
    control: Any = "",
) -> Row:
    """A row whose prediction proved false; should it come true, that is worth knowing.

    Raises:
      AssertionError: the prediction holds after all.
    """
    row = Row(f"FALSE HERE: {name}", predicted, text(measured), text(control))
    if _holds(holds, measured):
        raise AssertionError(f"{name}: predicted {predicted}; it holds, {row.measured}")
    return row


def _holds(holds, value) -> bool:
    return bool(holds(*value) if isinstance(value, tuple) else holds(value))


def text(value: Any) -> str:
    """Numbers to three digits; a tuple's are separated by slashes."""
    if isinstance(value, tuple):
        return " / ".join(map(text, value))
    return value if isinstance(value, str) else f"{float(value):.3g}"


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


def label(axes: Axes, x: str, y: str, *, legend: bool = True) -> None:
    """Names the axes and, where there are labelled curves, tells them apart."""
    axes.set_xlabel(x, fontsize=8, color=GREY)
    axes.set_ylabel(y, fontsize=8, color=GREY)
    if legend:
        axes.legend(fontsize=7.5, frameon=False, handlelength=1.2, borderaxespad=0.2)


def finish(name: str, rows: Sequence[Row], drawing: Figure) -> list[Row]:
    """Saves the figure as launch/results/<name>.png, prints the table, returns rows."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    drawing.savefig(RESULTS / f"{name}.png", dpi=130)
    print(f"== {name} ==")
    print(aligned([Row("claim", "predicted", "measured", "control"), *rows]))
    return list(rows)


def aligned(rows: Sequence[Row]) -> str:
    """Rows as columns of text."""
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown(results: dict[str, tuple[Sequence[Row], float]]) -> str:
    """The table of every reproduction: {name: (rows, seconds)}."""
    lines = [
        "# Reproductions",
        "",
        "Claims of papers at the size of a laptop, each beside a control that has to fail:",
        "an ablation or a wrong sign. Written by `python tests/reproductions`; seconds are",
        "of two CPU cores. Toys show that a mechanism is there, not that a table of results",
        "on large models would be reproduced.",
        "",
        "| reproduction | claim | predicted | measured | control | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, (rows, seconds) in results.items():
        for i, row in enumerate(rows):
            cells = [f"[{name}]({name}.png)" if i == 0 else "", *row]
            cells.append(f"{seconds:.0f}" if i == 0 else "")
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """with timed() as seconds: ...; then seconds() is how long it took."""
    start, end = time.perf_counter(), []
    yield lambda: end[0] if end else time.perf_counter() - start
    end.append(time.perf_counter() - start)
