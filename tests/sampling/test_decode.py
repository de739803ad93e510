"""Decoding against the plain twin, against the kernel, and against itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import decoding
from oracles import transformer as oracle

from alignax import logprob
from alignax.batch import check
from alignax.sampling import decode

P, NEW = 6, 5
PROMPTS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 0, 0, 0, 0], [5, 3, 5, 8, 0, 0]])
LENGTHS = np.array([6, 2, 4])
EOS = (7, 11, 23)
KEY = jax.random.key(0)
score = jax.jit(logprob.score)


def generate(lm, prompts=PROMPTS, lengths=LENGTHS, key=KEY, **kwargs):
    kwargs = {"max_new": NEW, **kwargs}
    out = decode.generate(lm, jnp.asarray(prompts), jnp.asarray(lengths), key, **kwargs)
    return jax.tree.map(np.asarray, out)


def twin(lm, length=P + NEW):
    """ids -> float64 logits of the next token, by the plain twin."""
    with jax.enable_x64(True):
        params = oracle.float64(lm.params)
        run = jax.jit(lambda ids: oracle.logits(lm.config, params, ids))

    def next_logits(ids):
        padded = np.zeros(length, int)
        padded[: len(ids)] = ids
        with jax.enable_x64(True):
            return np.asarray(run(padded))[len(ids) - 1]

    return next_logits


def responses(out):
    """[B][G] tuples of ids."""
    return [
        [tuple(t[m].tolist()) for t, m in zip(*rows, strict=True)]
        for rows in zip(out.batch.tokens, out.batch.mask, strict=True)
    ]


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(window=3),
        dict(window=3, local_layers=(True, False), rope_theta_local=100.0),
        dict(tied=False, final_softcap=2.0, attn_softcap=1.5),
    ],
    ids=["llama", "window", "alternating", "softcaps"],
)
def test_greedy_is_the_argmax_of_the_twin(change, tiny_config, make_lm):
    """Ragged prompts, windows shorter than the context, EOS in a set."""
    lm = make_lm(dataclasses.replace(tiny_config, **change))
    next_logits = twin(lm)
    got = responses(generate(lm, temperature=0.0, eos_ids=EOS))
    for prompt, length, (response,) in zip(PROMPTS, LENGTHS, got, strict=True):
        distribution = decoding.distribution(
            next_logits, prompt[:length].tolist(), max_new=NEW, eos_ids=EOS,
            temperature=0,
        )  # fmt: skip
        assert list(distribution) == [response]


def test_each_ragged_row_is_that_prompt_decoded_alone(tiny_lm):
    together = responses(generate(tiny_lm, temperature=0.0))
    for row in range(3):
        n = LENGTHS[row]
        alone = generate(tiny_lm, PROMPTS[row : row + 1, :n], [n], temperature=0.0)
        assert responses(alone)[0] == together[row]


def test_ids_under_the_padding_are_not_read(tiny_lm):
    junk = np.where(np.arange(P) < LENGTHS[:, None], PROMPTS, 36)
    a, b = generate(tiny_lm, group=2), generate(tiny_lm, junk, group=2)
    np.testing.assert_array_equal(a.batch.tokens, b.batch.tokens)
    np.testing.assert_array_equal(a.raw_logps, b.raw_logps)


def test_a_group_equals_as_many_separate_rows(tiny_lm):
    group = generate(tiny_lm, group=4)
    apart = generate(tiny_lm, np.repeat(PROMPTS, 4, 0), np.repeat(LENGTHS, 4))
    np.testing.assert_array_equal(
        group.batch.tokens.reshape(12, -1), apart.batch.tokens[:, 0]
    )
    np.testing.assert_allclose(
        group.raw_logps.reshape(12, -1), apart.raw_logps[:, 0], atol=1e-5
    )
    assert len(set(responses(group)[0])) > 1  # the samples are not one sample


def test_a_row_does_not_depend_on_its_neighbours(tiny_lm):
    """The middle row stays when the others change, even if they end at once."""
    other = PROMPTS[::-1].copy()
    other[1] = PROMPTS[1]
    a = generate(tiny_lm, eos_ids=EOS)
    b = generate(tiny_lm, other, [4, 2, 6], eos_ids=EOS)
    assert responses(a)[1] == responses(b)[1]
    np.testing.assert_allclose(a.raw_logps[1], b.raw_logps[1], atol=1e-5)
    assert responses(a)[0] != responses(b)[0]


def test_another_key_gives_other_responses(tiny_lm):
    a, b = generate(tiny_lm), generate(tiny_lm)
    c = generate(tiny_lm, key=jax.random.key(1))
    assert responses(a) == responses(b) != responses(c)


def test_eos_ends_a_response_and_is_part_of_it(tiny_lm):
    eos = tuple(range(12))  # a third of the vocabulary: most responses end
    out = generate(tiny_lm, group=8, eos_ids=eos)
    check(out.batch)
    ended = 0
    for b, group in enumerate(responses(out)):
        for g, response in enumerate(group):
            assert 1 <= len(response) <= NEW
            assert not set(response[:-1]) & set(eos)
            ends = response[-1] in eos
            assert out.truncated[b, g] == (not ends)
            assert ends or len(response) == NEW
            n = LENGTHS[b] + len(response)
            assert out.batch.lengths[b, g] == n
            np.testing.assert_array_equal(
                out.batch.tokens[b, g, : LENGTHS[b]], PROMPTS[b, : LENGTHS[b]]
            )
            assert not out.batch.tokens[b, g, n:].any()
            at = np.arange(P + NEW)
            np.testing.assert_array_equal(
                out.batch.mask[b, g], (at >= LENGTHS[b]) & (at < n)
            )
            ended += ends
    assert 0 < ended < 24, "the test should see both ends"
    assert out.stats["ended"] == pytest.approx(ended / 24)


def test_eos_on_the_last_token_is_not_truncation(tiny_lm):
    free = responses(generate(tiny_lm))
    row = next(b for b, (r,) in enumerate(free) if r[-1] not in r[:-1])
    out = generate(tiny_lm, eos_ids=(free[row][0][-1],))
    assert responses(out)[row] == free[row]
    assert not out.truncated[row, 0]


def test_without_eos_every_response_is_truncated(tiny_lm):
    out = generate(tiny_lm)
    assert out.truncated.all()
    assert out.batch.mask.sum() == 3 * NEW
    assert out.stats == {"steps": NEW, "ended": 0}


def test_the_loop_stops_when_every_row_has_ended(tiny_lm):
    out = generate(tiny_lm, eos_ids=tuple(range(37)))
    assert out.stats["steps"] == 1
    np.testing.assert_array_equal(out.batch.lengths[:, 0], LENGTHS + 1)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_raw_logps_are_those_of_the_kernel(tiny_lm, temperature):
    """Whatever the temperature: the kernel is temperature-free."""
    out = generate(tiny_lm, temperature=temperature, eos_ids=EOS)
    batch = jax.tree.map(jnp.asarray, out.batch)
    want = np.asarray(score(tiny_lm, batch).logps)
    np.testing.assert_allclose(out.raw_logps, want, atol=2e-5)
    off = ~out.batch.mask
    assert not out.raw_logps[off].any()
    assert not out.batch.old_logps[off].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_old_logps_are_under_the_distribution_really_sampled(tiny_lm, temperature):
    out, next_logits = generate(tiny_lm, temperature=temperature), twin(tiny_lm)
    for b, n in enumerate(LENGTHS):
        for t in range(n, n + NEW):
            z = next_logits(out.batch.tokens[b, 0, :t].tolist()) / temperature
            z = z - z.max()
            want = (z - np.log(np.exp(z).sum()))[out.batch.tokens[b, 0, t]]
            assert out.batch.old_logps[b, 0, t] == pytest.approx(want, abs=1e-4)


def test_greedy_is_certain_and_the_limit_of_cold(tiny_lm):
    greedy, cold = (generate(tiny_lm, temperature=t) for t in (0.0, 1e-4))
    assert not greedy.batch.old_logps.any()
    assert responses(greedy) == responses(cold)
    np.testing.assert_allclose(greedy.raw_logps, cold.raw_logps, atol=1e-6)


def test_a_second_call_with_the_same_shapes_compiles_nothing(tiny_lm, make_lm):
    generate(tiny_lm, eos_ids=EOS)
    before = decode._generate._cache_size()
    generate(make_lm(tiny_lm.config, 1), PROMPTS[::-1], LENGTHS[::-1],
             jax.random.key(5), temperature=0.7, eos_ids=(1, 2, 3))  # fmt: skip
    assert decode._generate._cache_size() == before


@pytest.mark.parametrize(
    "bad", [dict(temperature=-0.1), dict(max_new=0), dict(group=0)]
)
def test_arguments_out_of_range_are_refused(tiny_lm, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"{name}( is |=){bad[name]}.*expected"):
        generate(tiny_lm, **bad)
