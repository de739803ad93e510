"""CTRL: quantiles by hand and in distribution, transforms against the theory, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from shaping_groups import firsts, group

from alignax import plugin
from alignax.shaping import ctrl
from alignax.theory import infalign

pytestmark = pytest.mark.slow

RANKED = ("ecdf", "laplace", "leave_one_out")  # those that read the order alone


def calibrate(rewards, baseline, kind="ecdf"):
    return np.asarray(ctrl.calibrate(jnp.float32(rewards), jnp.float32(baseline), kind))


def phi(rewards, baseline, **hyper):
    """What responses of one token earn."""
    return firsts(ctrl.shape(group(rewards), jnp.float32(baseline), **hyper))


def quantiles(u, k=1000, **hyper):
    """Φ at quantiles, multiples of 1/k."""
    u = np.asarray(u)
    return phi([u * k - 0.5], [np.arange(k)], **hyper)[0]


# -- quantiles


@pytest.mark.parametrize(
    "kind, want",  # of -1, 0, 1, 2, 3, 5 among 1, 2, 2, 4
    [("ecdf", [0, 0, 1 / 8, 1 / 2, 3 / 4, 1]),
     ("laplace", [0.1, 0.1, 0.2, 0.5, 0.7, 0.9]),
     ("leave_one_out", [0, 0, 0, 1 / 2, 3 / 4, 1]),
     ("interpolated", [0, 0, 1 / 8, 1 / 2, 3 / 4, 1])],
)  # fmt: skip
def test_golden_numbers(kind, want):
    got = calibrate([[-1, 0, 1, 2, 3, 5]], [[2, 1, 4, 2]], kind)
    np.testing.assert_allclose(got, [want], rtol=1e-6, atol=1e-7)


def test_interpolation_is_linear_between_neighbours():
    """Order statistics 0, 1, 3 stand at 1/6, 3/6, 5/6."""
    got = calibrate([[0.25, 0.75, 2.0, 2.5]], [[3, 0, 1]], "interpolated")
    np.testing.assert_allclose(got, [[0.25, 5 / 12, 2 / 3, 0.75]], rtol=1e-6)


def test_the_gaussian_is_that_of_the_samples_moments():
    """Mean 3, variance 2: a deviation above is Φ(1)."""
    got = calibrate([[3.0, 3 + 2**0.5, 3 - 2 * 2**0.5]], [[1, 2, 3, 4, 5]], "gaussian")
    np.testing.assert_allclose(got, [[0.5, 0.8413447, 0.0227501]], rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
def test_the_gaussian_of_equal_samples_is_a_step(value):
    """Rounding in their mean is not a deviation."""
    got = calibrate([[value - 1, value, value + 1]], [[value] * 7], "gaussian")
    np.testing.assert_array_equal(got, [[0, 0.5, 1]])


def test_a_quantile_in_the_global_table_compares_prompts():
    got = calibrate([[0.5], [10.5]], [[0, 1], [10, 11]], "global")
    np.testing.assert_array_equal(got, [[0.25], [0.75]])
    table = calibrate([[0.5], [10.5]], [[0, 1, 10, 11]], "global")
    np.testing.assert_array_equal(table, got)
    assert plugin.load("shaping", "ctrl", {"calibration": "global"}).baseline == "pool"
    assert plugin.load("shaping", "ctrl").baseline == "reference"
    np.testing.assert_array_equal(calibrate([[0.5], [10.5]], [[0, 1], [10, 11]]), 0.5)


def test_a_zero_ties_with_a_negative_zero():
    np.testing.assert_array_equal(calibrate([[0.0, -0.0]], [[-0.0, 0.0]]), [[0.5, 0.5]])


@pytest.mark.parametrize("kind", ctrl.CALIBRATIONS)
@pytest.mark.parametrize("decimals", [0, 8], ids=["ties", "continuous"])
def test_quantiles_are_probabilities_in_the_order_of_rewards(kind, decimals):
    rng = np.random.default_rng(0)
    rewards = np.sort(3 * rng.normal(size=(20, 30)).round(decimals), 1)
    baseline = rng.normal(size=(20, 5)).round(decimals)
    rewards[:, :5] = baseline  # some are among the samples
    rewards = np.sort(rewards, 1)
    got = calibrate(rewards, baseline, kind)
    assert (got >= 0).all()
    assert (got <= 1).all()
    if kind != "leave_one_out":  # one that is left out is beside one that is not
        assert (np.diff(got) >= -1e-6).all()
    assert np.ptp(got) > 0.5


@pytest.mark.parametrize("kind", RANKED)
@pytest.mark.parametrize(
    "how", [lambda x: 5 * x - 3, np.exp, lambda x: x**3, np.arctan]
)
def test_an_increasing_transform_of_a_prompts_rewards_changes_nothing(kind, how):
    rng = np.random.default_rng(1)
    rewards, baseline = rng.normal(size=(3, 8)), rng.normal(size=(3, 20)).round(1)
    rewards[:, :4] = baseline[:, :4]
    want = calibrate(rewards, baseline, kind)
    np.testing.assert_array_equal(calibrate(how(rewards), how(baseline), kind), want)


def test_each_prompt_may_have_its_own_transform():
    rng = np.random.default_rng(2)
    rewards, baseline = rng.normal(size=(3, 8)), rng.normal(size=(3, 20))
    want = calibrate(rewards, baseline)
    scale, shift = np.array([[0.01], [1], [100]]), np.array([[5], [-70], [0]])
    got = calibrate(rewards * scale + shift, baseline * scale + shift)
    np.testing.assert_array_equal(got, want)
    other = calibrate(rewards * scale + shift, baseline * scale + shift, "global")
    assert not np.allclose(other, calibrate(rewards, baseline, "global"))


@pytest.mark.parametrize("kind", ["ecdf", "laplace", "interpolated"])
@pytest.mark.parametrize("decimals", [0, 1, 8], ids=["many_ties", "ties", "continuous"])
def test_the_mean_over_the_samples_themselves_is_a_half(kind, decimals):
    """Every pair counts once, however many tie; binary fractions make it exact."""
    baseline = np.random.default_rng(3).normal(size=(10, 64)).round(decimals)
    got = calibrate(baseline, baseline, kind).astype(float)
    if kind == "laplace":
        np.testing.assert_allclose(got.mean(1), 0.5, atol=1e-7)
    else:
        np.testing.assert_array_equal(got.mean(1), 0.5)


PROMPTS, FRESH, K = 1000, 20, 400  # 20,000 fresh samples of the reference
DISTRIBUTIONS = (
    lambda z: z,
    np.exp,
    lambda z: 0.01 * z - 3,
    lambda z: z**3,
    lambda z: -np.exp(-z),
)


def fresh(distributions=DISTRIBUTIONS, seed=0):
    """Rewards of fresh reference samples and of the K; each prompt has another distribution."""
    z = np.random.default_rng(seed).normal(size=(PROMPTS, FRESH + K))
    for i, sample in enumerate(distributions):
        z[i :: len(distributions)] = sample(z[i :: len(distributions)])
    return z[:, :FRESH], z[:, FRESH:]


def uniformity(u):
    """p-value of Kolmogorov and Smirnov's test."""
    return stats.kstest(np.asarray(u, float).ravel(), "uniform").pvalue


