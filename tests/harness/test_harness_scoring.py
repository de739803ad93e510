"""Log-likelihoods of rows against whole distributions in float64."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from oracles import transformer as oracle

from alignax.harness import scoring
from alignax.harness.encoding import Row
from alignax.models import sharding

V = 37


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh((1, 1, 1))


LONGEST = 72  # tokens of a row here


@functools.cache
def hidden(config):
    with jax.enable_x64(True):
        return jax.jit(functools.partial(oracle.hidden, config))


def logits(lm, ids):
    """[T, V] after each id, float64."""
    padded = np.zeros(LONGEST, int)
    padded[: len(ids)] = ids
    with jax.enable_x64(True):
        params = oracle.float64(lm.params)
        h = np.asarray(hidden(lm.config)(params, padded))[: len(ids)]
        table = params["embed"].T if lm.config.tied else params["head"]
        return h @ np.asarray(table)


def expected(lm, row):
    ids = [*row.context, *row.continuation]
    rows = logits(lm, ids[:-1])[len(row.context) - 1 :]
    logps = rows - np.log(
        np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)
    )
    logps -= rows.max(-1, keepdims=True)
    total = logps[np.arange(len(rows)), row.continuation].sum()
    return total, bool((rows.argmax(-1) == row.continuation).all())


def greedy(lm, context, many):
    ids = [*context]
    for _ in range(many):
        ids.append(int(logits(lm, ids)[-1].argmax()))
    return ids[len(context) :]


@pytest.fixture(scope="module")
def cases(tiny_lm):
    """Rows with contexts of their own and shared ones; some continuations are greedy."""
    rng = np.random.default_rng(0)

    def ids(many):
        return rng.integers(0, V, many).tolist()

    rows = [Row(ids(n), ids(m)) for n, m in ((1, 1), (40, 3), (7, 20), (2, 9), (1, 64))]
    question = ids(12)
    rows += [Row(question, ids(m)) for m in (1, 1, 4, 7, 2)]
    rows += [
        Row(question, greedy(tiny_lm, question, 5)),
        Row(question, rows[5].continuation),
    ]
    rows.insert(0, Row(other := ids(3), greedy(tiny_lm, other, 3)))
    rows += [Row(other, ids(2)), Row(other, greedy(tiny_lm, other, 2))]
    return rows


@pytest.fixture(scope="module")
def truth(tiny_lm, cases):
    return [expected(tiny_lm, row) for row in cases]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_rows_have_the_likelihoods_of_float64(tiny_lm, cases, truth, mesh, batch_size):
    """Whatever rows a batch has beside them, and in whatever order."""
    found = dict(scoring.likelihoods(tiny_lm, cases, batch_size=batch_size, mesh=mesh))
    assert sorted(found) == [*range(len(cases))]
    for i, (total, best) in enumerate(truth):
        assert found[i].logp == pytest.approx(total, abs=2e-4), i
        assert found[i].greedy == best, i
    assert {best for _, best in truth} == {True, False}


def test_a_mesh_gives_the_same(tiny_lm, cases, truth):
    mesh = sharding.make_mesh((2, 2, 2))
    lm = tiny_lm._replace(params=sharding.put_params(tiny_lm.params, mesh))
    found = dict(scoring.likelihoods(lm, cases, batch_size=2, mesh=mesh))
    for i, (total, best) in enumerate(truth):
        assert found[i].logp == pytest.approx(total, abs=2e-4), i
        assert found[i].greedy == best, i


def test_rows_of_one_context_are_a_group_and_shapes_are_few():
    rows = [Row([1] * n, [2]) for n in range(1, 200)]
    rows += [Row([7, k], [j] * j) for k in range(10) for j in (1, 2, 3, 4)]
    found = scoring.chunks(rows, batch_size=8)
    assert sorted(i for c in found for g in c.groups for i in g) == [*range(len(rows))]
    for chunk in found:
        assert len(chunk.groups) <= chunk.places
        assert chunk.places * chunk.size <= 8
        for group in chunk.groups:
            assert len(group) <= chunk.size
            assert len({tuple(rows[i].context) for i in group}) == 1
            tokens = len(rows[group[0]].context) + sum(
                len(rows[i].continuation) for i in group
            )
            assert tokens <= chunk.width
    assert {(c.size, c.places) for c in found} == {(1, 8), (4, 2)}
    assert {c.width for c in found} == {32, 48, 64, 96, 128, 192, 256}


def test_the_width_of_a_row_is_not_far_beyond_the_context():
    assert scoring.width(5) == 32
    assert scoring.width(65) == 96
    assert scoring.width(2049) == 3072
    assert scoring.width(2049, 2049) == 2056
    assert scoring.width(2100, 2049) == 3072  # several answers of one context
    assert scoring.width(40, 2049) == 48


def test_an_id_beyond_the_vocabulary_is_an_error(tiny_lm, mesh):
    with pytest.raises(ValueError, match="id 37, which is beyond"):
        [*scoring.likelihoods(tiny_lm, [Row([1], [V])], batch_size=1, mesh=mesh)]


def test_a_table_that_is_padded_counts_whole(make_lm, tiny_config, mesh):
    """As for the harness's hf model: log-softmax and argmax are over all rows of the table."""
    lm = make_lm(dataclasses.replace(tiny_config, vocab_size=V + 3))
    row = Row([3, 1], [5, 9])
    ((_, found),) = scoring.likelihoods(lm, [row], batch_size=1, mesh=mesh)
    assert found.logp == pytest.approx(expected(lm, row)[0], abs=1e-4)
