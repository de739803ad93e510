"""Drafts: what they propose, and that the target does not mind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import chi_square, decoding
from oracles import transformer as oracle

from alignax import logprob
from alignax.models import transformer
from alignax.sampling import decode, drafts, response_state, speculate
from alignax.sampling.processors import Processors

V, NEW, MANY = 5, 3, 8192
PROMPTS, LENGTHS = np.array([[3, 1, 3], [2, 0, 0]]), np.array([3, 1])
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    return make_lm(dataclasses.replace(tiny_config, vocab_size=V))


def proposals(rows, gamma, longest):
    """What `ngram` proposes after each row of ids."""
    width = max(map(len, rows)) + 3
    tokens = np.zeros((len(rows), width), int)
    for i, r in enumerate(rows):
        tokens[i, : len(r)] = r
    draft = drafts.ngram(10, longest)
    n = len(rows)
    ask = drafts.Ask(
        jnp.asarray(tokens), jnp.array([len(r) for r in rows]), jax.random.split(KEY, n),
        response_state.Rules(Processors(jnp.ones(n)), jnp.zeros(0, jnp.int32)),
        response_state.ResponseState(jnp.zeros(n, jnp.int32)), 0,
    )  # fmt: skip
    propose = jax.jit(lambda ask: draft.propose((), ask._replace(gamma=gamma)))
    got, q, _ = propose(ask)
    np.testing.assert_array_equal(np.argmax(q, -1), got)
    np.testing.assert_array_equal(q.sum(-1), 1)
    return np.asarray(got).tolist()


def test_ngram_repeats_what_followed_the_longest_copy():
    rows = [
        [1, 2, 3, 9, 1, 2, 3],  # the whole of 1 2 3, followed by 9
        [1, 2, 8, 7, 2, 5, 1, 2],  # two tokens beat the later copy of one
        [4, 6, 4, 5, 4],  # of equal ones the last
        [7, 8, 7, 8],  # in its period
        [1, 2, 3],  # no copy: the last token
        [5],
    ]
    assert proposals(rows, 4, 3) == [
        [9, 1, 2, 3], [8, 7, 2, 5], [5, 4, 5, 4], [7, 8, 7, 8], [3] * 4, [5] * 4,
    ]  # fmt: skip
    assert proposals(rows[1:2], 3, 1) == [[5, 1, 2]]


def test_ngram_agrees_with_a_search_by_hand():
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, size=n).tolist() for n in rng.integers(1, 12, size=60)]
    want = []
    for r in rows:
        best, period = 0, 1
        for end in range(len(r) - 1):  # a copy may end here
            size = 0
            while size < min(3, end + 1) and r[end - size] == r[len(r) - 1 - size]:
                size += 1
            if size and size >= best:
                best, period = size, len(r) - 1 - end
        text = list(r)
        for _ in range(3):
            text.append(text[-period])
        want.append(text[len(r) :])
    assert proposals(rows, 3, 3) == want


def test_the_target_does_not_mind_a_certain_draft(lm):
    """Drawn responses keep their distribution; greedy ones are plain greedy's."""
    out = speculate.speculate(
        lm, drafts.ngram(V, 2), PROMPTS, LENGTHS, KEY, max_new=NEW, draft_length=2,
        group=MANY, temperature=np.array([1.0, 0.8]),
    )  # fmt: skip
    for b in range(2):
        prompt = PROMPTS[b, : LENGTHS[b]].tolist()
        with jax.enable_x64(True):
            params = oracle.float64(lm.params)
            call = jax.jit(lambda ids, p=params: oracle.logits(lm.config, p, ids))

            def logits(ids, call=call):
                padded = np.zeros(6, int)
                padded[: len(ids)] = ids
                return np.asarray(call(padded))[len(ids) - 1]

            distribution = decoding.distribution(
                logits, prompt, max_new=NEW, temperature=(1.0, 0.8)[b]
            )
        counts = dict.fromkeys(distribution, 0)
        rows = zip(out.batch.tokens[b], out.batch.mask[b], strict=True)
        for t, m in rows:
            counts[tuple(np.asarray(t)[np.asarray(m)].tolist())] += 1
        expected = np.array([*distribution.values()]) * MANY
        assert chi_square.p_value([*counts.values()], expected) > 1e-4

    settings = dict(max_new=16, temperature=0.0)
    fast = speculate.speculate(lm, drafts.ngram(V), PROMPTS, LENGTHS, KEY, **settings)
    plain = decode.generate(lm, PROMPTS, LENGTHS, KEY, **settings)
    np.testing.assert_array_equal(fast.batch.tokens, plain.batch.tokens)


def test_some_layers_are_the_target_with_less_of_it(lm):
    tokens = jnp.asarray(PROMPTS[:1])
    whole = drafts.some_layers(lm, range(lm.config.num_layers))
    np.testing.assert_array_equal(
        transformer.hidden(whole, tokens)[0], transformer.hidden(lm, tokens)[0]
    )
    one = drafts.some_layers(lm, [1])
    with jax.enable_x64(True):
        params = oracle.float64(lm.params)
        params["blocks"] = jax.tree.map(lambda p: p[1:2], params["blocks"])
        z = oracle.logits(one.config, params, PROMPTS[0])
        want = np.asarray(jax.nn.log_softmax(z))
    got = logprob.rows(one, transformer.hidden(one, tokens)[0])[0]
    np.testing.assert_allclose(got, want, atol=1e-5)
    for keep in ([], [0, 2], [1, 0], [-1]):
        with pytest.raises(ValueError, match=r"expected layers of 0\.\.1 in order"):
            drafts.some_layers(lm, keep)


def test_layers_keep_their_own_windows(tiny_config, make_lm):
    config = dataclasses.replace(
        tiny_config, num_layers=3, window=2, local_layers=(True, False, True)
    )
    assert drafts.some_layers(make_lm(config), [1, 2]).config.local_layers == (
        False,
        True,
    )


def test_layers_keep_whether_they_have_rope(tiny_config, make_lm):
    config = dataclasses.replace(
        tiny_config, num_layers=3, rope_layers=(True, False, True)
    )
    kept = drafts.some_layers(make_lm(config), [1, 2]).config
    assert (kept.rope_layers, kept.local_layers) == ((False, True), ())


def test_ngram_of_nothing_is_refused():
    with pytest.raises(ValueError, match="longest=0"):
        drafts.ngram(V, 0)
