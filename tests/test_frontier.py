"""frontier.py: comparison at equal KL, the curve no policy passes, and runs as points."""

import functools
import itertools

import numpy as np
import pytest

from alignax import frontier
from alignax.reports import metrics
from alignax.theory import infalign

pytestmark = pytest.mark.slow


def ideal(t, rate, kls=(0.1, 0.3, 0.45, 0.6, 0.8), units=8, noise=0.0):
    """Points of the policies that the transform e^{tu} leads to."""
    u, rng = infalign.GRID, np.random.default_rng(1)
    phi = infalign.exponential(u, t=t) if t else infalign.identity(u)
    laws = [infalign.at_kl(functools.partial(infalign.tilt, phi), k)[1] for k in kls]
    wins = [infalign.win_rate(f, frontier.procedure(rate)) for f in laws]
    spread = noise * rng.normal(size=units)
    kl = np.array(kls)[:, None] + spread
    return {"kl": kl, rate: np.array(wins)[:, None] + spread}


def test_win_rates_at_one_kl_are_those_of_theory():
    """training.md, Appendix A1: e^{10u} .8715 and identity .7998 at .5 nats."""
    for t, want in ((10.0, 0.8715), (0.0, 0.7998)):
        assert frontier.at_kl(ideal(t, "best_of_4"), "best_of_4", 0.5) == (
            pytest.approx(want, abs=2e-3)
        )
        assert frontier.optimum("best_of_4", 0.5, t) == pytest.approx(want, abs=1e-3)
    assert frontier.optimum("best_of_4", 0.5) == pytest.approx(0.8732, abs=1e-3)


def test_a_kl_that_no_strength_reaches_is_nan():
    points = ideal(0.0, "standard")
    assert np.isnan(frontier.at_kl(points, "standard", 0.05))
    assert np.isnan(frontier.at_kl(points, "standard", 0.9))


def test_order_of_strengths_does_not_matter():
    points = ideal(0.0, "standard")
    turned = {k: v[::-1] for k, v in points.items()}
    assert frontier.at_kl(points, "standard", 0.5) == (
        frontier.at_kl(turned, "standard", 0.5)
    )


def test_differences_are_paired_by_unit():
    """What both methods share is not noise of their difference."""
    one, other = (ideal(t, "best_of_4", noise=0.02) for t in (10.0, 0.0))
    gap = frontier.compare(one, other, "best_of_4", 0.5)
    assert gap.value == pytest.approx(0.072, abs=0.004)
    assert gap.lo <= gap.value <= gap.hi
    assert gap.hi - gap.lo < 0.01
    shuffled = {k: v[:, ::-1] for k, v in other.items()}
    apart = frontier.compare(one, shuffled, "best_of_4", 0.5)
    assert apart.hi - apart.lo > 2 * (gap.hi - gap.lo)


def test_what_cannot_be_compared_is_refused():
    one, other = ideal(10.0, "best_of_4"), ideal(0.0, "best_of_4", units=7)
    with pytest.raises(ValueError, match="8 units and 7"):
        frontier.compare(one, other, "best_of_4", 0.5)
    with pytest.raises(ValueError, match=r"a KL of 0\.9 is not between"):
        frontier.compare(one, one, "best_of_4", 0.9)
    with pytest.raises(ValueError, match="'best_of_x' is not standard"):
        frontier.procedure("best_of_x")


@pytest.mark.parametrize("rate", ["standard", "best_of_4", "worst_of_4"])
def test_a_point_above_what_any_policy_reaches_is_found(rate):
    t = {"standard": 0.0, "best_of_4": 10.0, "worst_of_4": -10.0}[rate]
    points = ideal(t, rate, kls=(0.1, 0.2, 0.35), noise=0.003)
    assert (frontier.excess(points, rate) <= 0).all()
    too_good = {**points, "kl": points["kl"] / 2}  # a mean over tokens, say
    assert (frontier.excess(too_good, rate) > 0).all()


def test_many_points_widen_the_interval_of_each():
    """Bonferroni: the normal quantile of .025 / many, at the same standard error."""
    points = ideal(10.0, "best_of_4", noise=0.003)
    one, ten, many = (
        frontier.excess(points, "best_of_4", many=m) for m in (1, 10, 200)
    )
    quantiles = 1.959964, 2.807034, 3.662260
    np.testing.assert_allclose(
        (one - many) / (one - ten),
        (quantiles[2] - quantiles[0]) / (quantiles[1] - quantiles[0]), rtol=1e-5,
    )  # fmt: skip
    assert (many < ten).all()
    with pytest.raises(ValueError, match="many=0"):
        frontier.excess(points, "best_of_4", many=0)
    far = {"kl": np.full((1, 4), 1e3), "standard": np.full((1, 4), 0.99)}
    assert frontier.excess(far, "standard") == [-np.inf]


@pytest.mark.parametrize("seed", range(4))
def test_holm_is_the_closed_test_of_all_subsets(seed):
    """A hypothesis falls if Bonferroni rejects every subset that contains it."""
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(6) ** 3, 2)  # with ties
    want = np.zeros(6)
    for size in range(1, 7):
        for some in itertools.combinations(range(6), size):
            whole = min(1.0, size * min(p[list(some)]))
            for i in some:
                want[i] = max(want[i], whole)
    np.testing.assert_allclose(frontier.holm(p), want, rtol=1e-12)
    np.testing.assert_array_equal(frontier.holm(p[::-1]), frontier.holm(p)[::-1])


