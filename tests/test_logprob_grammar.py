"""The kernel under a grammar: distributions over the ids that may follow, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import transformer as oracle
from test_logprob import HEADS, TILES, V, case, head_only

from alignax import logprob
from alignax.batch import LM
from alignax.inputs import layout
from alignax.models import fallback
from alignax.models.sharding import make_mesh, put_batch, put_params
from alignax.models.xla_head import Allowed

pytestmark = pytest.mark.slow

NEEDS = ("logps", *logprob.READ)
STATES = 4


def flags_of(size, seed=5):
    """[S, V]: about a third of the ids by state; one state has every id, one just two."""
    flags = np.random.default_rng(seed).random((STATES, size)) < 0.35
    flags[0], flags[3] = True, False
    flags[:, :2] = True
    return flags


def allowed_case(tokens, size):
    """States [N, T] of a case, and ids that are allowed in them."""
    rng, flags = np.random.default_rng(7), flags_of(size)
    states = rng.integers(0, STATES, np.shape(tokens)).astype(np.int32)
    ids = np.array([rng.choice(np.flatnonzero(flags[s])) for s in states.flat])
    return jnp.asarray(states), jnp.asarray(ids.reshape(states.shape)), flags


def naive(configs, arrays, tokens, mask, flags, states):
    """Every field by its definition on whole rows, of whatever dtype the arrays have."""
    logits = [
        oracle.cap(h @ (w.T if c.tied else w), c.final_softcap)
        for c, (h, w) in zip(configs, arrays, strict=True)
    ]
    here = jnp.roll(flags[states], -1, 1)  # row t is the distribution of token t + 1
    common = min(z.shape[-1] for z in logits)

    def normal(z, here):
        z = jnp.where(here, z, -jnp.inf)
        return jnp.where(here, z - jax.nn.logsumexp(z, -1, keepdims=True), 0.0)

    whole = normal(logits[0], here)
    p, r = (normal(z[..., :common], here[..., :common]) for z in (logits[0], logits[-1]))  # fmt: skip
    some = here[..., :common]
    out = {
        "logps": jnp.take_along_axis(whole, jnp.roll(tokens, -1, 1)[..., None], -1)[..., 0],
        "entropy": -jnp.where(here, jnp.exp(whole) * whole, 0).sum(-1),
        "collision": jnp.log(jnp.where(here, jnp.exp(2 * whole), 0).sum(-1)),
        "kl": jnp.where(some, jnp.exp(p) * (p - r), 0).sum(-1),
        "forward_kl": jnp.where(some, jnp.exp(r) * (r - p), 0).sum(-1),
    }  # fmt: skip
    return {k: jnp.where(mask, jnp.roll(v, 1, 1), 0) for k, v in out.items()}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    ("heads", "size"), [(("softcap", "tied"), V), (("tied-softcap", "untied"), V - 3)]
)
def test_fields_and_gradients_are_those_of_float64(heads, size, tiles):
    ours = head_only(**HEADS[heads[0]])
    theirs = head_only(**HEADS[heads[1]], width=5, vocab=size)
    h, weight, tokens, mask = case(ours)
    other_h, other_weight = case(theirs, seed=1)[:2]
    states, tokens, flags = allowed_case(tokens, V)
    rng = np.random.default_rng(2)
    g = {k: rng.normal(size=mask.shape).astype(np.float32) for k in NEEDS}

    def tiled(h, w):
        lms = [
            LM(c, {"embed" if c.tied else "head": x})
            for c, x in ((ours, w), (theirs, other_weight))
        ]
        return logprob._read(
            lms[0], h, tokens, mask, None, tiles, "highest", logprob.READ,
            (lms[1], other_h), allowed=Allowed(jnp.asarray(flags), states),
        )  # fmt: skip

    got, pull = jax.vjp(tiled, h, weight)
    dh, dw = pull(g)
    with jax.enable_x64(True):
        frozen = tuple(map(oracle.float64, (other_h, other_weight)))
        host = [np.asarray(x) for x in (tokens, mask)]
        want, pull = jax.vjp(
            lambda h, w: naive(
                (ours, theirs), ((h, w), frozen), *host, jnp.asarray(flags),
                np.asarray(states),
            ),
            oracle.float64(h), oracle.float64(weight),
        )  # fmt: skip
        want_dh, want_dw = pull(jax.tree.map(oracle.float64, g))
    for name in NEEDS:
        np.testing.assert_allclose(got[name], want[name], atol=5e-5, err_msg=name)
    np.testing.assert_allclose(dh, want_dh, atol=2e-4)
    np.testing.assert_allclose(dw, want_dw, atol=5e-4)


def read(lm, kl_to, flags, mesh, params, batch):
    """Every field of a batch, and the gradient of their weighted sum."""

    def value(params):
        found = logprob.score(
            LM(lm.config, params), batch, needs=logprob.READ, kl_to=kl_to, mesh=mesh,
            grammar=flags, tiles=(8, 16),
        )  # fmt: skip
        fields = {k: getattr(found, k) for k in NEEDS}
        weights = 1 + jnp.arange(batch.tokens.shape[-1]) % 3
        return sum((v * weights).sum() for v in fields.values()), fields

    return jax.value_and_grad(value, has_aux=True)(params)


def close(got, want, atol):
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=atol * max(1, np.abs(b).max()))


@pytest.mark.parametrize("size", [37, 40])  # 40 ids are split over the mesh
def test_packed_rows_and_meshes_agree_with_plain_rows(
    size, tiny_config, make_lm, make_batch
):
    tiny_config = dataclasses.replace(tiny_config, vocab_size=size)
    lm, frozen = make_lm(tiny_config), make_lm(tiny_config, 1)
    batch = make_batch(8, 2, 24)
    batch = jax.tree.map(np.asarray, batch)
    states = np.random.default_rng(0).integers(0, STATES, batch.tokens.shape)
    states = np.where(batch.mask, states, 0).astype(np.int32)
    batch = batch._replace(extra={"grammar_states": states})
    flags = flags_of(tiny_config.vocab_size - 2)  # ids beyond the table never follow
    want = jax.jit(functools.partial(read, lm, frozen, flags, None))(lm.params, batch)
    logps = np.asarray(want[0][1]["logps"])
    here = np.pad(flags, ((0, 0), (0, 2)))[states, np.asarray(batch.tokens)]
    counted = np.asarray(batch.mask)
    assert (logps[counted & ~here] < -1e29).all()
    assert (logps[counted & here] > -50).all()
    keep = batch.mask & here  # compared where there are numbers
    batch = batch._replace(mask=keep)
    want = jax.jit(functools.partial(read, lm, frozen, flags, None))(lm.params, batch)
    for shape, shards in (((1, 1, 1), 1), ((2, 2, 2), 4), ((8, 1, 1), 8)):
        mesh = make_mesh(shape)
        packed = batch._replace(layout=layout.build(batch, length=48, shards=shards))
        other = LM(tiny_config, put_params(frozen.params, mesh))
        run = jax.jit(functools.partial(read, lm, other, flags, mesh))
        for some in (batch, packed):
            got = run(put_params(lm.params, mesh), put_batch(some, mesh))
            close(got, want, 2e-5)
    everything = jax.jit(functools.partial(read, lm, frozen, np.ones((STATES, tiny_config.vocab_size), bool), None))  # fmt: skip
    plain = jax.jit(functools.partial(read, lm, frozen, None, None))
    close(everything(lm.params, batch), plain(lm.params, batch), 1e-6)


def test_what_a_grammar_needs_is_said(tiny_lm, make_batch, caplog):
    batch, flags = make_batch(2, 1, 8), np.ones((1, tiny_lm.config.vocab_size), bool)
    with pytest.raises(ValueError, match=r"needs the states of the responses"):
        logprob.score(tiny_lm, batch, grammar=flags)
    states = np.zeros(batch.tokens.shape, np.int32)
    batch = batch._replace(extra={"grammar_states": states})
    pallas = dataclasses.replace(tiny_lm.config, head_kernel="pallas")
    flags = flags.copy()
    flags[:, int(batch.tokens[0, 0, 0]) :: 2] = False
    fallback.say_once.cache_clear()
    got = logprob.score(LM(pallas, tiny_lm.params), batch, grammar=flags)
    want = logprob.score(tiny_lm, batch, grammar=flags)
    np.testing.assert_allclose(got.logps, want.logps, rtol=1e-6)
    plain = logprob.score(tiny_lm, batch).logps
    assert np.abs(np.asarray(got.logps) - plain).max() > 0.1
    assert "a grammar asked for" in caplog.text
