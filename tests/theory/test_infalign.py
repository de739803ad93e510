"""The theory of InfAlign against closed forms, enumeration and the tabulated optimum."""

import functools
import itertools
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from alignax.theory import infalign
from alignax.theory.infalign import GRID, best_of, standard, worst_of

FAMILIES = {
    "identity": infalign.identity(GRID),
    "log": infalign.log(GRID),
    **{
        f"exp{t}": infalign.exponential(GRID, t=t)
        for t in (-20, -10, -5, -2, 2, 5, 10, 20)
    },
}
TABLE = {  # (procedure, KL): win rate of the optimum and of transforms at that KL
    (best_of(2), 0.5): dict(optimal=0.8156, identity=0.7917, log=0.7682, exp2=0.8088,
                            exp5=0.8154, exp10=0.8031, exp20=0.7724),
    (best_of(4), 0.25): dict(optimal=0.7969, identity=0.7304, log=0.6902, exp10=0.7966),
    (best_of(4), 0.5): dict(optimal=0.8732, identity=0.7998, log=0.7682, exp2=0.8296,
                            exp5=0.8566, exp10=0.8715, exp20=0.8680),
    (best_of(4), 1.0): dict(optimal=0.9411, identity=0.8770, exp10=0.9351, exp20=0.9395),
    (worst_of(2), 0.5): {"optimal": 0.8603, "identity": 0.8403, "log": 0.8559,
                         "exp-5": 0.8587},
    (worst_of(4), 0.5): {"optimal": 0.9479, "identity": 0.8860, "log": 0.9270,
                         "exp-5": 0.9439, "exp-10": 0.9476},
}  # fmt: skip
CASES = [
    (p, k, name, want) for (p, k), row in TABLE.items() for name, want in row.items()
]


def policy(name, procedure):
    """β -> density of a family."""
    if name == "optimal":
        return lambda beta: infalign.optimal(procedure, beta)[1]
    return lambda beta: infalign.tilt(FAMILIES[name], beta)


@pytest.mark.parametrize(
    "procedure, target, name, want",
    CASES,
    ids=[f"{c[0].name}-{c[1]}-{c[2]}" for c in CASES],
)
def test_win_rates_at_equal_kl(procedure, target, name, want):
    """A1 and its table; the quadrature is good to 1e-6."""
    _, f = infalign.at_kl(policy(name, procedure), target)
    assert infalign.kl(f) == pytest.approx(target, abs=1e-6)
    assert infalign.win_rate(f, procedure) == pytest.approx(want, abs=5e-4)


@pytest.mark.parametrize(
    "procedure, target, want",
    [(best_of(2), 0.5, 0.234), (best_of(2), 1.0, 0.1128), (best_of(4), 0.5, 0.2166),
     (best_of(4), 1.0, 0.0831), (worst_of(2), 0.5, 0.2805), (worst_of(4), 0.5, 0.2084)],
    ids=lambda x: getattr(x, "name", str(x)),
)  # fmt: skip
def test_beta_of_the_optimum(procedure, target, want):
    beta, _ = infalign.at_kl(policy("optimal", procedure), target)
    assert beta == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("procedure", [best_of(4), worst_of(4)], ids=lambda p: p.name)
@pytest.mark.parametrize("beta", [0.02, 0.1, 1.0])
def test_the_optimum_is_a_fixed_point_and_never_beaten(procedure, beta):
    phi, f = infalign.optimal(procedure, beta)
    np.testing.assert_allclose(infalign.tilt(phi, beta), f, atol=1e-6 * f.max())
    target, best = infalign.kl(f), infalign.win_rate(f, procedure)
    rng = np.random.default_rng(0)
    bumps = [
        phi + 0.3 * beta * np.sin(rng.uniform(0, 20) * GRID + rng.uniform(0, 6))
        for _ in range(10)
    ]
    compared = 0
    for other in (*FAMILIES.values(), *bumps):
        try:
            _, g = infalign.at_kl(functools.partial(infalign.tilt, other), target)
        except ValueError:
            continue  # e^-20u is flat but for its first tenth: no β gives as much KL
        compared += 1
        assert infalign.kl(g) == pytest.approx(target, abs=1e-9)
        # by more than the quadrature's own error at 6001 points
        assert infalign.win_rate(g, procedure) < best - 1e-6
    assert compared >= 18  # of 20


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.02])
@pytest.mark.parametrize(
    "procedure",
    [of(n) for of in (best_of, worst_of) for n in (2, 16, 64)]
    + [infalign.keep_top(0.5)],
    ids=lambda p: p.name,
)
def test_the_solver_converges_for_large_n_and_small_beta(procedure, beta):
    phi, f = infalign.optimal(procedure, beta)
    np.testing.assert_allclose(infalign.tilt(phi, beta), f, atol=1e-8 * f.max())
    assert (np.diff(phi) >= 0).all()
    assert infalign.win_rate(f, procedure) > 0.5


