"""The decoder against its plain twin in float64, and every path against the others."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import transformer as oracle

from alignax import logprob
from alignax.batch import LM
from alignax.models import transformer

FEATURES = {  # each is one thing that the twin does in its own way
    "llama": {},
    "untied": dict(tied=False),
    "multi-head": dict(num_kv_heads=4),
    "multi-query": dict(num_kv_heads=1),
    "window": dict(window=4),
    "alternating": dict(window=4, local_layers=(True, False), rope_theta_local=100.0),
    "attention-softcap": dict(attn_softcap=1.5),
    "final-softcap": dict(final_softcap=2.0),
    "qk-norm": dict(qk_norm=True),
    "qkv-bias": dict(qkv_bias=True),
    "post-norms": dict(post_norms=True, norm_offset=True, embed_scale=True),
    "query-scale": dict(query_scale=24.0, activation="gelu_tanh"),
    "gelu": dict(activation="gelu"),
    "linear-rope": dict(rope_scaling=("linear", 4.0)),
    "llama3-rope": dict(
        rope_theta=100.0, rope_scaling=("llama3", 8.0, 1.0, 4.0, 32.0)
    ),
    "biases": dict(qkv_bias=True, o_bias=True, mlp_bias=True),
    "yarn": dict(
        rope_theta=100.0, rope_scaling=("yarn", 8.0, 32.0, 1.3, 8.0, 0.5, False)
    ),
    "yarn-truncated": dict(
        rope_theta=100.0, rope_scaling=("yarn", 8.0, 32.0, 1.3, 8.0, 0.5, True)
    ),
    "smollm3": dict(rope_layers=(False, True), window=4, local_layers=(True, False)),
    "olmo2": dict(
        pre_norms=False, post_norms=True, qk_norm=True, qk_norm_whole=True, tied=False
    ),
    "all-of-gemma": dict(
        window=4, local_layers=(False, True), rope_theta_local=100.0,
        rope_scaling=("linear", 2.0), attn_softcap=5.0, final_softcap=3.0,
        qk_norm=True, post_norms=True, norm_offset=True, embed_scale=True,
        query_scale=10.0, activation="gelu_tanh",
    ),
}  # fmt: skip


@pytest.fixture(params=FEATURES.values(), ids=FEATURES)
def lm(request, tiny_config, make_lm):
    return make_lm(dataclasses.replace(tiny_config, **request.param))


def ids(n, t, vocab=37, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (n, t))


def exact(lm, tokens, cotangent=None):
    """The twin's log-probabilities, and their gradient, in float64."""
    with jax.enable_x64(True):
        params = oracle.float64(lm.params)

        def run(params):
            return oracle.logps(lm.config, params, tokens)

        if cotangent is None:
            return np.asarray(jax.jit(run)(params))
        cotangent = jnp.asarray(cotangent, jnp.float64)

        def total(params):
            return (run(params) * cotangent).sum()

        return jax.tree.map(np.asarray, jax.jit(jax.grad(total))(params))


