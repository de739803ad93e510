"""Tournaments: the fit against a numerical optimum, brackets against one anchor."""

import numpy as np
import pytest
from scipy import optimize, stats

from alignax.theory import tournament

PAIRINGS = (tournament.single_elimination, tournament.all_pairs)


def chance(ratings, a, b):
    """P(a beats b) of Elo ratings [M]."""
    return 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400))


def drawn(ratings, rng, bias=0.0):
    """A judge that draws its verdict; bias is the log-odds of the first slot."""

    def judge(a, b):
        odds = np.log(10) / 400 * (ratings[a] - ratings[b]) + bias
        return (rng.random(len(a)) < 1 / (1 + np.exp(-odds))).astype(float)

    return judge


def numerical(points, prior=tournament.PRIOR):
    """The maximum of the likelihood by L-BFGS, written as a sum over ordered pairs."""
    m = len(points)
    off = ~np.eye(m, dtype=bool)
    w = np.where(off, points + prior / (m - 1), 0.0)

    def loss(theta):
        return np.sum(w * np.logaddexp(0, theta[None] - theta[:, None]))

    def slope(theta):
        p = 1 / (1 + np.exp(theta[:, None] - theta[None]))  # of j over i
        return (w.T * (1 - p) - w * p).sum(1)

    found = optimize.minimize(
        loss, np.zeros(m), jac=slope, method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 10_000},
    )  # fmt: skip
    return found.x - found.x.mean()


@pytest.mark.parametrize("m", [2, 3, 9])
def test_the_fit_is_the_numerical_optimum(m):
    rng = np.random.default_rng(m)
    points = rng.poisson(rng.uniform(0, 6, (2, m, m))) * rng.integers(0, 2, (2, m, m))
    points = points + 0.5 * rng.integers(0, 2, (2, m, m))
    got = tournament.bradley_terry(points)
    want = [numerical(w) for w in points]
    np.testing.assert_allclose(got, want, atol=2e-5)  # what L-BFGS leaves


def test_a_sparse_table_has_a_fit_where_newton_alone_overshoots():
    """At the maximum, each has as many points as its strengths say."""
    w = np.zeros((5, 5))
    w[0, [1, 3]] = 0.58, 480.16
    w[1, [3, 4]] = 2657.12, 501.68
    w[2, 3], w[3, 1], w[4, [0, 2]] = 36.36, 0.46, (0.02, 2057.88)
    theta = tournament.bradley_terry(w)
    w += tournament.PRIOR / 4 * (1 - np.eye(5))
    expected = (w + w.T) / (1 + np.exp(theta[None] - theta[:, None]))
    np.testing.assert_allclose(expected.sum(1), w.sum(1), atol=1e-4)


def test_two_contestants_are_the_log_odds_of_their_points():
    got = tournament.bradley_terry([[0, 7], [2, 0]], prior=0.1)
    half = np.log(7.1 / 2.1) / 2
    np.testing.assert_allclose(got, [half, -half], atol=1e-12)


def test_ratings_of_all_pairs_are_those_that_drew_the_verdicts():
    rng = np.random.default_rng(0)
    truth = np.array([850, 940, 1000, 1060, 1150.0])
    points = tournament.all_pairs(drawn(truth, rng), 4000, 5, rng).sum(0)
    got = tournament.ratings(tournament.bradley_terry(points))
    np.testing.assert_allclose(got, truth, atol=15)  # four standard errors, of 3.7


def test_expected_points_give_the_ratings_exactly():
    truth = np.array([700, 950, 1000, 1350.0])
    i = np.arange(4)
    points = 50 * chance(truth, i[:, None], i[None])
    got = tournament.ratings(tournament.bradley_terry(points, prior=1e-9))
    np.testing.assert_allclose(got, truth, atol=1e-5)


def test_who_never_lost_or_never_won_is_finite_and_at_the_end():
    order = np.triu(np.full((6, 6), 500.0), 1)  # 0 beats all, 5 beats nobody
    got = tournament.ratings(tournament.bradley_terry(order))
    assert np.isfinite(got).all()
    assert (np.diff(got) < 0).all()
    np.testing.assert_allclose(got, 1000 + (1000 - got[::-1]), atol=1e-6)
    nothing = tournament.bradley_terry(np.zeros((3, 3)))
    np.testing.assert_allclose(nothing, 0, atol=1e-12)