def test_a_wrong_sign_is_worse_than_the_identity():
    """A3, at KL 0.5 and N = 4."""
    wins = {
        name: [infalign.win_rate(infalign.at_kl(policy(name, p), 0.5)[1], p)
               for p in (best_of(4), worst_of(4))]
        for name in ("identity", "exp10", "exp-10")
    }  # fmt: skip
    np.testing.assert_allclose(wins["identity"], [0.800, 0.886], atol=0.002)
    np.testing.assert_allclose(wins["exp10"], [0.8715, 0.676], atol=0.002)
    np.testing.assert_allclose(wins["exp-10"], [0.686, 0.948], atol=0.002)


@pytest.mark.parametrize(
    "scales, want", [((1.0,), 0.759), ((0.3, 1.0, 3.0), 0.686)], ids=["one", "three"]
)
def test_raw_gaussian_rewards_lose_to_calibrated_ones(scales, want):
    """A4: tilting N(0, s) by 1/β moves it by a = s/β: KL a²/2, win rate Φ(a/√2)."""
    s = np.array(scales)
    a = s / np.sqrt(np.mean(s**2))  # mean KL 0.5
    raw = np.mean([NormalDist().cdf(x / np.sqrt(2)) for x in a])
    _, f = infalign.at_kl(policy("identity", standard()), 0.5)
    calibrated = infalign.win_rate(f, standard())
    assert raw == pytest.approx(want, abs=0.01)
    assert calibrated == pytest.approx(0.774, abs=0.01)
    assert raw < calibrated


@pytest.mark.parametrize("outcomes", [1000, 20_000, 1_000_000])
def test_a_heavy_tail_spends_the_kl_on_one_response(outcomes):
    """A4, lognormal: no density exists, and on K responses the win rate falls with K.

    The .568 of the table is that of a million.
    """
    u = (np.arange(outcomes) + 0.5) / outcomes
    reward = np.exp([NormalDist().inv_cdf(x) for x in u])

    def optimum(beta):
        weights = np.exp((reward - reward.max()) / beta)
        return weights / weights.sum()

    low, high = 1.0, 30.0
    for _ in range(50):
        beta = (low + high) / 2
        p = optimum(beta)
        seen = p[p > 0]
        above = np.sum(seen * np.log(seen * outcomes)) > 0.5
        low, high = (beta, high) if above else (low, beta)
    wins = np.sum(optimum(high) * u)
    want = {1000: 0.648, 20_000: 0.606, 1_000_000: 0.568}[outcomes]
    assert wins < 0.774 - 0.1
    assert wins == pytest.approx(want, abs=0.002)


