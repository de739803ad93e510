"""Partial responses that go on where they were cut off."""

import dataclasses

import jax
import numpy as np
import pytest
from oracles import searching

from alignax import logprob
from alignax.batch import check
from alignax.search import hypotheses

V, NEW, EOS = 7, 6, (0,)
PROMPTS = np.array([[3, 1, 4, 1], [2, 6, 0, 0], [5, 3, 5, 0]])
LENGTHS = np.array([4, 2, 3])
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    return make_lm(dataclasses.replace(tiny_config, vocab_size=V, num_layers=1))


def begin():
    return hypotheses.start(PROMPTS, LENGTHS, NEW)


def extend(lm, h, key=KEY, **settings):
    settings = dict(tokens=2, eos_ids=EOS) | settings
    return hypotheses.extend(lm, h, key, **settings)


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_blocks_make_a_response_with_the_log_probabilities_of_the_policy(lm):
    h, total = begin(), 0
    for i in range(4):
        old = h
        h, many = extend(lm, h, jax.random.key(i), group=2 if i == 0 else 1)
        total += many
        assert (h.ends - h.starts <= NEW).all()
        if i:
            for row in np.ndindex(old.ends.shape):
                kept = old.tokens[row][: old.ends[row]]
                np.testing.assert_array_equal(h.tokens[row][: old.ends[row]], kept)
            same([x[old.done] for x in h[:4]], [x[old.done] for x in old[:4]])
    assert h.done.all()
    assert total == h.sizes.sum()
    batch = check(hypotheses.as_batch(h))
    want = logprob.score(lm, batch).logps
    np.testing.assert_allclose(h.raw, want, atol=1e-5)
    np.testing.assert_allclose(h.sampled_logps, want, atol=1e-5)
    last = np.take_along_axis(h.tokens, h.ends[..., None] - 1, 2)[..., 0]
    np.testing.assert_array_equal(h.ended, last == 0)
    assert 0 < h.ended.sum() < h.ended.size


def test_rows_longer_than_the_smallest_bucket_are_the_same(lm, monkeypatch):
    """Of rows that go on and of longer ones that do not."""
    results = []
    for bucket in (64, 2):
        monkeypatch.setattr(hypotheses, "BUCKET", bucket)
        h, _ = extend(lm, begin(), tokens=4)
        short = h.ends < h.ends.max()
        h, _ = extend(lm, h, jax.random.key(1), active=short)
        logps, ids = hypotheses.next_best(lm, h, 3)
        results.append((*h[:4], ids, np.round(logps, 4)))
    same(*results)
    assert hypotheses.bucket(5, 100) == 8
    assert hypotheses.bucket(9, 12) == 12


def test_what_is_not_active_stays_and_a_limit_is_no_new_shape(lm):
    active = np.array([[True], [False], [True]])
    h, many = extend(lm, begin(), active=active, limit=1)
    assert many == 2
    assert h.sizes[:, 0].tolist() == [1, 0, 1]
    full, _ = extend(lm, begin())
    first = full.tokens[[0, 2], 0, [4, 3]]
    np.testing.assert_array_equal(h.tokens[[0, 2], 0, [4, 3]], first)


def test_until_ends_a_block_and_not_the_response(lm):
    h, _ = extend(lm, begin(), group=20, tokens=6, until=(4,))
    last = np.take_along_axis(h.tokens, h.ends[..., None] - 1, 2)[..., 0]
    paused = (last == 4) & (h.sizes < NEW)
    assert paused.any() and not h.ended[paused].any()
    assert not h.done[paused].any()
    for group in searching.rows(hypotheses.as_batch(h)):
        assert all(4 not in y[:-1] for y in group)


def test_the_best_next_tokens_are_those_of_the_twin(lm):
    h, _ = extend(lm, begin(), group=2)
    next_logits = searching.twin(lm)
    logps, ids = hypotheses.next_best(lm, h, 3)
    for b, g in np.ndindex(h.ends.shape):
        z = next_logits(h.tokens[b, g, : h.ends[b, g]])
        want = z - np.log(np.exp(z).sum())
        order = np.argsort(-want)[:3]
        np.testing.assert_array_equal(ids[b, g], order)
        np.testing.assert_allclose(logps[b, g], want[order], atol=1e-5)


def test_hypotheses_are_taken_put_and_laid_side_by_side(lm):
    h, _ = extend(lm, begin(), group=3)
    one = hypotheses.take(h, [[2], [0], [1]])
    for b, g in enumerate((2, 0, 1)):
        same([x[b, 0] for x in one[:4]], [x[b, g] for x in h[:4]])
    where = np.array([[True], [False], [True]])
    put = hypotheses.put(h, np.zeros((3, 1), int), one, where)
    same([x[1] for x in put[:4]], [x[1] for x in h[:4]])
    same([x[0, 0] for x in put[:4]], [x[0, 2] for x in h[:4]])
    same(
        hypotheses.concatenate([one, h]),
        hypotheses.take(h, [[2, 0, 1, 2], [0, 0, 1, 2], [1, 0, 1, 2]]),
    )
    parts = [hypotheses.prompt(h, b) for b in range(3)]
    same(hypotheses.concatenate(parts, axis=0), h)


def test_a_setting_that_reads_earlier_tokens_is_refused_once_a_response_has_begun(lm):
    h, _ = extend(lm, begin(), sampling={"presence_penalty": 1.0, "top_k": 3})
    with pytest.raises(ValueError, match=r"\['presence_penalty'\].*earlier tokens"):
        extend(lm, h, sampling={"presence_penalty": 1.0, "top_k": 3})
    extend(lm, h, sampling={"top_k": 3})


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"lengths span 0\.\.4"):
        hypotheses.start(PROMPTS, np.array([4, 0, 3]), NEW)
