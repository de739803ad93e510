"""Kernels of attention against its definition, interpreted on CPU; and compiled."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignax.batch import LM
from alignax.models import fallback, kernels, sharding, transformer
from alignax.models.attention import Attend, attention, same_segment, siblings
from alignax.preflight import chips

N, T, H, K, E = 2, 260, 4, 2, 16  # three blocks of 128, the last one filled up
LOCAL = jnp.array(True)  # traced: in a scan over layers of both kinds
CASES = {  # of the config, kind of mask, whether the layer is local
    "causal": ({}, None, False),
    "a local layer, by a flag": (dict(window=40), None, LOCAL),
    "segments, capped, local": (
        dict(window=20, attn_softcap=2.0), "segments", True,
    ),
    "siblings, local by a flag": (dict(window=9), "siblings", LOCAL),
    "siblings, capped, local": (
        dict(query_scale=7.0, attn_softcap=2.0, window=9), "siblings", True,
    ),
}  # fmt: skip
SPLASH = (
    ("segments, capped, local", (1, 2, 2)),
    ("siblings, capped, local", (1, 1, 1)),
)
CUDNN = ("causal", "a local layer, by a flag", "siblings, local by a flag")


def setting(name, kernel):
    more, kind, local = CASES[name]
    config = transformer.ModelConfig(
        vocab_size=8, width=H * E, num_layers=1, num_heads=H, num_kv_heads=K,
        head_dim=E, mlp_width=8, attn_kernel=kernel, **more,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(N, T, h, E)), jnp.float32) for h in (H, K, K, H)
    )
    positions = jnp.broadcast_to(jnp.arange(T), (N, T))
    group = jnp.asarray(np.sort(rng.integers(0, 4, (N, T)), 1))
    attend = None
    if kind == "segments":
        attend = Attend((group,), same_segment)
    if kind == "siblings":
        positions = jnp.asarray(rng.integers(0, 40, (N, T)))
        attend = Attend((group, jnp.asarray(rng.integers(0, 3, (N, T)))), siblings)
    return config, (q, k, v, g), (positions, attend, local, kind != "siblings")


def value_and_grads(function, operands):
    *qkv, g = operands

    @jax.jit
    def run(*qkv):
        y, back = jax.vjp(function, *qkv)
        return y, *back(g)

    return run(*qkv)


def ours(config, positions, attend, local):
    def run(q, k, v):
        k, v = jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)  # [N, K, S, E]
        return attention(q, k, v, positions, positions, attend, local, config)

    return run


@pytest.mark.parametrize("name, shape", SPLASH)
def test_splash_attention_gives_what_the_definition_gives(name, shape):
    """Every shard of a mesh with rows and heads of its own."""
    mesh = sharding.make_mesh(shape)
    config, operands, (positions, attend, local, in_order) = setting(name, "splash")
    heads = NamedSharding(mesh, P("fsdp", None, "model"))
    placed = jax.device_put(operands, heads)

    def run(q, k, v):
        return kernels.attend(
            q, k, v, positions, attend, local, config, in_order, cached=False
        )

    if mesh.size > 1:
        assert "f32[1,2,384,16]" in str(jax.jit(run).trace(*placed[:3]).jaxpr)
    got = value_and_grads(run, placed)
    want = value_and_grads(ours(config, positions, attend, local), operands)
    for a, b in zip(got, want, strict=True):
        assert a.sharding.is_equivalent_to(heads, a.ndim)
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", CUDNN)
def test_cudnn_is_asked_for_what_the_definition_says(name, monkeypatch):
    """Of the arguments alone: XLA's implementation of the same function reads them."""
    config, operands, mask = setting(name, "cudnn")
    monkeypatch.setattr(kernels, "_cudnn_refuses", lambda *_: "")
    instead = functools.partial(kernels.cudnn, implementation="xla")
    monkeypatch.setattr(kernels, "cudnn", instead)
    positions, attend, local, in_order = mask
    got = jax.jit(
        lambda q, k, v: kernels.attend(
            q, k, v, positions, attend, local, config, in_order, cached=False
        )
    )(*operands[:3])
    want = jax.jit(ours(config, *mask[:3]))(*operands[:3])
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def config_of(kernel, **more):
    return transformer.ModelConfig(
        vocab_size=20, width=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8,
        mlp_width=8, remat="block", attn_kernel=kernel, **more,
    )  # fmt: skip