@pytest.mark.parametrize("m", [2, 3, 5, 8, 13, 20])
def test_a_bracket_has_every_contestant_and_one_match_less(m):
    places = tournament.bracket(m)
    depth = np.zeros(m, int)  # matches until the final, of each place
    alive = {i: {i} for i in range(m)}
    for i, j in places:
        for k in alive[i] | alive[j]:
            depth[k] += 1
        alive[i] |= alive.pop(j)
    assert len(places) == m - 1
    assert alive == {0: set(range(m))}
    # a bye is one match less, and nobody has two
    assert depth.max() == int(np.ceil(np.log2(m)))
    assert depth.min() >= int(np.floor(np.log2(m)))


@pytest.mark.parametrize("m", [2, 5, 8])
def test_the_strongest_wins_each_bracket_and_all_play(m):
    """A judge without chance: the number of a contestant is its strength."""
    points = tournament.single_elimination(
        lambda a, b: (a > b).astype(float), 300, m, np.random.default_rng(0)
    )
    matches = points + points.swapaxes(1, 2)
    assert (matches.sum((1, 2)) / 2 == m - 1).all()
    assert (matches.sum(2) >= 1).all()
    lost = points.sum(1)
    assert (lost[:, :-1] == 1).all()
    assert (lost[:, -1] == 0).all()
    if m == 5:  # the fifth's way to the title: two matches with a bye, or three
        assert set(points[:, -1].sum(1)) == {2, 3}
    # brackets are shuffled: everybody meets everybody on some prompt
    assert (matches.sum(0)[~np.eye(m, dtype=bool)] > 0).all()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_tie_is_half_a_point_for_each(pairing):
    n, m = 20, 4
    points = pairing(lambda a, b: np.full(len(a), 0.5), n, m, np.random.default_rng(0))
    assert set(np.unique(points)) == {0, 0.5}
    np.testing.assert_array_equal(points, points.swapaxes(1, 2))


def test_a_coin_says_who_goes_on_after_a_tie():
    """Of five, the one place with three matches ahead gets to the third by one coin."""
    n = 2000
    points = tournament.single_elimination(
        lambda a, b: np.full(len(a), 0.5), n, 5, np.random.default_rng(0)
    )
    matches = (points + points.swapaxes(1, 2)).sum(2)
    share = (matches.max(1) == 3).mean()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(n))
    # nobody is favoured
    got = points.sum((0, 2)) / points.sum()
    np.testing.assert_allclose(got, 1 / 5, atol=0.02)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_position_bias_does_not_change_the_ranking(pairing):
    """A judge that gives the first slot log-odds of 2: 88 % between equals."""
    rng = np.random.default_rng(1)
    truth = np.array([1000.0, 1000, 1000, 1100, 900, 1000])
    first = np.zeros((2, 6))  # how often each is shown first, and second

    def counted(a, b):
        for slot, who in enumerate((a, b)):
            first[slot] += np.bincount(who, minlength=6)
        return drawn(truth, rng, bias=2.0)(a, b)

    points = pairing(counted, 6000, 6, rng).sum(0)
    got = tournament.ratings(tournament.bradley_terry(points))
    shown = first[0] / first.sum(0)
    np.testing.assert_allclose(shown, 0.5, atol=4 * 0.5 / np.sqrt(first.sum(0).min()))
    assert got.argmax() == 3
    assert got.argmin() == 4
    assert np.ptp(got[[0, 1, 2, 5]]) < 25  # four standard errors of a difference
    # strengths are compressed, by the slope of the mean of σ(x + 2) and σ(x - 2)
    assert 20 < got[3] - 1000 < 90


