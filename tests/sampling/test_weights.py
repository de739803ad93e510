"""The weights that decoding reads: the same model, copied once, never out of date."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import LM
from alignax.decoders import contrastive
from alignax.models import fallback, int8, lora, sharding, transformer
from alignax.models.contract import contract
from alignax.sampling import decode, weights
from alignax.sampling.speculate import speculate

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
    assert made.params["embed"] is lm.params["embed"]
    np.testing.assert_allclose(logits(made), logits(lm), atol=2e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_stay_beside_their_kernels(lm, dora):
    settings = dataclasses.replace(LORA, dora=dora)
    adapters = lora.init(lm, settings, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.3, adapters)
    attached = lora.attach(lm, adapters, settings)
    made = weights.for_decoding(attached)
    assert {"q/left", "q/a", "k/left", "gate_up/left", "down/a"} <= names(made)
    assert ("down/gain" in names(made)) == dora
    np.testing.assert_allclose(logits(made), logits(attached), atol=2e-5)
    assert np.abs(logits(attached) - logits(lm)).max() > 0.1


def on_two_devices(lm):
    mesh = sharding.make_mesh((1, 2, 1))
    return LM(lm.config, sharding.put_params(lm.params, mesh))


OTHERS = {
    "int8": lambda lm: LM(lm.config, int8.quantize(lm.params)),
    "bfloat16": lambda lm: LM(lm.config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)),
    "computed in bfloat16": lambda lm: LM(dataclasses.replace(lm.config, dtype="bfloat16"), lm.params),
    "sharded": on_two_devices,
    # a kept copy would be out of date after `array[...] = ...`
    "numpy": lambda lm: LM(lm.config, jax.tree.map(np.asarray, lm.params)),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_other_models_are_read_as_they_are(lm, change):
    other = change(lm)
    assert weights.for_decoding(other) is other


def test_accelerators_read_models_as_they_are(lm, monkeypatch):
    monkeypatch.setattr(fallback, "platform", lambda: "tpu")
    assert weights.for_decoding(lm) is lm


def test_while_tracing_nothing_is_copied(lm):
    found = []
    jax.eval_shape(lambda lm: found.append((lm, weights.for_decoding(lm))), lm)
    assert found[0][0] is found[0][1]


@pytest.fixture
def copied(monkeypatch):
    """The models that were copied."""
    found, make = [], weights._left_operands
    monkeypatch.setattr(
        weights, "_left_operands", lambda lm: found.append(lm) or make(lm)
    )
    return found


def generate(lm, **settings):
    prompts, lengths = np.array([[3, 1, 4]]), np.array([3])
    out = decode.generate(
        lm, prompts, lengths, jax.random.key(0), max_new=3, **settings
    )
    return np.asarray(out.batch.tokens)


def test_a_model_is_copied_once_where_copies_are_kept(lm, copied):
    first = generate(lm)
    generate(lm)
    assert len(copied) == 2
    with weights.kept():
        for _ in range(3):
            np.testing.assert_array_equal(generate(lm), first)
        assert len(copied) == 3
        assert generate(transformer.limit_ids(lm, 20)).max() < 20
        with weights.kept():
            generate(lm)
        generate(lm)
        assert len(copied) == 3, "an inner one ended the outer one"
    generate(lm)
    assert len(copied) == 4


def test_a_model_twice_in_a_call_is_copied_once(lm, copied):
    """As its own amateur, in both functions of the guide, and as its own draft."""
    guide = contrastive.guide({"amateur": lm})
    generate(lm, guide=guide)
    assert len(copied) == 1
    prompts, lengths = np.array([[3, 1, 4]]), np.array([3])
    speculate(lm, lm, prompts, lengths, jax.random.key(0), max_new=2, guide=guide)
    assert len(copied) == 2


def test_copies_go_at_the_end(tiny_config):
    with weights.kept():
        lm = LM(tiny_config, transformer.init(tiny_config, jax.random.key(0)))
        made = weakref.ref(weights.for_decoding(lm).params["blocks"][0]["attn"]["qkv"]["left"])  # fmt: skip
        gc.collect()
        assert made() is not None
    gc.collect()
    assert made() is None


def test_other_weights_are_another_model(lm):
    """As a policy after a step of training; one array may differ."""
    changed = jax.tree.map(lambda x: x, lm.params)
    down = changed["blocks"]["mlp"]["down"]
    down["kernel"] = 2 * down["kernel"]
    other = LM(lm.config, changed)
    with weights.kept():
        for x in (lm, other, lm, other):
            np.testing.assert_allclose(
                logits(weights.for_decoding(x)), logits(x), atol=2e-5
            )
    assert np.abs(logits(lm) - logits(other)).max() > 0.01


def test_deleted_weights_are_an_error(lm):
    with weights.kept():
        generate(lm)
        jax.tree.leaves(lm.params["blocks"])[0].delete()
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            generate(lm)


@pytest.mark.usefixtures("optimised")
def test_a_row_of_a_product_does_not_depend_on_its_slot():
    """Bit for bit, as production compiles it: `continuous` promises it for responses."""
    rng = np.random.default_rng(0)
    kernel = jnp.float32(rng.normal(size=(96, 576)))
    product = jax.jit(lambda x: contract("fd,nd->nf", kernel, x, jnp.float32))
    for many in (2, 5, 8, 13):
        x = jnp.float32(rng.normal(size=(many, 576)))
        order = rng.permutation(many)
        np.testing.assert_array_equal(product(x)[order], product(x[order]))