@pytest.mark.parametrize("kind", ["ecdf", "laplace", "interpolated", "leave_one_out"])
def test_calibrated_rewards_of_the_reference_are_uniform(kind):
    """Whatever the distribution of the reward; a step of 1/K is below what 20,000 can see."""
    assert uniformity(calibrate(*fresh(), kind)) > 1e-4


def test_calibrated_against_another_distribution_they_are_not_uniform():
    rewards, baseline = fresh()
    assert uniformity(calibrate(rewards, np.roll(baseline, 1, 0))) < 1e-6
    rewards, baseline = fresh(DISTRIBUTIONS[:1])
    assert uniformity(calibrate(rewards, baseline)) > 1e-4
    assert uniformity(calibrate(rewards + 0.1, baseline)) < 1e-6  # of a deviation


def test_a_normal_distribution_of_lognormal_rewards_is_not_uniform():
    assert uniformity(calibrate(*fresh(DISTRIBUTIONS[:1]), "gaussian")) > 1e-4
    assert uniformity(calibrate(*fresh(DISTRIBUTIONS[1:2]), "gaussian")) < 1e-6


@pytest.mark.parametrize("k", [4, 25, 100])
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_the_plain_quantile_is_unbiased_with_a_bounded_deviation(c, k):
    """Binomial: sd = √(c(1-c)/K) <= 1/(2√K). Tolerances are five standard errors."""
    n = 20_000
    samples = np.random.default_rng(0).uniform(size=(n, k))
    got = calibrate(np.full((n, 1), c), samples).astype(float)
    want = np.sqrt(c * (1 - c) / k)
    assert got.mean() == pytest.approx(c, abs=5 * want / n**0.5)
    assert got.std() == pytest.approx(want, rel=5 / n**0.5)
    assert got.std() <= 0.5 / k**0.5 * (1 + 5 / n**0.5)