def measured(wins, kl, errors, rate="standard"):
    """Points as `read` gives them, with 95 % intervals of these standard errors."""
    half = 1.959964 * np.array(errors)
    columns = {
        "kl": kl,
        rate: wins,
        "kl/hi": kl + half[0],
        f"{rate}/lo": wins - half[1],
    }
    return {k: np.asarray(v, float)[:, None] for k, v in columns.items()}


def test_p_values_are_those_of_the_normal_distribution():
    """With one side known exactly, the other decides; a line of one point is never above."""
    kl = np.array([0.2, 0.4, 0.6])
    best = frontier.optimum("standard", kl)
    for z, want in ((1.0, 0.317311), (1.959964, 0.05), (3.0, 0.002700)):
        p = frontier.p_values(measured(best + z * 0.01, kl, (0.0, 0.01)), "standard")
        np.testing.assert_allclose(p, want, rtol=1e-3)
        low = kl - z * 0.02
        p = frontier.p_values(measured(best, low, (0.02, 0.0)), "standard")
        np.testing.assert_allclose(p, want, rtol=1e-3)
    p = frontier.p_values(measured(best - 1e-9, kl, (0.1, 0.1)), "standard")
    assert (p == 1).all()
    p = frontier.p_values(measured(best + 0.1, kl, (np.inf, np.inf)), "standard")
    assert (p == 1).all()
    assert frontier.p_values(measured([0.99], np.array([1e3]), (0, 0)), "standard") == [
        1
    ]


def test_correct_points_are_seldom_reported_however_many_there_are():
    """30 points on the optimum: one by one, most tables would have a false report."""
    rng, families, many = np.random.default_rng(2), 150, 30
    kl = np.linspace(0.1, 0.8, many)
    best, false, alone = frontier.optimum("standard", kl), 0, 0
    for _ in range(families):
        wins = best + 0.01 * rng.normal(size=many)
        points = measured(wins, kl, (0.0, 0.01))
        alone += bool((points["standard/lo"][:, 0] > best).any())
        try:
            frontier.check_points({"a": points}, ["standard"])
        except SystemExit:
            false += 1
    assert alone > 0.4 * families
    assert false <= 0.05 * families


def run(folder, kl, wins, width=0.02, kl_width=0.02):
    """A run's metrics: an early evaluation that does not count, and the last."""
    name = frontier.EVALUATION
    with metrics.Writer(folder) as writer:
        writer.write(0, {name + "kl": 0.0, name + "best_of_4": 0.5})
        last = {"standard": 0.6, "best_of_4": wins, "worst_of_4": 0.6, "kl": kl}
        for key, value in list(last.items()):
            half = kl_width if key == "kl" else width
            last |= {f"{key}/lo": value - half, f"{key}/hi": value + half}
        writer.write(9, {name + key: value for key, value in last.items()})


def write(tmp_path, wins, **widths):
    for i, (kl, won) in enumerate(zip((0.2, 0.4, 0.8), wins, strict=True)):
        run(tmp_path / f"ctrl{i}", kl, won, **widths)


def test_runs_are_drawn_and_compared(tmp_path, capsys):
    write(tmp_path, (0.65, 0.75, 0.85))
    out = tmp_path / "picture.png"
    frontier.main([f"ctrl={tmp_path}/ctrl*", "--out", str(out)])
    assert out.stat().st_size > 10_000
    said = capsys.readouterr().out
    root = (0.5**0.5 - 0.4**0.5) / (0.8**0.5 - 0.4**0.5)
    assert f"ctrl: best_of_4 {0.75 + 0.1 * root:.3f}" in said
    assert (
        "no point is above what any policy reaches, after Holm's correction for 9"
        in said
    )


def test_a_run_that_cannot_be_is_named(tmp_path):
    write(tmp_path, (0.65, 0.95, 0.85))
    with pytest.raises(SystemExit) as error:
        frontier.main([f"ctrl={tmp_path}/ctrl*", "--out", str(tmp_path / "x.png")])
    assert "Holm's correction for 9 points, error 0.05" in str(error.value)
    assert "ctrl: a best_of_4 win rate of 0.950 at 0.400 nats, corrected p = " in str(error.value)  # fmt: skip


def test_a_point_that_is_above_only_by_itself_is_not_reported(tmp_path, capsys):
    """Its own 95 % intervals do not reach the optimum, but it is one of nine points."""
    won = float(frontier.optimum("best_of_4", 0.402)) + 0.0205
    write(tmp_path, (0.6, won, 0.7), width=0.02, kl_width=0.002)
    points = frontier.read([tmp_path / "ctrl1"])
    low, kl = points["best_of_4/lo"], points["kl/hi"]
    assert (low > frontier.optimum("best_of_4", kl)).all()
    frontier.main([f"ctrl={tmp_path}/ctrl*", "--out", str(tmp_path / "x.png")])
    assert "no point is above" in capsys.readouterr().out


def test_mistakes_are_named(tmp_path):
    with pytest.raises(SystemExit, match="is not METHOD=WORKDIRS"):
        frontier.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="matches no folder"):
        frontier.main([f"a={tmp_path}/none*"])
    with metrics.Writer(tmp_path / "other") as writer:
        writer.write(1, {"train/loss": 1.0})
    with pytest.raises(SystemExit, match="has no evaluation inference_win_rate"):
        frontier.main([f"a={tmp_path}/other"])
