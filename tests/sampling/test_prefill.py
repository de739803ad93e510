"""A prefix that is read once gives what reading it every time gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import LM
from alignax.decoders import best_of_n
from alignax.models import transformer
from alignax.sampling import decode, drafts, prefill
from alignax.sampling.speculate import speculate

PREFIX = [3, 1, 4, 1, 5]
RESTS = [[9, 2, 6], [5], [3, 5, 8]]


def padded(rows, width):
    out = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(out)


def test_hidden_states_and_cache_are_those_of_the_whole_prompt(tiny_lm):
    tokens, lengths = map(jnp.asarray, asked())
    h, cache = prefill.after(tiny_lm, PREFIX).begin(tiny_lm, tokens, lengths, 12)
    want_h, want = prefill.WHOLE.begin(tiny_lm, tokens, lengths, 12)
    np.testing.assert_allclose(h, want_h, atol=1e-5)
    pairs = zip(jax.tree.leaves(cache), jax.tree.leaves(want), strict=True)
    for (got, expected), n in ((pair, n) for pair in pairs for n in lengths):
        np.testing.assert_allclose(got[:, :n], expected[:, :n], atol=1e-5)


def asked(rests=RESTS):
    prompts = [PREFIX + r for r in rests]
    return padded(prompts, 8), np.array([len(p) for p in prompts])


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"group": 2, "seeds": [5, 1, 3], "temperature": 0.8},
    "prefill": {"prefill": [[7, 7], [1, 2], [3, 4]], "top_k": 3},
}


@pytest.mark.parametrize("sample", ["generate", "speculate"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_responses_after_it_are_those_to_the_whole_prompts(tiny_lm, settings, sample):
    first = (tiny_lm, drafts.ngram(tiny_lm.config.vocab_size))
    first = first[: 2 if sample == "speculate" else 1]
    function = {"generate": decode.generate, "speculate": speculate}[sample]
    made = prefill.after(tiny_lm, PREFIX)

    def run(**more):
        more |= SETTINGS[settings]
        out = function(*first, *asked(), jax.random.key(0), max_new=4, **more)
        return jax.device_get(out)

    got, want = run(reader=made), run()
    np.testing.assert_array_equal(got.batch.tokens, want.batch.tokens)
    np.testing.assert_allclose(got.raw_logps, want.raw_logps, atol=1e-5)
    np.testing.assert_allclose(got.batch.old_logps, want.batch.old_logps, atol=1e-5)


def test_the_prefix_itself_is_not_read_again(tiny_lm):
    """Another prefix's cache under these ids changes what is said."""
    made = prefill.after(tiny_lm, PREFIX)
    other = prefill.after(tiny_lm, [9] * 5)._replace(check=made.check)
    raws = [
        decode.generate(
            tiny_lm, *asked(), jax.random.key(0), max_new=2, temperature=0.0, reader=x
        ).raw_logps
        for x in (made, other)
    ]
    assert np.abs(np.asarray(raws[0] - raws[1])).max() > 0.1


def test_an_empty_prefix_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="the prefix is empty"):
        prefill.after(tiny_lm, [])


def test_what_prompts_share_is_found():
    prompts = [PREFIX + r for r in RESTS]
    assert prefill.common(prompts) == 5
    assert prefill.common([[1, 2], [1, 2]]) == 1
    assert prefill.common([[1], [1, 2]]) == 0
    assert prefill.common([]) == 0


WRONG = {
    "prompt 1 has 5 tokens and parts from the prefix of 5 at token 5": [[1], []],
    "prompt 0 has 6 tokens and parts from the prefix of 5 at token 2": None,
}


@pytest.mark.parametrize("message", WRONG)
def test_prompts_without_it_are_refused(tiny_lm, message):
    made = prefill.after(tiny_lm, PREFIX)
    tokens, lengths = asked(WRONG[message] or [[1]])
    if WRONG[message] is None:
        tokens = tokens.at[0, 2].set(9)
    with pytest.raises(ValueError, match=message):
        decode.generate(
            tiny_lm, tokens, lengths, jax.random.key(0), max_new=1, reader=made
        )


def changed(lm, part):
    """The LM with 1e-3 more in one element of the last parameter of a part."""
    leaves, tree = jax.tree.flatten(lm.params[part])
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].add(1e-3)
    return LM(lm.config, {**lm.params, part: jax.tree.unflatten(tree, leaves)})


def sampled(lm, made, way):
    asked_for = {"max_new": 2, "temperature": 0.0, "reader": made}
    key = jax.random.key(0)
    if way == "generate":
        return decode.generate(lm, *asked(), key, **asked_for)
    if way == "speculate":
        draft = drafts.ngram(lm.config.vocab_size)
        return speculate(lm, draft, *asked(), key, **asked_for)
    return best_of_n.search(
        lm,
        {},
        *asked(),
        key,
        n=2,
        judge=lambda b: np.zeros(b.mask.shape[:2]),
        **asked_for,
    )


WAYS = ("generate", "speculate", "best_of_n")
OTHERS = {  # from an LM: another one, and what the error says
    "width": (lambda lm, make: make(dataclasses.replace(lm.config, mlp_width=20)), "mlp_width"),
    "layers": (lambda lm, make: make(dataclasses.replace(lm.config, num_layers=1)), "num_layers"),
    "seed": (lambda lm, make: make(lm.config, 7), "the weights differ"),
    "one weight of a layer": (
        lambda lm, make: changed(lm, "blocks"), "the weights differ",
    ),
    "one weight of the embedding": (
        lambda lm, make: changed(lm, "embed"), "the weights differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", OTHERS)
def test_another_model_than_that_of_the_prefill_is_refused(
    tiny_lm, make_lm, other, way
):
    make, told = OTHERS[other]
    made = prefill.after(tiny_lm, PREFIX)
    with pytest.raises(ValueError, match=rf"done with another model: .*{told}"):
        sampled(make(tiny_lm, make_lm), made, way)


def test_weights_that_a_training_step_has_donated_are_refused(tiny_lm):
    gone = jax.tree.map(jnp.copy, tiny_lm)
    made = prefill.after(gone, PREFIX)
    jax.tree.leaves(gone)[0].delete()
    with pytest.raises(ValueError, match="another model"):
        sampled(tiny_lm, made, "generate")


SAME = {
    "copied": lambda lm: jax.tree.map(jnp.copy, lm),
    "unstacked": transformer.unstack,
    "fewer ids": lambda lm: transformer.limit_ids(lm, lm.config.vocab_size - 2),
}


@pytest.mark.parametrize("way", SAME)
def test_the_same_model_in_another_form_is_accepted(tiny_lm, way):
    lm = SAME[way](tiny_lm)
    got = sampled(lm, prefill.after(tiny_lm, PREFIX), "generate")
    want = sampled(lm, prefill.WHOLE, "generate")
    np.testing.assert_array_equal(got.batch.tokens, want.batch.tokens)
    np.testing.assert_allclose(got.raw_logps, want.raw_logps, atol=1e-5)
