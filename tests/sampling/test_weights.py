"""The weights that decoding reads: the same model, copied once, never out of date."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import LM
from alignax.models import fallback, int8, lora, transformer
from alignax.sampling import decode, weights

FEATURES = {
    "plain": {},
    "biases": dict(qkv_bias=True, o_bias=True, mlp_bias=True, num_kv_heads=4),
    "whole norms": dict(pre_norms=False, post_norms=True, qk_norm=True, qk_norm_whole=True),
    "untied": dict(tied=False, qk_norm=True, num_kv_heads=1),
}  # fmt: skip
LORA = lora.Lora(rank=2, alpha=4.0, targets=("q", "down"))


@pytest.fixture
def lm(tiny_config):
    return LM(tiny_config, transformer.init(tiny_config, jax.random.key(0)))


def noisy(lm):
    """Without zeros, which would hide a bias in the wrong place."""
    leaves, tree = jax.tree.flatten(lm.params)
    draws = np.random.default_rng(1)
    moved = [x + 0.1 * draws.normal(size=x.shape).astype(np.float32) for x in leaves]
    return LM(lm.config, jax.tree.unflatten(tree, moved))


@jax.jit
def logits(lm):
    """Of a prefill of three tokens and of a step, for two rows."""
    tokens = jnp.array([[3, 1, 4], [1, 5, 9]])
    cache = transformer.init_cache(lm.config, 2, 4)
    h, cache = transformer.hidden(lm, tokens, cache=cache)
    last = transformer.hidden(lm, tokens[:, :1], jnp.full((2, 1), 3), cache=cache)[0]
    return transformer.unembed(lm, jnp.concatenate([h, last], 1))


def names(lm):
    """The parts and leaves of the first layer's projections."""
    layer = lm.params["blocks"][0]
    return {
        f"{name}/{leaf}"
        for part in ("attn", "mlp")
        for name, node in layer[part].items()
        for leaf in node
    }


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_the_model_is_the_same(tiny_config, changes):
    config = dataclasses.replace(tiny_config, **changes)
    lm = noisy(LM(config, transformer.init(config, jax.random.key(0))))
    made = weights.for_decoding(lm)
    assert {"qkv/left", "o/left", "gate_up/left", "down/left"} <= names(made)
    assert not any(name.endswith("/kernel") for name in names(made))
    np.testing.assert_allclose(logits(made), logits(lm), atol=2e-5)


def test_adapters_stay_beside_their_kernels(lm):
    adapters = lora.init(lm, LORA, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.3, adapters)
    attached = lora.attach(lm, adapters, LORA)
    made = weights.for_decoding(attached)
    assert {"q/left", "q/a", "k/left", "gate_up/left", "down/a"} <= names(made)
    np.testing.assert_allclose(logits(made), logits(attached), atol=2e-5)
    assert np.abs(logits(attached) - logits(lm)).max() > 0.1


@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_other_dtypes_are_as_they_were(lm, form):
    """Products of int8 or bfloat16 have no use for the other order on a CPU."""
    if form == "int8":
        lm = LM(lm.config, int8.quantize(lm.params))
    else:
        lm = LM(lm.config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params))
    made = weights.for_decoding(lm)
    assert {"q/kernel", "up/kernel"} <= names(made)
    np.testing.assert_array_equal(logits(made), logits(transformer.unstack(lm)))


def test_accelerators_read_the_layers_as_they_are(lm, monkeypatch):
    monkeypatch.setattr(fallback, "platform", lambda: "tpu")
    assert weights.ready(lm) is lm
    made = weights.for_decoding(lm)
    assert {"q/kernel", "up/kernel"} <= names(made)


def test_for_decoding_twice_is_once(lm):
    once = weights.for_decoding(lm)
    twice = weights.for_decoding(once)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(once), jax.tree.leaves(twice)))
    assert weights.ready(once) is once


@pytest.fixture
def made(monkeypatch):
    """How often weights were copied."""
    found, make = [], weights._make_ready
    monkeypatch.setattr(weights, "_make_ready", lambda lm: found.append(lm) or make(lm))
    return found


def generate(lm, seed=0):
    prompts, lengths = np.array([[3, 1, 4]]), np.array([3])
    out = decode.generate(lm, prompts, lengths, jax.random.key(seed), max_new=3)
    return np.asarray(out.batch.tokens)


def test_a_model_that_is_used_again_is_copied_once(lm, made):
    first = [generate(lm) for _ in range(4)]
    assert len(made) == 2  # the first copy is not kept
    assert all((tokens == first[0]).all() for tokens in first)
    smaller = transformer.limit_ids(lm, 20)
    assert generate(smaller).max() < 20
    assert len(made) == 2, "the same arrays under another config were copied again"


def test_the_copy_goes_with_the_model(tiny_config):
    lm = LM(tiny_config, transformer.init(tiny_config, jax.random.key(0)))
    for _ in range(2):
        made = weights.ready(lm)
    params = next(x.params for x in weights._known.values() if x.params is made.params)
    assert params is weights.ready(lm).params
    del lm
    gc.collect()
    assert not any(x.params is params for x in weights._known.values())


def test_other_weights_are_another_model(lm, made):
    """As a policy after a step of training; some arrays may be the same."""
    for _ in range(2):
        before = weights.ready(lm)
    other = LM(lm.config, {**lm.params, "blocks": jax.tree.map(lambda x: 2 * x, lm.params["blocks"])})  # fmt: skip
    for _ in range(2):
        after = weights.ready(other)
    for x, y in [(before, lm), (after, other)]:
        np.testing.assert_allclose(logits(x), logits(y), atol=2e-5)
    assert np.abs(logits(before) - logits(after)).max() > 0.01


def test_deleted_weights_are_an_error(lm):
    for _ in range(2):
        generate(lm)
    jax.tree.leaves(lm.params["blocks"])[0].delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        generate(lm)