def test_leaving_one_out_takes_off_what_a_sample_sees_of_itself():
    """A response of quantile 0.9 that is one of K = 5: the plain one is drawn to 1/2."""
    n, k, c = 40_000, 5, 0.9
    samples = np.random.default_rng(0).uniform(size=(n, k))
    samples[:, 2] = c
    own = calibrate(samples[:, 2:3], samples, "leave_one_out").astype(float)
    se = np.sqrt(c * (1 - c) / (k - 1) / n)
    assert own.mean() == pytest.approx(c, abs=5 * se)
    plain = calibrate(samples[:, 2:3], samples).astype(float)
    assert plain.mean() == pytest.approx(c * (k - 1) / k + 0.5 / k, abs=5 * se)
    # one that is not among them is compared with all of them
    others = calibrate(np.full((n, 1), 0.3), samples, "leave_one_out")
    np.testing.assert_array_equal(others, calibrate(np.full((n, 1), 0.3), samples))


# -- transforms


U = np.array([0.0, 0.001, 0.25, 0.5, 0.999, 1.0])


@pytest.mark.parametrize("t", [10.0, 2.0, -2.0, -10.0])
def test_exp_is_that_of_the_theory_and_bounded(t):
    got = quantiles(U, transform="exp", t=t)
    np.testing.assert_allclose(got, infalign.exponential(U, t=t), rtol=1e-5)
    assert (np.diff(got) > 0).all()
    assert np.abs(got).max() <= 1
    ends = [np.exp(-t), 1] if t > 0 else [-1, -np.exp(t)]
    np.testing.assert_allclose(got[[0, -1]], ends, rtol=1e-5)


def test_exp_of_best_of_4_at_a_half_by_hand():
    np.testing.assert_allclose(quantiles([0.5]), [0.006737947], rtol=1e-5)  # e^-5
    np.testing.assert_allclose(quantiles([0.5], t=-10.0), [-0.006737947], rtol=1e-5)


def test_log_has_a_floor():
    got = quantiles(U, transform="log", floor=0.01)
    np.testing.assert_allclose(got, infalign.log(U, floor=0.01), rtol=1e-5, atol=1e-6)
    assert got[0] == got[1] == pytest.approx(np.log(0.01))
    got = phi(
        [[-1.0]], [np.arange(9)], transform="log", floor=0.0, calibration="laplace"
    )
    assert got == pytest.approx(np.log(0.05))


