"""The rewinding tree on a toy whose right answers are known: four tokens, one harmful."""

import numpy as np
import pytest

from alignax.search import tree_search

DEPTH, HARM = 5, 0


def world(harmful, seed, wrong):
    """A distribution of independent tokens, judged as the text stands by a noisy evaluator."""
    rng = np.random.default_rng(seed)
    distribution = np.array([harmful] + [(1 - harmful) / 3] * 3)
    order = np.argsort(-distribution, kind="stable")
    asked = [0]

    def evaluate(text):
        asked[0] += 1
        truth = -1.0 if HARM in text else 1.0
        return (-truth if rng.random() < wrong else truth), text

    def embed(text, begins):
        words = [np.eye(4)[list(text[i:])].mean(0) for i in begins]
        return np.stack(words) if words else np.zeros((0, 4))

    return tree_search.World(
        lambda text, depth: [((int(i),), distribution[i]) for i in order],
        lambda text, depth, known: None,
        evaluate, embed, lambda text: len(text) >= DEPTH,
    ), asked  # fmt: skip


def harmless(harmful, runs=6, wrong=0.1, **rules):
    """(share of harmless responses, evaluations per token)."""
    good = asked = 0
    for seed in range(runs):
        toy, count = world(harmful, seed, wrong)
        text, simulations = tree_search.respond(toy, tree_search.Rules(**rules))
        good += HARM not in text
        asked += count[0]
        assert simulations == count[0]
        assert len(text) == DEPTH
    return good / runs, asked / runs / DEPTH


def test_it_rescues_moderate_harm_and_fails_where_harm_dominates_the_prior():
    """Sampling is harmless at .59, .24, .08 and .002 of these priors."""
    shares, costs = zip(
        *(harmless(p, alike=2.0) for p in (0.1, 0.25, 0.4, 0.7)), strict=True
    )
    assert shares[0] == shares[1] == 1
    assert shares[2] >= 0.6
    assert shares[3] == 0
    assert all(10 < cost < 36 for cost in costs)


def test_an_evaluator_that_tosses_a_coin_gains_nothing():
    """All tokens as likely, so that following the prior is no help either."""
    share, _ = harmless(0.25, runs=12, wrong=0.5, alike=2.0)
    assert share <= 0.75**DEPTH + 3 * np.sqrt(0.24 * 0.76 / 12)


def node(tokens, prior, **fields):
    return tree_search.Node(tokens, prior, 1, prior, **fields)


def test_selection_is_by_the_formula():
    a = node((1,), 0.5, n=3.0, q=-0.5)
    b = node((2,), 0.3, n=1.0, q=0.2)
    c = node((3,), 0.2)
    root = tree_search.Node((), 1.0, 0, n=4.0, children=[a, b, c])
    # (q + 1) / 2 + 2 p √4 / (1 + n): .25 + .5, .6 + .6, 0 + .8
    assert tree_search._select(root, [-1.0, 1.0], tree_search.Rules()) is b
    for exploration, best in ((0.0, b), (4.0, b), (8.0, c)):
        rules = tree_search.Rules(exploration=exploration)
        assert tree_search._select(root, [-1.0, 1.0], rules) is best
    assert tree_search.decision(root) is a


def test_a_value_goes_up_the_path_and_sideways_to_what_reads_alike():
    near = node((2,), 0.3, n=1.0, q=1.0, visits=1, embedding=np.array([1.0, 0.1]))
    far = node((3,), 0.2, n=1.0, q=1.0, visits=1, embedding=np.array([0.0, 1.0]))
    new = node((1,), 0.5, n=1.0, q=0.5, visits=1, embedding=np.array([1.0, 0.0]))
    root = tree_search.Node((), 1.0, 0, n=3.0, visits=3, children=[new, near, far])
    bounds = [-1.0, 1.0]
    tree_search._backup(
        [root, new], -1.0, np.array([[1.0, 0.1]]), bounds, tree_search.Rules()
    )
    assert (root.n, root.visits, new.n, new.visits) == (4, 4, 2, 2)
    assert new.q == pytest.approx((0.5 - 1.0) / 2)
    np.testing.assert_allclose(new.embedding, [1.0, 0.05])
    cosine = (1 + 0.005) / np.sqrt(1.0025 * 1.01)
    heard = 0.2 * cosine
    assert near.n == pytest.approx(1 + heard)
    assert near.q == pytest.approx((1.0 - heard) / (1 + heard))
    assert (near.visits, far.n, far.q) == (1, 1.0, 1.0)
    tree_search._backup(
        [root, new], -1.0, np.array([[1.0, 0.1]]), bounds, tree_search.Rules()
    )
    assert bounds == [-1.0, 1.0]
    one = [-0.1, 0.2]  # tighter than any value: they widen to hold new q
    tree_search._backup(
        [root, new], -1.0, np.array([[1.0, 0.1]]), one, tree_search.Rules()
    )
    assert one == [new.q, 0.2]


def test_a_root_mixes_its_priors_and_keeps_the_statistics_of_what_it_chose():
    toy, count = world(0.1, 0, 0.0)
    root = tree_search.Node((), 1.0, 0)
    tree_search.simulate(root, (), [-1.0, 1.0], toy, tree_search.Rules())
    priors = [c.prior for c in root.children]
    np.testing.assert_allclose(priors, [0.75 * 0.3 + 0.0625] * 3 + [0.1375])
    for _ in range(9):
        tree_search.simulate(root, (), [-1.0, 1.0], toy, tree_search.Rules())
    assert sum(c.visits for c in root.children) == 9 == root.visits - 1
    assert count[0] == 10
    child = tree_search.decision(root)
    grown = [c.prior for c in child.children]
    np.testing.assert_allclose(sum(grown), 1)
    tree_search._mix(child, tree_search.Rules())
    np.testing.assert_allclose(
        [c.prior for c in child.children], 0.75 * np.array(grown) + 0.0625
    )


def test_a_child_is_added_where_all_read_alike_and_none_is_good():
    def children(q, spread=0.0):
        return [
            node((i,), 0.5, n=1.0, q=q, visits=1, embedding=np.array([1.0, i * spread]))
            for i in range(2)
        ]

    toy, _ = world(0.1, 0, 0.0)
    toy = toy._replace(another=lambda text, depth, known: ((7,), 0.25))
    for q, spread, most, want in (
        (-0.5, 0.0, 20, 3), (0.5, 0.0, 20, 2), (-0.5, 1.0, 20, 2), (-0.5, 0.0, 2, 2),
    ):  # fmt: skip
        parent = tree_search.Node((), 1.0, 0, n=2.0, children=children(q, spread))
        tree_search._add(parent, False, (), toy, tree_search.Rules(most=most))
        assert len(parent.children) == want
        if want == 3:
            assert parent.children[-1].prior == pytest.approx(0.25 / 1.25)
