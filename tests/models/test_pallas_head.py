"""The Pallas head against `xla_head` and float64, in interpret mode; and compiled."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignax import logprob
from alignax.batch import LM, Batch
from alignax.inputs import layout
from alignax.models import pallas_head, sharding, transformer, xla_head
from alignax.models.pallas_head import Kernel
from alignax.models.transformer import ModelConfig
from alignax.preflight import chips, compiled

pytestmark = pytest.mark.slow

D, M, TILES = 32, 50, (16, 128)
CASES = {  # vocabulary, its axis, soft-cap, whether targets share states; temperature
    "whole tiles": (256, 1, None, False),
    "ragged": (300, 1, None, False),
    "tied, capped": (300, 0, 5.0, False),
    "packed": (130, 1, None, True),
    "tempered": (300, 1, None, False, 0.6),
    "tempered, tied, capped": (300, 0, 5.0, False, 1.7),
}


def operands(v, vocab_axis, shared, dtype, scale=1.0):
    rng = np.random.default_rng(0)
    k = 20 if shared else M
    shape = (D, v) if vocab_axis else (v, D)
    return (
        jnp.asarray(scale * rng.normal(size=(k, D)), dtype),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
        jnp.asarray(rng.integers(0, v, M)),
        jnp.asarray(rng.random(M) < 0.6),
        jnp.asarray(rng.integers(0, k, M)) if shared else None,
        jnp.asarray(rng.normal(size=M), jnp.float32),
    )


def value_and_grad(function, h, weight, cotangent):
    @jax.jit
    def run(h, weight):
        def total(h, weight):
            out = function(h, weight)
            return (out * cotangent).sum(), out

        (_, out), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(h, weight)
        return out, grads

    return run(h, weight)


def tiled(vocab_axis, cap, targets, scored, source, temperature=1.0):
    tiling = xla_head.Tiling(
        (xla_head.Head(vocab_axis, cap, temperature),), (), tiles=TILES,
        precision="highest",
    )  # fmt: skip

    def run(h, weight):
        return xla_head.read(tiling, ((h, weight),), targets, scored, source)["logps"]

    return run


def double(
    h, weight, vocab_axis, cap, targets, scored, source, cotangent, temperature=1.0
):
    """In float64, with the whole row of logits: (log-probs, dh, dw)."""
    h, w = np.float64(h), np.float64(weight)
    w = w if vocab_axis else w.T
    at = np.arange(M) if source is None else np.asarray(source)
    raw = h[at] @ w
    capped = raw if cap is None else cap * np.tanh(raw / cap)
    z = capped / temperature
    top = z.max(-1, keepdims=True)
    logp = z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))
    keep = np.asarray(scored)
    out = np.where(keep, logp[np.arange(M), targets], 0)
    hit = np.eye(w.shape[1])[np.asarray(targets)]
    dz = (hit - np.exp(logp)) * (np.float64(cotangent) * keep)[:, None] / temperature
    dz = dz if cap is None else dz * (1 - (capped / cap) ** 2)
    dh = np.zeros_like(h)
    np.add.at(dh, at, dz @ w.T)
    dw = h[at].T @ dz
    return out, dh, dw if vocab_axis else dw.T


def close(got, want, tolerance):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max()
    )


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_whole_row(name):
    v, axis, cap, shared, *rest = CASES[name]
    temperature = rest[0] if rest else 1.0
    h, weight, targets, scored, source, g = operands(v, axis, shared, jnp.float32)
    kernel = Kernel(axis, cap, TILES, interpret=True, temperature=temperature)

    def ours(h, weight):
        return pallas_head.logps(kernel, h, weight, targets, scored, source)

    out, grads = value_and_grad(ours, h, weight, g)
    want = double(h, weight, axis, cap, targets, scored, source, g, temperature)
    assert (np.asarray(out)[~np.asarray(scored)] == 0).all()
    for got, expected in zip((out, *grads), want, strict=True):
        close(got, expected, 1e-5)  # float32 sums in another order
    tiles = tiled(axis, cap, targets, scored, source, temperature)
    for got, expected in zip(
        (out, *grads), jax.tree.leaves(value_and_grad(tiles, h, weight, g)), strict=True
    ):
        close(got, expected, 1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_bfloat16_states_give_what_xla_head_gives(scale):
    """Sums in float32: with logits of several hundreds a bfloat16 sum would be nats off."""
    h, weight, targets, scored, source, g = operands(300, 1, True, jnp.bfloat16, scale)
    kernel = Kernel(tiles=TILES, interpret=True)

    def ours(h, weight):
        return pallas_head.logps(kernel, h, weight, targets, scored, source)

    out, grads = value_and_grad(ours, h, weight, g)
    tiles = tiled(1, None, targets, scored, source)
    want, slopes = value_and_grad(tiles, h, weight, g)
    assert float(jnp.abs(want).max()) > 100 * (scale > 1)
    close(out, want, 1e-6)
    rounded = np.float32(weight.astype(jnp.bfloat16))  # operands are multiplied as such
    exact = double(h, rounded, 1, None, targets, scored, source, g)
    close(out, exact[0], 1e-6)
    assert [x.dtype for x in grads] == [jnp.bfloat16, jnp.float32]
    # the logits' gradient is rounded to bfloat16 before it is multiplied, on both sides
    for got, tiled_slope, expected in zip(grads, slopes, exact[1:], strict=True):
        close(got, tiled_slope, 1e-2)
        close(got, expected, 1e-2)


def test_nothing_scored_is_zero_and_finite():
    h, weight, targets, _, _, g = operands(130, 1, False, jnp.float32)
    kernel = Kernel(tiles=TILES, interpret=True)

    def ours(h, weight):
        return pallas_head.logps(kernel, h, weight, targets, jnp.zeros(M, bool), None)

    out, grads = value_and_grad(ours, h, weight, g)
    for x in (out, *grads):
        np.testing.assert_array_equal(x, 0)


def test_a_vocabulary_over_the_mesh_is_one_vocabulary():
    """Rules called by hand: in interpret mode shard_map cannot follow what varies.

    Of a state each shard of the vocabulary gives a part of the gradient, of a weight each
    shard of tokens: `logprob` sums them by the transposes of its casts; here psum does.
    """
    mesh = sharding.make_mesh((2, 1, 4))
    v = 512
    h, weight, targets, scored, _, g = operands(v, 1, False, jnp.float32)
    kernel = Kernel(tiles=TILES, axis="model", interpret=True)

    def shard(h, weight, targets, scored, g):
        first = jax.lax.axis_index("model") * weight.shape[1]
        given = (kernel, h, weight, targets - first, scored, None)
        out, residuals = pallas_head._forward(*given)
        dh, dw, *_ = pallas_head._backward(kernel, residuals, g)
        return out, jax.lax.psum(dh, "model"), jax.lax.psum(dw, ("data", "fsdp"))

    tokens, columns = P(("data", "fsdp")), P(None, "model")
    split = jax.shard_map(
        shard, mesh=mesh, in_specs=(tokens, columns, tokens, tokens, tokens),
        out_specs=(tokens, tokens, columns), check_vma=False,
    )  # fmt: skip
    out, *grads = jax.jit(split)(h, weight, targets, scored, g)
    tiles = tiled(1, None, targets, scored, None)
    want, slopes = value_and_grad(tiles, h, weight, g)
    close(out, want, 1e-5)
    for got, expected in zip(grads, slopes, strict=True):
        close(got, expected, 1e-5)


def slice_of(name, shape):
    devices = chips.devices(chips.parse(name))
    return devices[0], sharding.make_mesh(shape, devices)


def on(mesh, spec, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler installed"
)


@needs_libtpu
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_the_tpu_compiler_takes_the_kernels_and_they_hold_no_logits(vocab_axis):
    m, d, v = 1024, 512, 8320  # the last tile of the vocabulary is cut
    device, mesh = slice_of("v5e:1x1", (1, 1, 1))

    def total(h, weight, targets, scored):
        kernel = Kernel(vocab_axis)
        return pallas_head.logps(kernel, h, weight, targets, scored, None).sum()

    given = (
        on(mesh, P(), (m, d), jnp.bfloat16),
        on(mesh, P(), (d, v) if vocab_axis else (v, d), jnp.float32),
        on(mesh, P(), (m,), jnp.int32), on(mesh, P(), (m,), bool),
    )  # fmt: skip
    with jax.default_device(device):  # the kernels ask what chip it is
        lowered = jax.jit(jax.grad(total, (0, 1))).lower(*given)
    program = lowered.compile()
    # copies of the states, in bfloat16; neither logits nor the weights in another dtype
    assert compiled.memory(program).temporaries < min(m, d) * v * 2
    assert program.as_text().count("tpu_custom_call") >= 3


@needs_libtpu
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_the_tpu_compiler_takes_a_split_vocabulary_and_gathers_none():
    """As `score` runs it, whose casts sum the gradients of shards: their types are checked."""
    n, t, d, v = 8, 64, 256, 2048
    device, mesh = slice_of("v5e:2x2", (1, 2, 2))
    config = ModelConfig(
        vocab_size=v, width=d, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=128,
        mlp_width=256, max_length=t, dtype="bfloat16", head_kernel="pallas",
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes, sharding.shardings(shapes, mesh),
    )  # fmt: skip
    rows = P(("data", "fsdp"))
    kinds = dict(tokens=jnp.int32, mask=bool, lengths=jnp.int32, feedback=jnp.float32)
    batch = Batch(valid=on(mesh, rows, (n, 1), bool), **{
        name: on(mesh, rows, (n, 1, t) if name in ("tokens", "mask") else (n, 1), kind)
        for name, kind in kinds.items()
    })  # fmt: skip

    def total(params, batch):
        return logprob.score(LM(config, params), batch, mesh=mesh).logps.sum()

    with jax.default_device(device):
        program = jax.jit(jax.grad(total)).lower(params, batch).compile().as_text()
    assert program.count("tpu_custom_call") >= 3
    found = compiled.collectives(compiled.Module(program))
    # the head's columns of a shard and numbers a token, but never a row of logits
    assert max(c.size for c in found) <= max(n * t * d, d * v // 2) * 4


def test_the_kernel_takes_it_where_the_config_says_so(tiny_config, make_lm, make_batch):
    """Values and gradients of `score`, packed or not; what it cannot do, XLA does."""
    batch = jax.tree.map(np.asarray, make_batch(4, 2, 16))
    laid, _ = layout.lay(batch, shards=1)
    lm = make_lm(tiny_config)
    other = LM(dataclasses.replace(tiny_config, head_kernel="pallas"), lm.params)

    def read(config, params, batch, **more):
        scores = logprob.score(LM(config, params), batch, **more)
        return (scores.logps * jnp.arange(16)).sum(), scores

    for rows in (batch, laid):
        run = functools.partial(jax.value_and_grad(read, 1, True), batch=rows)
        (_, want), slope = run(tiny_config, lm.params)
        (_, got), slopes = run(other.config, lm.params)
        np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            slopes, slope,
        )  # fmt: skip
    text = str(jax.make_jaxpr(lambda b: logprob.score(other, b).logps)(batch))
    assert "pallas_call" in text
    text = str(
        jax.make_jaxpr(lambda b: logprob.score(other, b, needs=("entropy",)))(batch)
    )
    assert "pallas_call" not in text
