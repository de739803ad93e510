"""A prefix that is read once gives what reading it every time gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import decode, logprob, prefix
from alignax.models import transformer

PREFIX = [3, 1, 4, 1, 5]
RESTS = [[9, 2, 6], [5], [3, 5, 8]]


def padded(rows, width):
    out = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(out)


def test_hidden_states_and_cache_are_those_of_the_whole_prompt(tiny_lm):
    made = prefix.compute(tiny_lm, jnp.array(PREFIX))
    h, cache = prefix.read(tiny_lm, made, padded(RESTS, 4), 12)
    whole = padded([PREFIX + r for r in RESTS], 9)
    empty = transformer.init_cache(tiny_lm.config, 3, 12)
    want_h, want = transformer.hidden(tiny_lm, whole, cache=empty)
    for row, rest in enumerate(RESTS):
        n = len(PREFIX) + len(rest)
        np.testing.assert_allclose(
            h[row, : len(rest)], want_h[row, len(PREFIX) : n], atol=1e-5
        )
        for got, expected in zip(
            jax.tree.leaves(cache), jax.tree.leaves(want), strict=True
        ):
            np.testing.assert_allclose(got[row, :n], expected[row, :n], atol=1e-5)


def test_greedy_decoding_from_it_is_greedy_decoding(tiny_lm):
    prompts = [PREFIX + r for r in RESTS]
    lengths = np.array([len(p) for p in prompts])
    want = decode.generate(
        tiny_lm, padded(prompts, 8), lengths, jax.random.key(0), max_new=4,
        temperature=0.0,
    ).batch.tokens  # fmt: skip
    made = prefix.compute(tiny_lm, jnp.array(PREFIX))
    h, cache = prefix.read(tiny_lm, made, padded(RESTS, 3), 12)
    at = jnp.array([len(r) - 1 for r in RESTS])
    h, end = h[jnp.arange(3), at][:, None], jnp.array(lengths)
    said = []
    for _ in range(4):
        token = logprob.rows(tiny_lm, h)[:, 0].argmax(-1).astype(jnp.int32)
        said.append(token)
        h, cache = transformer.hidden(
            tiny_lm, token[:, None], end[:, None], cache=cache
        )
        end = end + 1
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(want[row, 0, n : n + 4], np.stack(said, 1)[row])


def test_what_prompts_share_is_found_and_cut_off():
    prompts = [PREFIX + r for r in RESTS]
    assert prefix.common(prompts) == 5
    assert prefix.common([[1, 2], [1, 2]]) == 1
    assert prefix.common([[1], [1, 2]]) == 0
    assert prefix.common([]) == 0
    assert prefix.split(prompts, PREFIX) == RESTS
    with pytest.raises(
        ValueError, match=r"prompt 1 has 5 tokens and parts .* at token 5"
    ):
        prefix.split([prompts[0], PREFIX], PREFIX)
    with pytest.raises(
        ValueError, match=r"prompt 0 has 6 tokens and parts .* at token 1"
    ):
        prefix.split([[3, 7, 4, 1, 5, 1]], PREFIX)


def test_a_cache_that_is_too_short_is_refused(tiny_lm):
    made = prefix.compute(tiny_lm, jnp.array(PREFIX))
    with pytest.raises(ValueError, match="length=7 is too short for 5 tokens and 3"):
        prefix.read(tiny_lm, made, padded(RESTS, 3), 7)
