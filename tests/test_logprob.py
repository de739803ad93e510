"""The kernel against float64: values, gradients, what counts, and how much memory."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from jax.test_util import check_grads
from oracles import transformer as oracle

from alignax import logprob
from alignax.batch import LM
from alignax.models import transformer
from alignax.models.transformer import ModelConfig
from alignax.preflight import chips

MIB = 2**20
score = jax.jit(logprob.score, static_argnames="needs")
sequence_logps = jax.jit(logprob.sequence_logps)
V, D = 37, 12


def head_only(tied=False, cap=None, vocab=V, width=D, **kwargs):
    return ModelConfig(
        vocab_size=vocab, width=width, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=2, mlp_width=1, tied=tied, final_softcap=cap, **kwargs,
    )  # fmt: skip


def kernel(config, h, weight, tokens, mask, *, tiles=(8, 16), precision="highest"):
    """The loop over tiles alone: what `score` does after the decoder."""
    lm = LM(config, {"embed" if config.tied else "head": weight})
    return logprob._read(lm, h, tokens, mask, None, tiles, precision)["logps"]


def naive(config, h, weight, tokens, mask):
    """The whole [N, T, V] array, then pick, in the dtype of h."""
    logits = h @ (weight.T if config.tied else weight)
    logits = oracle.cap(logits, config.final_softcap)
    rows = jax.vmap(oracle.row_logps)(logits, tokens)
    return jnp.where(mask, rows, 0)


def case(config, n=3, t=11, seed=0, scale=1.0, dtype=np.float32, mask=None):
    rng = np.random.default_rng(seed)
    v, d = config.vocab_size, config.width
    h = rng.normal(size=(n, t, d)) * scale
    weight = rng.normal(size=(v, d) if config.tied else (d, v))
    tokens = rng.integers(0, v, (n, t))
    if mask is None:
        mask = rng.random((n, t)) < 0.6
        mask[0] = False  # a row of nothing but padding
    mask = np.array(np.broadcast_to(mask, (n, t)))
    mask[:, 0] = False
    return (
        jnp.asarray(h, dtype), jnp.asarray(weight, dtype), jnp.asarray(tokens),
        jnp.asarray(mask),
    )  # fmt: skip


def value_and_pull(forward):
    """jitted (h, weight, cotangent) -> (values, gradient of h, gradient of weight)."""

    @jax.jit
    def run(h, weight, cotangent):
        out, pull = jax.vjp(forward, h, weight)
        return out, *pull(cotangent)

    return lambda *args: [np.asarray(x) for x in run(*args)]


def exact(config, h, weight, tokens, mask, cotangent):
    """Naive values and gradients in float64, of exactly these inputs."""
    args = (np.asarray(tokens), np.asarray(mask))
    with jax.enable_x64(True):
        run = value_and_pull(lambda h, w: naive(config, h, w, *args))
        return run(*(oracle.float64(x) for x in (h, weight, cotangent)))


HEADS = {
    "untied": dict(tied=False),
    "tied": dict(tied=True),
    "softcap": dict(tied=False, cap=3.0),
    "tied-softcap": dict(tied=True, cap=3.0),
}
TILES = {  # token and vocabulary tiles for 33 rows and 37 ids
    "divide": (11, 37),
    "do-not-divide": (8, 16),
    "one-by-one": (1, 1),
    "larger-than-all": (64, 64),
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_values_and_gradients_are_those_of_float64(head, tiles):
    config = head_only(**head)
    h, weight, tokens, mask = case(config)
    cotangent = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32)
    want, want_dh, want_dw = exact(config, h, weight, tokens, mask, cotangent)
    run = value_and_pull(lambda h, w: kernel(config, h, w, tokens, mask, tiles=tiles))
    got, dh, dw = run(h, weight, cotangent)
    # float32: logits of order 10, sums over 12 and 37
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(dh, want_dh, atol=2e-5)
    np.testing.assert_allclose(dw, want_dw, atol=5e-5)


@pytest.mark.parametrize("scored", [False, True], ids=["none", "all"])
def test_nothing_scored_and_everything_scored(scored):
    config = head_only()
    h, weight, tokens, mask = case(config, mask=np.array(scored))
    cotangent = jnp.ones(mask.shape)
    want, want_dh, want_dw = exact(config, h, weight, tokens, mask, cotangent)
    run = value_and_pull(lambda h, w: kernel(config, h, w, tokens, mask))
    got, dh, dw = run(h, weight, cotangent)
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(dh, want_dh, atol=2e-5)
    np.testing.assert_allclose(dw, want_dw, atol=5e-5)
    if not scored:
        for x in (got, dh, dw):
            assert not np.asarray(x).any()


def test_logps_are_exactly_zero_off_the_mask():
    config = head_only()
    *args, mask = case(config)
    got = np.asarray(jax.jit(functools.partial(kernel, config))(*args, mask))
    assert (got[~np.asarray(mask)] == 0).all()
    assert (got[np.asarray(mask)] < 0).all()


def test_first_token_is_never_scored():
    config = head_only()
    *args, mask = case(config)
    run = jax.jit(functools.partial(kernel, config))
    got = run(*args, mask.at[:, 0].set(True))
    np.testing.assert_array_equal(got, run(*args, mask))


@pytest.mark.parametrize("garbage", [1e30, np.inf, np.nan])
def test_only_scored_positions_are_read(garbage):
    """h at t-1 predicts token t; whatever stands elsewhere, nothing changes."""
    config = head_only()
    h, weight, tokens, mask = case(config)
    read = np.roll(np.asarray(mask), -1, 1)
    dirty = jnp.where(read[..., None], h, garbage)

    run = value_and_pull(lambda h, w: kernel(config, h, w, tokens, mask))
    cotangent = jnp.ones(mask.shape)  # off the mask too, where it must not matter
    clean, got = run(h, weight, cotangent), run(dirty, weight, cotangent)
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not clean[1][~read].any()


def test_gradient_is_that_of_finite_differences():
    config = head_only(cap=5.0)
    h, weight, tokens, mask = case(config, n=2, t=5)

    @jax.jit
    def run(h, weight):
        return kernel(config, h, weight, tokens, mask)

    # float32 differences of order eps 1e-2: cubic error 1e-4, rounding 1e-4
    check_grads(
        run, (h, weight), order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("size, tolerance", [(50, 1e-4), (500, 1e-3)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.usefixtures("optimised")
def test_bfloat16_inputs_with_large_logits(size, tolerance, tied):
    """Logits whose largest magnitude is 50 and 500 stay near float64 on these inputs."""
    config = head_only(tied=tied, vocab=1000, width=64)
    h, weight, tokens, mask = case(config, n=4, t=32, mask=np.array(True))
    logits = np.asarray(h).reshape(-1, 64) @ np.asarray(weight.T if tied else weight)
    h = (h * (size / np.abs(logits).max())).astype(jnp.bfloat16)
    weight = weight.astype(jnp.bfloat16)
    want, want_dh, _ = exact(config, h, weight, tokens, mask, np.ones(mask.shape))
    assert want.min() < -size  # the test means something: targets far below the top
    run = value_and_pull(
        lambda h, w: kernel(config, h, w, tokens, mask, tiles=(32, 256))
    )
    got, dh, _ = run(h, weight, jnp.ones(mask.shape))
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)
    # gradients pass through bfloat16 (2^-8) on the way
    np.testing.assert_allclose(
        dh.astype(np.float64), want_dh, atol=2**-6 * np.abs(want_dh).max()
    )


def test_token_logps_is_a_log_softmax_at_the_token():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(2, 3, 50)) * 30, rng.integers(0, 50, (2, 3))
    z = logits - logits.max(-1, keepdims=True)
    want = z - np.log(np.exp(z).sum(-1, keepdims=True))
    want = np.take_along_axis(want, tokens[..., None], -1)[..., 0]
    got = logprob.token_logps(jnp.asarray(logits, jnp.float32), jnp.asarray(tokens))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_rows_are_normalised_logits_of_the_oracle(tiny_config, make_lm, cap):
    config = dataclasses.replace(tiny_config, final_softcap=cap)
    lm = make_lm(config)
    h = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)
    got = np.asarray(jax.jit(logprob.rows)(lm, h))
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, rtol=1e-5)
    z = np.asarray(h, np.float64) @ np.asarray(lm.params["embed"], np.float64).T
    z = z if cap is None else cap * np.tanh(z / cap)
    want = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_sequence_logps_is_score(tiny_lm, make_batch):
    batch = make_batch(2, 2, 12)
    rows = batch.tokens.reshape(4, 12)
    got = sequence_logps(tiny_lm, rows, batch.mask.reshape(4, 12))
    scores = score(tiny_lm, batch)
    np.testing.assert_array_equal(got.reshape(2, 2, 12), scores.logps)
    assert scores.entropy is scores.kl is scores.values is None


def test_sequence_logps_without_a_mask_scores_every_token_but_the_first(
    tiny_lm, make_batch
):
    rows = make_batch(2, 2, 12).tokens.reshape(4, 12)
    got = np.asarray(sequence_logps(tiny_lm, rows))
    assert (got[:, 0] == 0).all()
    assert (got[:, 1:] < 0).all()


@pytest.mark.parametrize("more", [1, 16])
def test_padding_changes_nothing(tiny_lm, make_batch, more):
    batch = make_batch(3, 2, 12)

    def grow(x, fill):
        return jnp.pad(x, ((0, 0), (0, 0), (0, more)), constant_values=fill)

    longer = batch._replace(tokens=grow(batch.tokens, 5), mask=grow(batch.mask, False))
    short, long = (score(tiny_lm, b).logps for b in (batch, longer))
    np.testing.assert_allclose(long[..., :12], short, rtol=5e-7, atol=1e-6)
    assert not np.asarray(long[..., 12:]).any()


def test_eos_that_is_also_the_pad_id_is_scored_once(tiny_lm, make_batch):
    """Rows that end in id 0 and are padded with 0, with 7, or not at all, agree."""
    batch = make_batch(1, 1, 12)
    n = int(batch.lengths[0, 0])
    tokens = batch.tokens.at[0, 0, n - 1].set(0)
    by_pad = [
        score(tiny_lm, batch._replace(tokens=tokens.at[0, 0, n:].set(pad))).logps[0, 0]
        for pad in (0, 7)
    ]
    alone = sequence_logps(tiny_lm, tokens[0, :, :n], batch.mask[0, :, :n])[0]
    np.testing.assert_array_equal(*by_pad)
    np.testing.assert_allclose(by_pad[0][:n], alone, atol=1e-6)
    assert by_pad[0][n - 1] < 0
    assert not np.asarray(by_pad[0][n:]).any()


def test_a_row_of_padding_gives_no_nan(tiny_lm, make_batch):
    batch = make_batch(2, 2, 12)
    batch = batch._replace(
        mask=batch.mask.at[1].set(False), lengths=batch.lengths.at[1].set(0),
        valid=batch.valid.at[1].set(False),
    )  # fmt: skip

    def total(params):
        return logprob.score(LM(tiny_lm.config, params), batch).logps.sum()

    value, grads = jax.jit(jax.value_and_grad(total))(tiny_lm.params)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.fixture(scope="module")
def critic(tiny_config, make_lm):
    return make_lm(dataclasses.replace(tiny_config, value_head=True))


def test_values_are_the_scalar_head_on_the_prefix(critic, make_batch):
    batch = make_batch(2, 2, 10)
    got = score(critic, batch, needs=("values",))
    mask = np.asarray(batch.mask)
    with jax.enable_x64(True):
        params = oracle.float64(critic.params)
        run = jax.jit(functools.partial(oracle.hidden, critic.config))
        for (b, g), row in np.ndenumerate(np.empty((2, 2))):
            del row
            h = run(params, np.asarray(batch.tokens)[b, g])
            want = np.where(mask[b, g], h @ params["value_head"]["kernel"], 0)
            np.testing.assert_allclose(got.values[b, g], want, atol=5e-5)


def test_values_of_a_model_without_a_head_is_an_error(tiny_lm, make_batch):
    with pytest.raises(ValueError, match="value_head=True"):
        score(tiny_lm, make_batch(), needs=("values",))


# What else the loop over tiles computes of a row.


def fields(configs, arrays, tokens, mask, *, needs, tiles=(8, 16), temperature=1.0):
    """{field: [N, T]} of one LM, or of one compared with another, from hidden states."""
    lms = [
        LM(c, {"embed" if c.tied else "head": w})
        for c, (_, w) in zip(configs, arrays, strict=True)
    ]
    other = (lms[1], arrays[1][0]) if len(lms) > 1 else None
    return logprob._read(
        lms[0], arrays[0][0], tokens, mask, None, tiles, "highest", needs, other,
        temperature=temperature,
    )  # fmt: skip


def naive_fields(configs, arrays, mask, needs, temperature=1.0):
    """The definitions, on whole rows of whatever dtype the arrays have."""
    logits = [
        oracle.cap(h @ (w.T if config.tied else w), config.final_softcap) / temperature
        for config, (h, w) in zip(configs, arrays, strict=True)
    ]
    common = min(z.shape[-1] for z in logits)
    whole = jax.nn.log_softmax(logits[0])
    p, r = (jax.nn.log_softmax(logits[i][..., :common]) for i in (0, -1))
    all_of_them = {
        "entropy": -(jnp.exp(whole) * whole).sum(-1),
        "collision": jnp.log(jnp.exp(2 * whole).sum(-1)),
        "kl": (jnp.exp(p) * (p - r)).sum(-1),
        "forward_kl": (jnp.exp(r) * (r - p)).sum(-1),
    }
    # the row at t - 1 is the distribution of the token at t
    shifted = {k: jnp.roll(all_of_them[k], 1, 1) for k in needs}
    return {k: jnp.where(mask, v, 0) for k, v in shifted.items()}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    ("heads", "size"),
    [
        (("untied", "tied-softcap"), V),
        (("tied-softcap", "untied"), V),
        (("untied", "tied-softcap"), V + 4),
        (("untied", "tied-softcap"), V - 3),
        (("tied-softcap", "untied"), 9),
    ],
)
def test_fields_and_their_gradients_are_those_of_float64(heads, size, tiles):
    """All four at once; the frozen LM has another width, head, soft-cap and table."""
    ours = head_only(**HEADS[heads[0]])
    theirs = head_only(**HEADS[heads[1]], width=5, vocab=size)
    h, weight, tokens, mask = case(ours)
    frozen = case(theirs, seed=1)[:2]
    needs = logprob.READ
    rng = np.random.default_rng(2)
    g = {k: rng.normal(size=mask.shape).astype(np.float32) for k in needs}

    def tiled(h, w):
        arrays = ((h, w), frozen)
        out = fields((ours, theirs), arrays, tokens, mask, needs=needs, tiles=tiles)
        return {k: out[k] for k in needs}

    got, dh, dw = jax.jit(
        lambda h, w: (lambda o, pull: (o, *pull(g)))(*jax.vjp(tiled, h, w))
    )(h, weight)
    with jax.enable_x64(True):
        exact_frozen = tuple(map(oracle.float64, frozen))
        want, pull = jax.vjp(
            lambda h, w: naive_fields(
                (ours, theirs), ((h, w), exact_frozen), np.asarray(mask), needs
            ),
            oracle.float64(h), oracle.float64(weight),
        )  # fmt: skip
        want_dh, want_dw = pull(jax.tree.map(oracle.float64, g))
    for name in needs:
        np.testing.assert_allclose(got[name], want[name], atol=5e-5, err_msg=name)
    # float32: differences of logits of order 10, times cotangents of order 1
    np.testing.assert_allclose(dh, want_dh, atol=2e-4)
    np.testing.assert_allclose(dw, want_dw, atol=5e-4)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize("size", [V, V - 3])
def test_a_temperature_divides_the_capped_logits_of_both_lms(temperature, size):
    """Values and gradients of every field and of logps, against whole rows in float64."""
    ours = head_only(**HEADS["tied-softcap"])
    theirs = head_only(**HEADS["softcap"], width=5, vocab=size)
    h, weight, tokens, mask = case(ours)
    frozen = case(theirs, seed=1)[:2]
    needs = ("logps", *logprob.READ)
    rng = np.random.default_rng(2)
    g = {k: rng.normal(size=mask.shape).astype(np.float32) for k in needs}

    def tiled(h, w):
        return fields(
            (ours, theirs), ((h, w), frozen), tokens, mask, needs=logprob.READ,
            temperature=temperature,
        )  # fmt: skip

    def naive(h, w, frozen):
        found = naive_fields(
            (ours, theirs),
            ((h, w), frozen),
            np.asarray(mask),
            logprob.READ,
            temperature,
        )
        logits = oracle.cap(h @ w.T, ours.final_softcap) / temperature
        rows = jax.vmap(oracle.row_logps)(logits, np.asarray(tokens))
        return found | {"logps": jnp.where(np.asarray(mask), rows, 0)}

    got, pull = jax.vjp(tiled, h, weight)
    dh, dw = pull(g)
    with jax.enable_x64(True):
        arrays = [oracle.float64(x) for x in (h, weight)]
        exact_frozen = tuple(map(oracle.float64, frozen))
        want, pull = jax.vjp(lambda h, w: naive(h, w, exact_frozen), *arrays)
        want_dh, want_dw = pull(jax.tree.map(oracle.float64, g))
    for name in needs:
        np.testing.assert_allclose(got[name], want[name], atol=5e-5, err_msg=name)
    np.testing.assert_allclose(dh, want_dh, atol=2e-4)
    np.testing.assert_allclose(dw, want_dw, atol=5e-4)


def test_temperature_1_is_the_program_without_one(tiny_lm, make_batch):
    batch = make_batch(2, 1, 8)
    run = functools.partial(logprob.score, kl_to=tiny_lm, needs=logprob.READ)
    plain = jax.jit(jax.grad(lambda lm: run(lm, batch).logps.sum(), allow_int=True))
    named = jax.jit(
        jax.grad(lambda lm: run(lm, batch, temperature=1.0).logps.sum(), allow_int=True)
    )
    assert plain.lower(tiny_lm).as_text() == named.lower(tiny_lm).as_text()


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_above_0_is_an_error(
    temperature, tiny_lm, make_batch
):
    with pytest.raises(ValueError, match="expected a number above 0"):
        logprob.score(tiny_lm, make_batch(1, 1, 8), temperature=temperature)


@pytest.mark.parametrize("need", logprob.READ)
def test_a_field_alone_is_what_it_is_beside_the_others(need):
    config = head_only()
    h, weight, tokens, mask = case(config)
    arrays = ((h, weight), case(config, seed=1)[:2])
    alone, beside = (
        fields((config, config), arrays, tokens, mask, needs=needs)
        for needs in ((need,), logprob.READ)
    )
    assert set(alone) == {"logps", need}
    np.testing.assert_allclose(alone[need], beside[need], rtol=1e-6)
    np.testing.assert_array_equal(alone["logps"], beside["logps"])


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_the_most_likely_token_has_the_best_log_probability(tiles):
    """Bit for bit, so that a comparison tells whether a token is the greedy one."""
    config = head_only()
    h, weight, tokens, mask = case(config)
    whole = jax.nn.log_softmax(h @ (weight.T if config.tied else weight))
    greedy = jnp.roll(whole.argmax(-1), 1, axis=1)
    some = jnp.arange(tokens.shape[1]) % 2 == 0
    tokens = jnp.where(some, greedy, tokens)
    arrays = ((h, weight),)
    got = fields((config,), arrays, tokens, mask, needs=logprob.FIXED, tiles=tiles)
    want = jnp.where(mask, jnp.roll(whole.max(-1), 1, axis=1), 0)
    np.testing.assert_allclose(got["best"], want, atol=5e-5)
    same = np.asarray(got["logps"] == got["best"])[np.asarray(mask)]
    np.testing.assert_array_equal(same, np.asarray(tokens == greedy)[np.asarray(mask)])
    assert 0 < same.sum() < same.size

    def total(h):
        return fields(
            (config,), ((h, weight),), tokens, mask, needs=logprob.FIXED, tiles=tiles
        )["best"].sum()

    assert not np.asarray(jax.grad(total)(h)).any()


def test_kl_of_a_model_to_itself_is_exactly_zero(tiny_lm, make_batch):
    batch = make_batch(2, 2, 12)
    both = jax.jit(logprob.score, static_argnames="needs")(
        tiny_lm, batch, needs=("kl", "forward_kl"), kl_to=tiny_lm
    )
    assert not np.asarray(both.kl).any()
    assert not np.asarray(both.forward_kl).any()


def test_kl_is_to_the_lm_that_is_given_and_no_gradient_reaches_it(
    tiny_lm, make_lm, make_batch
):
    batch, other = make_batch(2, 2, 12), make_lm(tiny_lm.config, seed=1)

    def total(params, frozen):
        lm, kl_to = LM(tiny_lm.config, params), LM(tiny_lm.config, frozen)
        scores = logprob.score(lm, batch, needs=("kl",), kl_to=kl_to)
        return scores.kl.sum()

    value, (ours, theirs) = jax.jit(jax.value_and_grad(total, (0, 1)))(
        tiny_lm.params, other.params
    )
    assert value > 0
    assert any(np.asarray(x).any() for x in jax.tree.leaves(ours))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(theirs))


def test_a_kl_to_nothing_is_an_error(tiny_lm, make_batch):
    with pytest.raises(
        ValueError, match=r"\['kl'\] compare with a frozen LM: pass kl_to"
    ):
        logprob.score(tiny_lm, make_batch(), needs=("kl",))


@pytest.mark.parametrize("grow", ["the LM", "kl_to"])
def test_a_kl_does_not_see_rows_that_one_table_is_padded_with(
    grow, tiny_lm, make_lm, make_batch
):
    """As between Qwen2.5 up to 3B and from 7B on. Other scores are of the whole table."""
    batch, other = make_batch(2, 2, 12), make_lm(tiny_lm.config, seed=1)
    wide = dataclasses.replace(tiny_lm.config, vocab_size=41)
    needs = ("kl", "forward_kl", "entropy")

    def padded(lm):
        more, tables = make_lm(wide, seed=2).params, {}
        for name, axis in (("embed", 0), ("head", 1)):
            if name in lm.params:
                rest = jax.lax.slice_in_dim(more[name], 37, 41, axis=axis)
                tables[name] = jnp.concatenate([lm.params[name], rest], axis)
        return LM(wide, {**lm.params, **tables})

    pair = [tiny_lm, other]
    i = ["the LM", "kl_to"].index(grow)
    pair[i] = padded(pair[i])
    want = score(tiny_lm, batch, needs=needs, kl_to=other)
    got = score(pair[0], batch, needs=needs, kl_to=pair[1])
    for name in ("kl", "forward_kl"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-5)
    same = np.allclose(got.entropy, want.entropy, atol=1e-5)
    assert same == (grow == "kl_to")


# Memory, as XLA plans it: nothing below is run.


def temp(function, *shapes):
    compiled = jax.jit(function).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def gradient_of(forward, config, n, t, dtype=jnp.float32):
    """(grad of the sum of the forward with respect to (h, head)), argument shapes."""

    def total(h, weight, tokens, mask):
        return forward(config, h, weight, tokens, mask).sum()

    v, d = config.vocab_size, config.width
    shapes = [((n, t, d), dtype), ((d, v), dtype), ((n, t), jnp.int32)]
    shapes = [jax.ShapeDtypeStruct(*s) for s in [*shapes, ((n, t), jnp.bool_)]]
    return jax.grad(total, (0, 1)), *shapes


production = functools.partial(kernel, tiles=(logprob.TOKEN_TILE, logprob.VOCAB_TILE))


@pytest.mark.usefixtures("optimised")
def test_the_kernels_gradient_needs_little_memory():
    config = head_only(vocab=32_768, width=256)
    used = temp(*gradient_of(production, config, 8, 1024))
    assert 0 < used < 64 * MIB  # measured 16.6 MiB


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler installed"
)
def test_on_a_tpu_it_needs_little_at_the_size_of_llama_3():
    """float32 sums of dh, a tile of the head and one of its gradient; no whole of either."""
    device = chips.devices(chips.parse("v5e:1x1"))[0]
    config = head_only(vocab=128_256, width=4096)
    run, *shapes = gradient_of(production, config, 8, 2048, dtype=jnp.bfloat16)
    given = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=SingleDeviceSharding(device))
        for s in shapes
    ]
    with jax.default_device(device):
        assert 0 < temp(run, *given) < 300 * MIB  # measured 257 MiB


@pytest.mark.usefixtures("optimised")
def test_reading_every_field_needs_little_memory_too():
    config = head_only(vocab=32_768, width=256)

    def forward(config, h, weight, tokens, mask):
        side = (jax.lax.stop_gradient(h), jax.lax.stop_gradient(weight))
        tiles = (logprob.TOKEN_TILE, logprob.VOCAB_TILE)
        out = fields(
            (config, config), ((h, weight), side), tokens, mask,
            needs=logprob.READ, tiles=tiles,
        )  # fmt: skip
        return sum(out.values())

    assert 0 < temp(*gradient_of(forward, config, 8, 1024)) < 64 * MIB


@pytest.mark.usefixtures("optimised")
def test_the_naive_form_needs_gigabytes():
    """The control: the same measure sees [N, T, V] where it exists."""
    config = head_only(vocab=32_768, width=256)
    assert temp(*gradient_of(naive, config, 8, 1024)) > 2048 * MIB


@pytest.mark.usefixtures("optimised")
def test_memory_does_not_grow_with_tokens_times_vocabulary():
    def used(t, vocab):
        config = head_only(vocab=vocab, width=64)
        return temp(*gradient_of(production, config, 4, t))

    base = used(512, 16_384)
    # a wider vocabulary may cost its own head, more tokens their own hidden states
    assert used(512, 32_768) - base < 64 * 16_384 * 4
    assert used(1024, 16_384) - base < 2 * 4 * 512 * 64 * 4


@pytest.mark.usefixtures("optimised")
def test_the_whole_score_gradient_needs_little_memory():
    config = ModelConfig(
        vocab_size=32_768, width=256, num_layers=4, num_heads=4, num_kv_heads=4,
        head_dim=64, mlp_width=512, remat="block",
    )  # fmt: skip
    params = jax.eval_shape(
        lambda key: transformer.init(config, key), jax.random.key(0)
    )
    tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    mask = jax.ShapeDtypeStruct((8, 1024), jnp.bool_)

    def total(params, tokens, mask):
        return logprob.sequence_logps(LM(config, params), tokens, mask).sum()

    used = temp(jax.grad(total), params, tokens, mask)
    assert 0 < used < 350 * MIB  # measured 316 MiB