def test_log_probabilities_are_those_of_the_twin(lm):
    tokens = ids(2, 13)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(logprob.sequence_logps)(lm, jnp.asarray(tokens))
    # float32 through two layers at logits of order 10; measured below 2e-5
    np.testing.assert_allclose(got, exact(lm, tokens), atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["untied", "all-of-gemma", "biases", "smollm3", "olmo2"],
)
def test_gradients_are_those_of_the_twin(name, tiny_config, make_lm):
    lm = make_lm(dataclasses.replace(tiny_config, **FEATURES[name]))
    tokens = ids(2, 9)
    cotangent = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)
    want = exact(lm, tokens, cotangent)

    def total(params):
        logps = logprob.sequence_logps(LM(lm.config, params), jnp.asarray(tokens))
        return (logps * cotangent).sum()

    got = jax.jit(jax.grad(total))(lm.params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        # float32 sums over some dozens of terms, relative to the leaf's largest entry
        np.testing.assert_allclose(
            a, b, atol=1e-4 * np.abs(b).max() + 1e-6, err_msg=str(path)
        )
        assert np.abs(b).max() > 0, f"{path} has no gradient: the test is blind to it"


def test_compiled_equals_eager(tiny_lm):
    tokens = jnp.asarray(ids(2, 13))
    eager = logprob.sequence_logps(tiny_lm, tokens)
    compiled = jax.jit(logprob.sequence_logps)(tiny_lm, tokens)
    np.testing.assert_allclose(compiled, eager, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["alternating", "all-of-gemma", "biases", "smollm3", "olmo2", "yarn"],
)
def test_cached_decode_is_the_kernel(name, tiny_config, make_lm):
    """One token at a time through the cache gives the rows of the whole pass."""
    lm = make_lm(dataclasses.replace(tiny_config, **FEATURES[name]))
    tokens = jnp.asarray(ids(2, 11))
    whole = jax.jit(logprob.sequence_logps)(lm, tokens)

    @jax.jit
    def step(lm, tokens, positions, cache):
        h, cache = transformer.hidden(lm, tokens, positions, cache=cache)
        return logprob.rows(lm, h), cache

    cache = transformer.init_cache(lm.config, 2, 11)
    positions = jnp.broadcast_to(jnp.arange(11), (2, 11))
    rows = []
    for at in (slice(0, 4), *(slice(t, t + 1) for t in range(4, 10))):
        some, cache = step(lm, tokens[:, at], positions[:, at], cache)
        rows.append(some)
    rows = jnp.concatenate(rows, 1)
    got = jnp.take_along_axis(rows, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(got, whole[:, 1:], atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "alternating", "attention-softcap"])
def test_tiled_attention_is_whole_attention(name, tiny_config, make_lm):
    """Tiles of 4 queries over 13 tokens: the last tile is ragged."""
    config = dataclasses.replace(tiny_config, **FEATURES[name])
    lm, tokens = make_lm(config), jnp.asarray(ids(2, 13))

    def run(tile, params):
        lm = LM(dataclasses.replace(config, attn_tile=tile), params)
        return logprob.sequence_logps(lm, tokens).sum()

    value, grads = jax.jit(jax.value_and_grad(functools.partial(run, 64)))(lm.params)
    tiled, tiled_grads = jax.jit(jax.value_and_grad(functools.partial(run, 4)))(
        lm.params
    )
    np.testing.assert_allclose(tiled, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(tiled_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-6)


def test_recomputation_changes_nothing(tiny_lm):
    tokens = jnp.asarray(ids(2, 13))

    def gradient(remat):
        def run(params):
            config = dataclasses.replace(tiny_lm.config, remat=remat)
            return logprob.sequence_logps(LM(config, params), tokens).sum()

        return jax.tree.leaves(jax.jit(jax.grad(run))(tiny_lm.params))

    assert transformer.REMAT[0] == "none"
    want, *others = map(gradient, transformer.REMAT)
    for remat, got in zip(transformer.REMAT[1:], others, strict=True):
        for a, b in zip(got, want, strict=True):
            atol = 1e-5 * np.abs(b).max() + 1e-6
            np.testing.assert_allclose(a, b, atol=atol, err_msg=remat)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "length, more",  # one tile of attention, and several
    [(24, FEATURES["olmo2"]), (200, FEATURES["biases"])],
    ids=str,
)
def test_no_product_is_computed_again_beside_elementwise_ones(
    length, more, tiny_config, make_lm
):
    tokens = jnp.asarray(ids(2, length))
    lm = make_lm(dataclasses.replace(tiny_config, **more))

    def compiled(remat):
        config = dataclasses.replace(lm.config, remat=remat)

        def run(params):
            return logprob.sequence_logps(LM(config, params), tokens).sum()

        program = jax.jit(jax.grad(run)).lower(lm.params).compile()
        products = len(re.findall(r"= \S+ dot\(", program.as_text()))
        return products, program.memory_analysis().temp_size_in_bytes

    plain, light, whole = map(compiled, ("none", "elementwise", "block"))
    assert light[0] == plain[0] < whole[0]
    assert light[1] < 0.8 * plain[1]


@pytest.mark.usefixtures("optimised")
def test_bfloat16_follows_float32(tiny_config, make_lm):
    lm = make_lm(tiny_config)
    half = LM(dataclasses.replace(tiny_config, dtype="bfloat16"), lm.params)
    tokens = jnp.asarray(ids(8, 13))
    run = jax.jit(lambda lm: logprob.sequence_logps(lm, tokens))
    full, low = np.asarray(run(lm)), np.asarray(run(half))
    assert low.dtype == np.float32
    error = np.abs(low - full)
    # 8 bits through two layers: logits of order 5 move by some 2^-6 of themselves
    assert np.median(error) < 0.05
    assert error.max() < 0.5
    assert error.max() > 1e-4  # it really ran in another precision


@pytest.mark.parametrize("name", ["llama", "smollm3", "olmo2", "yarn"])
def test_segments_do_not_see_each_other(name, tiny_config, make_lm):
    """Two sequences packed in one row score as they do alone."""
    lm = make_lm(dataclasses.replace(tiny_config, **FEATURES[name]))
    a, b = ids(1, 5, seed=1), ids(1, 7, seed=2)
    packed = jnp.asarray(np.concatenate([a, b], 1))
    positions = jnp.asarray([[*range(5), *range(7)]])
    attend = jnp.asarray([[1] * 5 + [2] * 7])
    run = jax.jit(transformer.hidden)
    h, _ = run(lm, packed, positions, attend)
    alone = [run(lm, jnp.asarray(x))[0] for x in (a, b)]
    np.testing.assert_allclose(h, jnp.concatenate(alone, 1), atol=1e-5)
