"""A contest settled by bounds has the winners of one in which everything was looked at."""

import numpy as np
import pytest

from alignax.search import hypotheses, pruning

B, S, C = 3, 2, 6


def play(logps, value, winners, bounds):
    """(indices, exist, what followed, how many were looked at)."""
    h = hypotheses.start(np.zeros((B, 1), int), np.ones(B, int), 1)
    h = hypotheses.take(h, np.zeros((B, S * C), int))
    h.tokens[..., 1] = np.arange(S * C)
    seen = np.zeros((B, S * C), int)

    def look(part, where):
        which = part.tokens[..., 1]
        b, k = np.nonzero(where)
        np.add.at(seen, (b, which[b, k]), 1)
        rows = np.arange(B)[:, None]
        return value.reshape(B, -1)[rows, which], which[..., None]

    index, exist, follow = pruning.settle(logps, h, look, winners, 1, bounds)
    assert seen.max(initial=0) <= 1, "nothing is looked at twice"
    return index, exist, follow, seen.reshape(B, S, C)


@pytest.mark.parametrize("winners", [1, 2, 4])
def test_bounds_change_no_winner_even_among_ties(winners):
    """Scores of few values, so that most contests have ties; some places are empty."""
    rng = np.random.default_rng(winners)
    saved = 0
    for _ in range(60):
        logps = -np.sort(rng.integers(0, 8, (B, S, C)) / 4.0, 2)
        logps[rng.random((B, S)) < 0.2, 3:] = -np.inf
        value = rng.integers(0, 5, (B, S, C)) / 4.0
        all_, exist, follow, every = play(logps, value, winners, None)
        some, exists, follows, seen = play(logps, value, winners, (0.0, 1.0))
        np.testing.assert_array_equal(some, all_)
        np.testing.assert_array_equal(exists, exist)
        real = np.isfinite(logps)
        assert (every == real).all()
        assert not (seen & ~real).any()
        for b, s in np.ndindex(B, S):  # by a sort: the best first, of ties the likelier
            rank = sorted(
                (i for i in range(C) if real[b, s, i]),
                key=lambda i: (-(logps[b, s, i] + value[b, s, i]), i),
            )[:winners]
            assert all_[b, s][exist[b, s]].tolist() == sorted(rank)
            for j, i in enumerate(all_[b, s]):
                looked = seen[b, s, i]
                assert follows[b, s, j] == (s * C + i if looked else -1)
                assert follow[b, s, j] == (s * C + i if real[b, s, i] else -1)
        saved += 1 - seen.sum() / every.sum()
    assert saved / 60 > 0.15


def test_what_is_clear_from_the_start_costs_nothing():
    logps = np.broadcast_to(-2.0 * np.arange(C), (B, S, C)).copy()
    index, _, _, seen = play(logps, np.zeros((B, S, C)), 1, (0.0, 1.5))
    assert (index == 0).all()
    assert seen.sum() == 0


def test_a_score_of_minus_infinity_wins_only_where_all_have_it():
    logps = np.zeros((B, S, C))
    value = np.full((B, S, C), -np.inf)
    value[:, 0, 4] = -3.0
    index, exist, _, _ = play(logps, value, 2, None)
    assert exist[:, 0].sum(1).tolist() == [1] * B
    assert (index[:, 0][exist[:, 0]] == 4).all()
    assert exist[:, 1].all()
    assert (index[:, 1] == [0, 1]).all()