def described(config, mesh):
    """An LM of which nothing exists, and where its parameters would lie."""
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    places = sharding.shardings(shapes, mesh)

    def one(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return LM(config, jax.tree.map(one, shapes, places))


def test_what_a_kernel_cannot_do_ours_does_and_one_line_says_why(caplog):
    """Of a model whose layers are scanned and recomputed; with a cache, of each layer."""
    fallback.say_once.cache_clear()
    splash, cudnn = config_of("splash"), config_of("cudnn")
    tokens = np.zeros((2, 8), int)

    def traced(config, mesh, **more):
        lm = described(config, sharding.make_mesh(mesh))

        run = jax.jit(functools.partial(transformer.hidden, **more))
        return str(run.trace(lm, tokens).jaxpr)

    text = traced(splash, (1, 2, 4))
    assert "pallas_call" in text and "shard_map" in text
    text = traced(splash, (1, 1, 1))
    assert "pallas_call" in text and "shard_map" not in text
    assert not caplog.records
    cache = transformer.init_cache(splash, 2, 8)
    start = "XLA's attention instead, "
    for why, given in {
        "keys come from a cache": lambda: traced(splash, (1, 1, 1), cache=cache),
        "2 rows do not divide over data*fsdp=4": lambda: traced(splash, (2, 2, 1)),
        "4 heads of keys do not divide over model=8": lambda: traced(splash, (1, 1, 8)),
        "platform cpu": lambda: traced(cudnn, (1, 1, 1)),
    }.items():
        assert "pallas_call" not in given()
        (record,) = caplog.records
        assert record.getMessage().endswith(start + why)
        caplog.clear()


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(cap=5.0), "soft-cap"),
        (dict(dtype=jnp.float32), "float32"),
        (dict(size=144), "heads of size 144"),
        (dict(size=12), "heads of size 12"),
        (dict(masked=True), "an odd number of tokens, 7"),
        ({}, ""),
    ],
)
def test_what_cudnn_is_not_asked_for(change, why, monkeypatch):
    monkeypatch.setattr(fallback, "platform", lambda: "gpu")
    call = kernels.Call(1.0, change.get("cap"), None, change.get("masked", False), None)
    size, dtype = change.get("size", 64), change.get("dtype", jnp.bfloat16)
    q = jax.ShapeDtypeStruct((1, 7, 2, size), dtype)
    found = kernels._cudnn_refuses(call, q, q)
    assert why in found and bool(why) == bool(found)
    assert kernels._splash_refuses(call, q, q) == "platform gpu"


def test_the_choice_is_checked():
    with pytest.raises(ValueError, match="unknown attn_kernel 'flash'"):
        dataclasses.replace(config_of("xla"), attn_kernel="flash")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler installed"
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_the_tpu_compiler_takes_it_on_a_slice_with_its_gradient():
    """Layers scanned and recomputed, rows over fsdp, heads over model, both kinds of mask.

    Layers are of both kinds too: three kernels of a causal, a local and a given mask.
    """
    devices = chips.devices(chips.parse("v5e:2x2"))
    mesh = sharding.make_mesh((1, 2, 2), devices)
    config = transformer.ModelConfig(
        vocab_size=128, width=128, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=64, mlp_width=128, dtype="bfloat16", remat="block",
        attn_kernel="splash", window=128, local_layers=(True, False),
    )  # fmt: skip

    def total(params, tokens, positions, group, branch):
        lm, attend = LM(config, params), Attend((group, branch), siblings)
        rows, _ = transformer.hidden(lm, tokens)
        packed, _ = transformer.hidden(lm, tokens, positions, attend)
        return (rows * packed).astype(jnp.float32).sum()

    rows = jax.ShapeDtypeStruct(
        (4, 384), jnp.int32, sharding=NamedSharding(mesh, sharding.BATCH)
    )
    params = described(config, mesh).params
    with jax.default_device(devices[0]):  # the kernels ask what chip it is
        lowered = jax.jit(jax.grad(total)).lower(params, *[rows] * 4)
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3 * 3
    assert "f32[2,1,2,384,384]" not in text  # scores as attention.py has them