def test_identity_and_top():
    np.testing.assert_allclose(quantiles(U, transform="identity"), U, rtol=1e-6)
    got = quantiles(U, transform="top", tau=0.5)
    np.testing.assert_array_equal(got, infalign.top_quantile(U, tau=0.5))
    np.testing.assert_array_equal(got, [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_at_a_strength_of_one_is_the_best_of_n_distribution(n):
    """exp(Φ) ∝ u^(n-1)."""
    u = np.linspace(0.02, 1, 50)
    got = quantiles(u, transform="best_of", n=n)
    np.testing.assert_allclose(got, (n - 1) * np.log(u), rtol=1e-4, atol=1e-6)
    density = np.exp(got)
    np.testing.assert_allclose(density / density[-1], u ** (n - 1), rtol=1e-3)


@pytest.mark.parametrize(
    "procedure, of", [("best_of", infalign.best_of), ("worst_of", infalign.worst_of)]
)
def test_optimal_is_the_table_of_the_theory(procedure, of):
    u = np.linspace(0, 1, 101)
    got = quantiles(u, transform="optimal", procedure=procedure, n=3, beta=0.3)
    table, _ = infalign.optimal(of(3), 0.3)
    np.testing.assert_allclose(got, np.interp(u, infalign.GRID, table), atol=1e-5)
    assert (np.diff(got) >= 0).all()


@pytest.mark.parametrize("t", [10.0, -10.0])
@pytest.mark.parametrize("k, want, left", [(100, 1.133, 0.01), (20, 1.856, 0.15)])
def test_the_bias_of_exp_is_divided_out(t, k, want, left):
    """A5: the mean over all K-sample calibrations of a median response, exactly.

    What is left is that of the plug-in: 1 % of 13 % at K = 100, 9 % of 86 % at K = 20.
    """
    m = np.arange(k + 1)
    weights = stats.binom.pmf(m, k, 0.5)
    rewards, baseline = [m - 0.5], [np.arange(k)]
    truth = infalign.exponential(np.array([0.5]), t=t)
    plain, corrected = (
        weights @ phi(rewards, baseline, t=t, debias=d)[0].astype(float) / truth
        for d in (False, True)
    )
    assert plain == pytest.approx(want, abs=1e-3)
    assert corrected == pytest.approx(1, abs=left)
    got = phi(rewards, baseline, t=t, debias=True)[0]
    theory = infalign.exponential(m / k, t=t) / infalign.exp_bias(t, k, m / k)
    np.testing.assert_allclose(got, theory, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [4, 16])
def test_the_correction_keeps_the_order_up_to_where_it_is_refused(sign, k):
    rewards, baseline = [np.arange(k + 1) - 0.5], [np.arange(k)]
    steepest = sign * ctrl.STEEPEST * k
    got = phi(rewards, baseline, t=steepest, debias=True)[0]
    assert (np.diff(got) > 0).all()
    with pytest.raises(ValueError, match=rf"needs at least {k + 1} reference samples"):
        phi(rewards, baseline, t=steepest * (k + 1) / k, debias=True)


@pytest.mark.parametrize("transform", ctrl.TRANSFORMS)
def test_a_better_response_never_earns_less(transform):
    got = quantiles(np.linspace(0, 1, 41), transform=transform)
    assert (np.diff(got) >= 0).all()
    assert got[-1] > got[0]


def test_the_last_scored_token_earns_it():
    batch = group([[1.5, -1.0]], lengths=[[3, 1]])
    got = ctrl.shape(batch, jnp.float32([[0, 1, 2, 3]]), transform="identity")
    np.testing.assert_array_equal(got[0, 0], [0, 0, 0, 0, 0.5, 0])
    np.testing.assert_array_equal(got[0, 1], [0, 0, 0, 0, 0, 0])
    assert float(got[0, 0, 4]) == 0.5


# -- what is refused


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"transform": "exponential"}, "transform 'exponential' is not one of identity,"),
        ({"calibration": "rank"}, "calibration 'rank' is not one of ecdf,"),
        ({"procedure": "median_of"}, "procedure 'median_of' is not one of best_of,"),
        ({"t": 0.0}, "t is 0: the limit is transform='identity'"),
        ({"n": 1, "transform": "best_of"}, "n is 1, expected a whole number above 1"),
        ({"n": 2.5, "transform": "optimal"}, "n is 2.5, expected a whole|checking parameter 'n'"),
        ({"transform": "log", "floor": 0.0}, "floor is 0: calibration 'ecdf' may be 0"),
        ({"transform": "best_of", "floor": 0.0}, "floor is 0"),
        ({"debias": True, "calibration": "gaussian"}, "debias is for calibration 'ecdf'"),
        ({"debias": True, "t": -6.0}, "needs at least 5 reference samples, there are 3"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(hyper, message):
    hyper = {"n": 4, **hyper}
    with pytest.raises((ValueError, TypeError), match=message):
        phi([[1.0, 2.0]], [[0.0, 1.0, 2.0]], **hyper)


@pytest.mark.parametrize("kind", ["leave_one_out", "gaussian"])
def test_one_sample_has_no_spread(kind):
    with pytest.raises(ValueError, match=f"calibration '{kind}' needs 2"):
        phi([[1.0]], [[0.0]], calibration=kind)


def test_it_comes_first():
    batch = group([[1.0, 2.0]])
    batch = batch._replace(advantages=jnp.zeros(batch.mask.shape))
    with pytest.raises(ValueError, match="nothing may shape them before"):
        ctrl.shape(batch, jnp.float32([[0.0, 1.0]]))


@pytest.mark.parametrize(
    "hyper, message",
    [({"n": 1}, r"n=1 is outside \[2, inf\)"), ({"beta": 0.0}, r"beta=0.0 is outside"),
     ({"tau": 1.0}, r"tau=1.0 is outside \(0, 1\)"), ({"floor": -0.1}, "floor=-0.1")],
)  # fmt: skip
def test_ranges_are_checked_when_it_is_bound(hyper, message):
    with pytest.raises(ValueError, match=message):
        plugin.load("shaping", "ctrl", hyper)