@pytest.mark.parametrize("beta", [0.2, 1 / 3, 1.0, 2.0])
def test_log_has_one_win_rate_for_every_n(beta):
    """A2."""
    f = infalign.tilt(FAMILIES["log"], beta)
    wins, divergence = infalign.log_closed(beta)
    assert infalign.kl(f) == pytest.approx(divergence, abs=1e-5)
    for n in (1, 2, 4, 8, 32):
        assert infalign.win_rate(f, best_of(n)) == pytest.approx(wins, abs=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_identity_has_a_closed_form(beta):
    f = infalign.tilt(FAMILIES["identity"], beta)
    wins, divergence = infalign.identity_closed(beta)
    assert infalign.win_rate(f, standard()) == pytest.approx(wins, abs=1e-5)
    assert infalign.kl(f) == pytest.approx(divergence, abs=1e-5)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_is_log_calibrated_rl(n):
    f = infalign.tilt(FAMILIES["log"], 1 / (n - 1))
    np.testing.assert_allclose(f, n * GRID ** (n - 1), atol=1e-4 * n)
    assert infalign.kl(f) == pytest.approx(infalign.kl_best_of(n), abs=1e-4)
    assert infalign.win_rate(f, standard()) == pytest.approx(n / (n + 1), abs=1e-5)


def test_the_optimum_for_one_sample_is_the_identity():
    phi, _ = infalign.optimal(standard(), 0.3)
    np.testing.assert_allclose(phi, GRID, atol=1e-9)


def test_order_statistics_hold_best_and_worst_of_n():
    for j, same in ((4, best_of(4)), (1, worst_of(4))):
        got = infalign.order_statistic(j, 4)
        np.testing.assert_allclose(got.mass(GRID), same.mass(GRID), atol=1e-12)
        np.testing.assert_allclose(got.density(GRID), same.density(GRID), atol=1e-12)


@pytest.mark.parametrize("j", [1, 20, 40])
def test_an_order_statistic_of_many_is_a_distribution(j):
    """Exactly P(Binomial(40, p) >= j): nothing cancels."""
    got = infalign.order_statistic(j, 40)
    mass = got.mass(GRID)
    np.testing.assert_allclose(mass, stats.binom.sf(j - 1, 40, GRID), atol=1e-13)
    assert mass[0] == 0
    assert mass.max() <= 1
    assert (np.diff(mass) > -1e-14).all()
    assert (got.density(GRID) >= 0).all()
    want = stats.beta.pdf(GRID[1:-1], j, 41 - j)
    np.testing.assert_allclose(got.density(GRID)[1:-1], want, rtol=1e-9, atol=1e-300)
    assert infalign.win_rate(np.ones_like(GRID), got) == pytest.approx(0.5, abs=5e-6)


@pytest.mark.parametrize(
    "procedure",
    [
        standard(),
        best_of(3),
        worst_of(3),
        infalign.order_statistic(2, 3),
        infalign.keep_top(0.4),
    ],
    ids=lambda p: p.name,
)
def test_the_reference_wins_half(procedure):
    ones = np.ones_like(GRID)
    assert infalign.win_rate(ones, procedure) == pytest.approx(0.5, abs=2e-3)
    assert infalign.kl(ones) == 0
    assert np.trapezoid(procedure.density(GRID), GRID) == pytest.approx(1, abs=1e-3)


# -- finitely many responses


def enumerated(policy, reference, n, best):
    """P(win) + P(tie) / 2 over all pairs of n samples."""
    pick = max if best else min
    probs = []
    for probabilities in (policy, reference):
        chosen = np.zeros(len(probabilities))
        for draw in itertools.product(range(len(probabilities)), repeat=n):
            chosen[pick(draw)] += np.prod([probabilities[i] for i in draw])
        probs.append(chosen)
    pairs = itertools.product(range(len(policy)), repeat=2)
    return sum(probs[0][i] * probs[1][j] * ((i > j) + (i == j) / 2) for i, j in pairs)


@pytest.mark.parametrize("best", [True, False], ids=["best", "worst"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_discrete_win_rates_are_those_of_enumeration(n, best):
    rng = np.random.default_rng(n)
    p, q = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
    got = infalign.discrete_win_rate(p, q, n, best=best)
    assert got == pytest.approx(enumerated(p, q, n, best), abs=1e-12)
    assert infalign.discrete_win_rate(q, q, n, best=best) == pytest.approx(
        0.5, abs=1e-12
    )


def test_the_discrete_reward_is_the_gradient_of_the_win_rate():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    reward, eps = infalign.discrete_reward(p, q, 3), 1e-6
    for i, j in itertools.combinations(range(5), 2):  # mass moved from j to i
        move = eps * (np.eye(5)[i] - np.eye(5)[j])
        up, down = (
            infalign.discrete_win_rate(p + s * move, q, 3, best=True) for s in (1, -1)
        )
        assert reward[i] - reward[j] == pytest.approx((up - down) / (2 * eps), abs=1e-7)


def test_the_ternary_example():
    """A6: q = (.5, .3, .2), N = 4, beta = .2, against a search of the simplex."""
    q = np.array([0.5, 0.3, 0.2])
    got = infalign.discrete_optimal(q, 4, 0.2)
    np.testing.assert_allclose(got, [0.3061, 0.2066, 0.4873], atol=0.002)

    def value(p):
        divergence = np.sum(p * np.log(p / q))
        return infalign.discrete_win_rate(p, q, 4, best=True) - 0.2 * divergence

    assert value(got) == pytest.approx(0.6293, abs=1e-4)
    steps = np.linspace(0.01, 0.97, 97)
    search = [(a, b, 1 - a - b) for a in steps for b in steps if a + b < 0.99]
    assert max(value(np.array(p)) for p in search) <= value(got) + 1e-9


def test_kl_of_best_of_n_is_a_bound_where_there_are_atoms():
    """A7: with three outcomes well below, with a thousand equal to four digits."""

    def exact(q):
        best = np.diff(np.concatenate([[0.0], np.cumsum(q)]) ** 4)
        return np.sum(best * np.log(best / q))

    bound = infalign.kl_best_of(4)
    assert bound == pytest.approx(0.636, abs=1e-3)
    # 1/81, 15/81 and 65/81 by hand
    assert exact(np.ones(3) / 3) == pytest.approx(0.5554708569555421, abs=1e-12)
    assert 0 < bound - exact(np.ones(1000) / 1000) < 5e-5


@pytest.mark.parametrize("k, want", [(100, 1.133), (20, 1.856)])
def test_exp_after_calibration_is_biased(k, want):
    """A5, exactly and by sampling the calibration."""
    assert infalign.exp_bias(10.0, k, np.array(0.5)) == pytest.approx(want, abs=1e-3)
    drawn = np.random.default_rng(0).binomial(k, 0.5, 400_000) / k
    assert np.exp(10 * (drawn - 0.5)).mean() == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: best_of(0), "n is 0"),
        (lambda: infalign.order_statistic(5, 4), "j is 5"),
        (lambda: infalign.keep_top(1.0), "tau is 1.0"),
        (lambda: infalign.exponential(GRID, t=0), "t is 0"),
        (lambda: infalign.tilt(GRID, 0.0), "beta is 0.0"),
        (lambda: infalign.optimal(best_of(2), -1.0), "beta is -1.0"),
        (lambda: infalign.log(GRID, floor=1.0), "floor is 1.0"),
        (
            lambda: infalign.at_kl(lambda b: infalign.tilt(GRID, b), 50.0),
            "gives a KL of 50",
        ),
    ],
)
def test_numbers_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
