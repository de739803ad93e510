"""Draws win rate against KL for several methods, with the optimum that bounds all of them.

  python -m alignax.frontier ctrl=runs/ctrl/* rlhf=runs/rlhf/* --out frontier.png

Every run is a point of its method's curve: the last `inference_win_rate` of its
metrics.jsonl. A grey line shows the best win rate that any policy reaches at a KL
(theory/infalign.py). A point that is surely above it is an error of measurement, and is
reported as one. Every point is one test; Holm's correction holds the probability that any
correct point of a table is reported below 5 %, however many there are.

Source: Balashankar et al. 2024, https://arxiv.org/abs/2412.19792; compare at equal KL,
never at equal β. Correction: Holm 1979, https://www.jstor.org/stable/4615733
"""

import argparse
import functools
import glob
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignax.reports import metrics
from alignax.reports.curves import BLUE, GREEN, GREY, ORANGE, PINK
from alignax.reports.metrics import Interval
from alignax.theory import infalign

# 'kl' (nats) and win rates by name, [strengths, units]; a unit is a prompt, or a prompt
# and a seed, whose measurements are independent of the others'
Points = Mapping[str, Float[np.ndarray, "_ _"]]
COLORS = (BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#E69F00", "#000000", GREY)
EVALUATION = "eval/inference_win_rate/"
ERROR = 0.05  # probability of any false report, of all points together
NORMAL = statistics.NormalDist()
Z95 = NORMAL.inv_cdf(0.975)  # half of a 95 % interval, in standard errors


def procedure(rate: str) -> infalign.Procedure:
    """The inference-time procedure that is applied to samples before they are compared.

    Args:
      rate: 'standard', 'best_of_N' or 'worst_of_N'.

    Raises:
      ValueError: another name.
    """
    if rate == "standard":
        return infalign.standard()
    found = re.fullmatch(r"(best|worst)_of_(\d+)", rate)
    if not found:
        raise ValueError(f"{rate!r} is not standard, best_of_N or worst_of_N")
    make = infalign.best_of if found[1] == "best" else infalign.worst_of
    return make(int(found[2]))


@functools.cache
def curve(rate: str, t: float | None = None) -> Float[np.ndarray, "2 P"]:
    """(KL in nats, win rate) of ideal policies, by increasing KL.

    Args:
      rate: as in `procedure`.
      t: of the transform e^{tu} of the reward, where 0 is u itself; None is the optimum
        over all policies.
    """
    of, points = procedure(rate), [(0.0, 0.5)]
    betas = np.geomspace(2.0, 0.03, 32) if t is None else np.geomspace(2.0, 0.004, 200)
    for beta in betas:
        if t is None:
            f = infalign.optimal(of, beta)[1]
        else:
            u = infalign.GRID
            phi = infalign.exponential(u, t=t) if t else infalign.identity(u)
            f = infalign.tilt(phi, beta)
        points.append((infalign.kl(f), infalign.win_rate(f, of)))
    return np.array(points).T


def between(kl: Any, wins: Any, at: Any) -> Any:
    """Win rates at other KLs, interpolated in sqrt(KL); nan beyond the points."""
    kl, wins = np.asarray(kl), np.asarray(wins)
    order = np.argsort(kl)
    root = np.sqrt(np.maximum(kl[order], 0.0))
    at = np.sqrt(np.maximum(at, 0.0))
    return np.interp(at, root, wins[order], left=np.nan, right=np.nan)


def optimum(rate: str, kl: Any, t: float | None = None) -> Any:
    """`curve` at other KLs."""
    own, wins = curve(rate, t)
    return between(own, wins, kl)


def at_kl(points: Points, rate: str, kl: float, units: Any = slice(None)) -> float:
    """A method's mean win rate at a mean KL, interpolated between its strengths.

    Returns:
      nan if the KL is not between two strengths.
    """
    own, wins = (points[k][:, units].mean(1) for k in ("kl", rate))
    return float(between(own, wins, kl))


def compare(one: Points, other: Points, rate: str, kl: float) -> Interval:
    """Difference of two methods' win rates at one KL, with a bootstrap over units.

    Args:
      one, other: with the same units.
      rate: as in `procedure`.
      kl: nats, between strengths of both.

    Raises:
      ValueError: different units, or a KL that one of them does not reach.
    """
    units = one["kl"].shape[1]
    if other["kl"].shape[1] != units:
        raise ValueError(f"{units} units and {other['kl'].shape[1]}: not the same")

    def gap(some=slice(None)):
        return at_kl(one, rate, kl, some) - at_kl(other, rate, kl, some)

    if np.isnan(gap()):
        raise ValueError(f"a KL of {kl} is not between the strengths of both")
    rng = np.random.default_rng(0)
    draws = [gap(rng.integers(units, size=units)) for _ in range(1000)]
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return Interval(gap(), float(low), float(high))


def excess(points: Points, rate: str, *, many: int = 1) -> Float[np.ndarray, " S"]:
    """How far each strength is above the optimum: a value above 0 is a bug.

    Args:
      points: of one method.
      rate: as in `procedure`.
      many: points that are looked at together, these among them: Bonferroni's correction.

    Returns:
      The low end of an interval of (win rate - optimum) at the strength's KL, one-sided
      with an error of 2.5 % / many: normal, with the standard error of a bootstrap over
      units. -inf beyond the KLs of `curve`.

    Raises:
      ValueError: many below 1.
    """
    if many < 1:
        raise ValueError(f"many={many}, expected at least 1")
    units, rng = points["kl"].shape[1], np.random.default_rng(0)

    def above(some=slice(None)):
        kl, wins = (points[k][:, some].mean(1) for k in ("kl", rate))
        return wins - optimum(rate, kl)  # nan beyond the curve

    draws = np.array([above(rng.integers(units, size=units)) for _ in range(300)])
    low = above() - NORMAL.inv_cdf(1 - ERROR / 2 / many) * draws.std(0, ddof=1)
    return np.nan_to_num(low, nan=-np.inf)


def p_values(points: Points, rate: str) -> Float[np.ndarray, " S"]:
    """Of each strength: p of the hypothesis that it is not above the optimum.

    A win rate and a KL are tested together: p is twice the error of the narrowest one-sided
    intervals that leave the point above the optimum. The intervals are normal, as wide as
    the 95 % intervals of the measurement, and may depend on each other.

    Args:
      points: from `read`, with the ends of the intervals.
      rate: as in `procedure`.

    Returns:
      At most 1; 1 where the point itself is not above the optimum, or beyond `curve`.
    """
    kl, wins = points["kl"][:, 0], points[rate][:, 0]
    errors = (
        (points["kl/hi"][:, 0] - kl) / Z95,
        (wins - points[f"{rate}/lo"][:, 0]) / Z95,
    )
    low, high = np.zeros(len(kl)), np.full(len(kl), 12.0)  # standard errors

    def is_above(z):
        with np.errstate(
            invalid="ignore"
        ):  # 0 times the infinite interval of one prompt
            return wins - z * errors[1] > optimum(rate, kl + z * errors[0])

    ever = is_above(low)
    for _ in range(50):
        middle = (low + high) / 2
        further = is_above(middle)
        low, high = np.where(further, middle, low), np.where(further, high, middle)
    p = np.array([2 * NORMAL.cdf(-z) for z in low])
    return np.where(ever, np.minimum(p, 1.0), 1.0)


def holm(p: Sequence[float] | Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """p-values of M tests, corrected for their number; the tests may depend on each other.

    Rejecting all of at most α has a probability of at most α to reject any true hypothesis.

    Source: Holm 1979, https://www.jstor.org/stable/4615733
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    out = np.empty(len(p))
    out[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(out, 1.0)


def draw(
    methods: Mapping[str, Points], rates: Sequence[str], *,
    transforms: Mapping[str, float] | None = None, kl: float | None = None,
    most: float = np.inf,
) -> Figure:  # fmt: skip
    """Draws one panel per procedure: methods as curves, and the optimum.

    Args:
      methods: points by name.
      rates: as in `procedure`, one per panel.
      transforms: {method: t}; its ideal policies are drawn dashed, in its colour.
      kl: in nats, marked by a line, where methods are compared.
      most: nats, the largest end of the axis.
    """
    figure = Figure(figsize=(1.9 + 3.8 * len(rates), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    colors = dict(zip(methods, COLORS * len(methods), strict=False))
    furthest = max(float(p["kl"].mean(1).max()) for p in methods.values())
    panels = figure.subplots(1, len(rates), squeeze=False)[0]
    for axes, rate in zip(panels, rates, strict=True):
        best = curve(rate)
        axes.fill_between(*best, 1.0, color="#EEEEEE", linewidth=0)
        axes.plot(*best, color="#AAAAAA", linewidth=1.2)
        style: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (4, 3))}
        for name, t in (transforms or {}).items():
            axes.plot(*curve(rate, t), color=colors[name], **style)
        if kl is not None:
            axes.axvline(kl, color=GREY, **style)
        for name, points in methods.items():
            x, y = (points[k].mean(1) for k in ("kl", rate))
            order = np.argsort(x)
            axes.plot(
                x[order], y[order], "o-", color=colors[name], label=name, markersize=4,
                linewidth=1.4,
            )  # fmt: skip
        axes.set_title(rate.replace("_", " "), fontsize=10, loc="left")
        axes.set_xlabel("KL to the reference, nats", fontsize=8, color=GREY)
        axes.set_ylabel("win rate against the reference", fontsize=8, color=GREY)
        axes.tick_params(labelsize=8, color=GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, min(most, 1.05 * furthest))
        axes.set_ylim(top=1.0)
        axes.annotate(
            "no policy is here", (0.02, 0.98), xycoords="axes fraction", fontsize=8,
            color=GREY, va="top",
        )  # fmt: skip
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8,
        frameon=False, title="dashed: theory" if transforms else None, title_fontsize=8,
    )  # fmt: skip
    return figure


def read(workdirs: Sequence[str | pathlib.Path]) -> dict[str, np.ndarray]:
    """The last measurement of every run, by increasing KL; each run has one unit.

    Returns:
      Points, with 'kl/hi' and the 'RATE/lo' of each rate: the ends of their intervals.

    Raises:
      FileNotFoundError: no run, or a folder that has no metrics.jsonl.
      ValueError: a run without `inference_win_rate`; runs that measured different rates.
    """
    if not workdirs:
        raise FileNotFoundError("no run")
    found: list[dict[str, float]] = []
    for workdir in workdirs:
        rows = [row for row in metrics.read(workdir) if EVALUATION + "kl" in row]
        if not rows:
            raise ValueError(f"{workdir} has no evaluation inference_win_rate")
        kept = {
            k.removeprefix(EVALUATION): v
            for k, v in rows[-1].items()
            if re.fullmatch(
                EVALUATION + r"(kl(/hi)?|(standard|(best|worst)_of_\d+)(/lo)?)", k
            )
        }
        if found and kept.keys() != found[0].keys():
            raise ValueError(
                f"{workdir} measured {sorted(kept)}, {workdirs[0]} {sorted(found[0])}"
            )
        found.append(kept)
    found.sort(key=lambda row: row["kl"])
    return {k: np.array([[row[k]] for row in found]) for k in found[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws runs, prints win rates at one KL, and reports points above the optimum.

    Raises:
      SystemExit: arguments or runs that are wrong; points above the optimum.
    """
    parser = argparse.ArgumentParser("python -m alignax.frontier")
    parser.add_argument("runs", nargs="+", metavar="METHOD=WORKDIRS")
    parser.add_argument("--kl", type=float, default=0.5, help="where to compare, nats")
    parser.add_argument("--out", default="frontier.png")
    given = parser.parse_args(arguments)
    methods: dict[str, list[str]] = {}
    for part in given.runs:
        name, found, pattern = part.partition("=")
        if not found:
            raise SystemExit(f"{part!r} is not METHOD=WORKDIRS")
        some = sorted(glob.glob(pattern))
        if not some:
            raise SystemExit(f"{pattern!r} of {name} matches no folder")
        methods.setdefault(name, []).extend(some)
    try:
        points = {name: read(dirs) for name, dirs in methods.items()}
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    rates = [k for k in next(iter(points.values())) if re.fullmatch(r"\w+_of_\d+", k)]
    if odd := [n for n, p in points.items() if not {*rates} <= p.keys()]:
        raise SystemExit(f"{odd} did not measure {rates}")
    draw(points, rates, kl=given.kl).savefig(given.out, dpi=130)
    print(f"{given.out}\nat {given.kl:g} nats:")
    for name, one in points.items():
        shown = [f"{rate} {at_kl(one, rate, given.kl):.3f}" for rate in rates]
        print(f"  {name}: " + ", ".join(shown))
    print(check_points(points, ("standard", *rates)))


def check_points(methods: Mapping[str, Points], rates: Sequence[str]) -> str:
    """A line that says that no point is above what any policy reaches.

    Args:
      methods: from `read`, by name.
      rates: as in `procedure`; each strength of each method is one point for each of them.

    Raises:
      SystemExit: names the points that are above it after Holm's correction, with their
        corrected p-values.
    """
    places = [
        (name, rate, i)
        for name, one in methods.items()
        for rate in rates
        for i in range(len(one["kl"]))
    ]
    p = np.concatenate([p_values(x, rate) for x in methods.values() for rate in rates])
    told = f"Holm's correction for {len(p)} points, error {ERROR:g} for all together"
    corrected = holm(p)
    bugs = []
    for (name, rate, i), found in zip(places, corrected, strict=True):
        if found <= ERROR:
            wins, kl = methods[name][rate][i, 0], methods[name]["kl"][i, 0]
            bugs.append(
                f"{name}: a {rate} win rate of {wins:.3f} at {kl:.3f} nats, corrected p = "
                f"{found:.2g}"
            )
    if bugs:
        raise SystemExit(
            f"above what any policy reaches, after {told} (is the KL a sum over tokens, of "
            "samples of the policy, and do ties count half?):\n  " + "\n  ".join(bugs)
        )
    return f"no point is above what any policy reaches, after {told}; least p {min(corrected):.2g}"


if __name__ == "__main__":
    main()