def trials(n, rng, *, m=20, many=48, centre=0.0):
    """Mean Spearman with the truth, of tournaments and of an anchor at `centre`."""
    truth = rng.normal(0, 60, (many, m))
    row = np.repeat(np.arange(many), n)

    def judge(a, b):
        return (rng.random(len(a)) < chance(truth.T, (a, row), (b, row))).astype(float)

    points = tournament.single_elimination(judge, many * n, m, rng)
    calls = points.sum() / many / (n * m)
    found = tournament.bradley_terry(points.reshape(many, n, m, m).sum(1))
    wins = rng.binomial(n, 1 / (1 + 10 ** ((centre - truth) / 400)))
    both = [
        np.mean([stats.spearmanr(x, y)[0] for x, y in zip(s, truth, strict=True)])
        for s in (found, wins)
    ]
    return *both, calls


@pytest.mark.parametrize("n", [50, 100, 250, 500])
def test_brackets_rank_better_than_an_anchor_with_fewer_calls(n):
    rng = np.random.default_rng(n)
    bracket, anchored, calls = trials(n, rng)
    assert calls <= 0.95
    assert bracket >= anchored
    # the specification's simulation; four standard errors of 48 trials
    want = {50: (0.822, 0.723), 100: (0.901, 0.841), 250: (0.954, 0.930), 500: (0.969, 0.942)}  # fmt: skip
    np.testing.assert_allclose((bracket, anchored), want[n], atol=0.07)


def test_an_anchor_far_from_the_contestants_hardly_ranks_them():
    rng = np.random.default_rng(0)
    near, far = (trials(250, rng, centre=c)[1] for c in (0.0, 400.0))
    assert far < near - 0.04


def test_standings_have_intervals_over_prompts():
    """Every prompt eight times over is no further information, if prompts are resampled."""
    rng = np.random.default_rng(0)
    truth = np.array([950.0, 1000, 1050])
    points = tournament.all_pairs(drawn(truth, rng), 150, 3, rng)
    once = tournament.standings(points, num_resamples=400)
    within = tournament.standings(8 * points, num_resamples=400)
    width, same = (np.ptp(s.rating_interval, 0) for s in (once, within))
    np.testing.assert_allclose(same, width, rtol=0.02)  # the prior counts for less
    lo, hi = once.rating_interval
    assert ((lo < once.ratings) & (once.ratings < hi)).all()
    assert once.ranks.tolist() == [3, 2, 1]
    # the delta method: the points of independent matches give the variance of θ
    w = points.sum(0)
    n = w + w.T
    p = np.where(n > 0, w / np.maximum(n, 1), 0)
    information = np.diag((n * p * (1 - p)).sum(1)) - n * p * (1 - p)
    error = 400 / np.log(10) * np.sqrt(np.diag(np.linalg.pinv(information)))
    np.testing.assert_allclose(width, 2 * 1.96 * error, rtol=0.15)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    truth = np.array([960.0, 1000, 1040])
    hits = []
    for _ in range(100):
        points = tournament.all_pairs(drawn(truth, rng), 120, 3, rng)
        lo, hi = tournament.standings(points, num_resamples=100).rating_interval
        hits.append((lo < truth) & (truth < hi))
    assert 0.86 < np.mean(hits) < 0.99  # four standard errors of 100 data sets


def test_equal_ratings_share_their_ranks():
    assert tournament.ranks([1010, 990, 1010, 1200]).tolist() == [2.5, 4, 2.5, 1]


def test_what_is_no_table_of_points_is_refused():
    for points in (np.zeros((1, 1)), np.zeros((2, 3)), [[0, -1], [1, 0]], [[0, np.inf], [1, 0]]):  # fmt: skip
        with pytest.raises(ValueError, match="are no"):
            tournament.bradley_terry(points)
    with pytest.raises(ValueError, match="prior is 0"):
        tournament.bradley_terry(np.ones((2, 2)), prior=0)
    with pytest.raises(ValueError, match="gave 2 to 2 points"):
        tournament.all_pairs(lambda a, b: 2.0 + 0 * a, 1, 2, np.random.default_rng(0))
    with pytest.raises(FloatingPointError, match="no maximum in 1 steps"):
        tournament.bradley_terry(np.triu(np.ones((3, 3))), steps=1)
