"""Tables that a run prints: counts of examples, and metrics as aligned lines."""

from typing import Any

from alignax.batch import Metrics


def summary(report: dict[str, Any]) -> str:
    """Counts of examples read, used, cut, dropped and malformed, and what was remarkable.

    Reasons follow: of rows that were dropped or malformed, and the first of every note.
    """
    names = ("read", "used", "cut", "dropped", "malformed")
    text = ", ".join(f"{report[n]} {n}" for n in names)
    for part in ("prompt", "response"):
        if many := report.get(f"cut_{part}"):
            text += f", {many} with a shorter {part}"
    if "padding" in report:
        text += (
            f", {report['padding']:.1%} padding, {report['useful']:.1%} useful tokens"
        )
    for name, (many, first) in report.get("notes", {}).items():
        text += f"\n  {name}: {many} rows; the first: {first}"
    for name in ("dropped_ids", "malformed_ids"):
        text += "".join(
            f"\n  {name.removesuffix('_ids')}: {line}" for line in report[name]
        )
    return text


def table(metrics: Metrics) -> str:
    """Metrics as aligned lines, an interval beside its value."""
    names = [k for k in metrics if not k.endswith(("/lo", "/hi")) and k != "samples"]
    width = max(map(len, names), default=0)
    lines = []
    for k in names:
        line = f"  {k:<{width}}  {metrics[k]:.4g}"
        if f"{k}/lo" in metrics:
            line += f"  [{metrics[f'{k}/lo']:.4g}, {metrics[f'{k}/hi']:.4g}]"
        lines.append(line)
    return "\n".join(lines)
