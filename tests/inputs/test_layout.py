"""Packed rows: every token once, in its place, and the same numbers as one row each."""

import dataclasses
import functools
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax import logprob, plugin
from alignax.batch import LM, check, from_groups
from alignax.configs import dpo
from alignax.data import hh_rlhf
from alignax.inputs import layout
from alignax.inputs.source import dataset_source
from alignax.models import attention, lora, transformer
from alignax.models.sharding import make_mesh, put_batch, put_params
from alignax.text import tokenizer
from alignax.training import parallel
from alignax.training.step import init_state, make_train_step

pytestmark = pytest.mark.slow

V = 37


def ragged(b, g, t, seed=0):
    """Groups with prompts and responses of all lengths, as data have them.

    Some responses begin alike, some have several scored turns, one is missing, one not
    valid, and one prompt has none.
    """
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(0, V, rng.integers(low, high + 1)).tolist()

    prompts, responses, scored = [], [], []
    for i in range(b):
        prompt, alike = ids(1, t // 2), ids(0, t // 6) if i % 2 else []
        some = [alike + ids(1, t // 3) for _ in range(g - (g > 1 and i == 1))]
        turns = [rng.random(len(r)) < 0.7 for r in some]
        for mask in turns:
            mask[rng.integers(len(mask))] = True
        prompts.append(prompt)
        responses.append(some)
        scored.append([m.tolist() for m in turns])
    batch = from_groups(prompts, responses, length=t, scored=scored)
    batch.valid[0, -1] = False
    batch.mask[2], batch.lengths[2], batch.valid[2] = False, 0, False
    return batch


def real(batch):
    """(prompt, response, t) of every token up to a response's last scored one."""
    t = batch.mask.shape[-1]
    end = np.where(batch.mask.any(-1), t - batch.mask[..., ::-1].argmax(-1), 0)
    return np.argwhere(np.arange(t) < end[..., None])


# -- where tokens stand


@settings(max_examples=40, deadline=None)
@given(
    b=st.sampled_from([4, 8]), g=st.integers(1, 4), blocks=st.sampled_from([1, 2, 4]),
    length=st.integers(24, 80), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_token_is_placed_once_and_attends_to_its_own_row(
    b, g, blocks, length, seed
):
    batch = ragged(b, g, 24, seed)
    out = layout.build(batch, length=length, shards=blocks)
    assert out.tokens.shape[::2] == (blocks, length)
    places = {}
    for i, j, t in real(batch):
        s = i * blocks // b
        r, c = divmod(int(out.places[i, j, t]), length)
        assert out.tokens[s, r, c] == batch.tokens[i, j, t]
        assert out.positions[s, r, c] == t
        assert out.branch[s, r, c] in (0, j + 1)
        assert out.scored[s, r, c] or not batch.mask[i, j, t]
        places[i, j, t] = (s, r, c)
        if t:  # what predicts it is the token before, in the same row
            assert places[i, j, t - 1] == (s, r, out.previous[s, r, c])
    for (i, j, _), place in places.items():
        first = places[i, j, 0]
        assert out.group[place] == out.group[first] > 0
    # one prompt a group number, and nothing else is computed
    owners = {}
    for (i, _, _), (s, r, c) in places.items():
        assert owners.setdefault((s, r, out.group[s, r, c]), i) == i
    assert (out.group > 0).sum() == len(set(places.values()))
    assert len(set(places.values())) >= layout.distinct(batch)
    assert not out.scored[out.group == 0].any()


def test_a_common_prefix_is_placed_once():
    batch = from_groups([[1, 2, 3]], [[[4, 5, 6], [4, 7]]], length=8)
    out = layout.build(batch, length=16)
    assert out.tokens[0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7] + [0] * 9
    assert out.positions[0, 0, :7].tolist() == [0, 1, 2, 3, 4, 5, 4]
    assert out.branch[0, 0, :7].tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert out.previous[0, 0, 1:7].tolist() == [0, 1, 2, 3, 4, 3]
    assert out.scored[0, 0].tolist() == [False] * 3 + [True] * 4 + [False] * 9
    assert out.places[0, 1, :5].tolist() == [0, 1, 2, 3, 6]
    assert layout.distinct(batch) == 7


def test_a_group_that_fits_no_row_repeats_its_prompt():
    batch = from_groups([[1, 2]], [[[3] * 5, [4] * 5, [5] * 3]], length=8)
    out = layout.build(batch, length=10)
    assert out.tokens.shape == (1, 2, 10)
    assert (out.tokens == 1).sum() == 2
    assert layout.distinct(batch) == 15
    with pytest.raises(ValueError, match="7 tokens is longer than a packed row of 6"):
        layout.build(batch, length=6)


def test_prompts_stay_in_the_block_of_their_shard():
    batch = ragged(8, 2, 24)
    out = layout.build(batch, length=64, shards=2, accumulate=2)
    alone = [
        layout.build(
            jax.tree.map(lambda x, s=s: x[2 * s : 2 * s + 2], batch),
            length=64, rows=out.tokens.shape[1],
        ) for s in range(4)
    ]  # fmt: skip
    for got, *want in zip(out, *alone, strict=True):
        np.testing.assert_array_equal(got, np.concatenate(want))


def test_rows_that_are_too_few_and_blocks_that_do_not_divide_are_errors():
    batch = ragged(4, 2, 24)
    with pytest.raises(ValueError, match="needs 2 rows of 40, there are 1"):
        layout.build(batch, length=40, rows=1)
    with pytest.raises(ValueError, match="4 prompts do not divide over 3 shards x 1"):
        layout.build(batch, length=64, shards=3)


def test_row_counts_are_few():
    assert [layout.steps(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25)] == [
        1, 1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32,
    ]  # fmt: skip


# -- dividing


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=80),
    blocks=st.integers(1, 7), spare=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_blocks_hold_every_item_once_and_fit(sizes, blocks, spare):
    padded = [0] * (-len(sizes) % blocks) + sizes  # as many places as blocks hold
    parts = layout.spread(padded, blocks)
    assert sorted(i for p in parts for i in p) == [i for i, s in enumerate(padded) if s]
    assert max(map(len, parts)) <= len(padded) // blocks
    some = [[padded[i] for i in p] for p in parts]
    rows, length = layout.fitted(some, max(sizes), spare=spare)
    assert all(len(layout.pack(x, length)) <= rows for x in some)
    assert rows * length >= (1 + spare) * max(map(sum, some)) - 1
    assert length >= max(sizes)


def exchanged(sizes, blocks):
    """`layout.spread`, one exchange after another by plain loops."""
    out, total = [[] for _ in range(blocks)], [0] * blocks
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        free = [s for s in range(blocks) if len(out[s]) < len(sizes) // blocks]
        s = min(free, key=lambda s: (total[s], s))
        out[s].append(i)
        total[s] += sizes[i]
    for _ in range(4 * blocks):
        top = total.index(max(total))
        best = (total[top], 0, 0, 0, 0)
        for s in range(blocks):
            for a, i in enumerate(out[top]):
                for b, j in enumerate(out[s]):
                    less = sizes[i] - sizes[j]
                    if 0 < less < total[top] - total[s]:
                        worst = max(total[top] - less, total[s] + less)
                        best = min(best, (worst, s, a, b, less))
        worst, s, a, b, less = best
        if worst == total[top]:
            break
        out[top][a], out[s][b] = out[s][b], out[top][a]
        total[top] -= less
        total[s] += less
    return [sorted(i for i in block if sizes[i]) for block in out]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=6, max_size=60),
    blocks=st.integers(2, 5),
)
def test_items_are_exchanged_as_by_plain_loops(sizes, blocks):
    sizes = sizes[: len(sizes) // blocks * blocks]
    assert layout.spread(sizes, blocks) == exchanged(sizes, blocks)


def test_blocks_hold_nearly_the_same():
    sizes = np.random.default_rng(1).integers(20, 400, 64).tolist()
    parts = [sum(sizes[i] for i in part) for part in layout.spread(sizes, 8)]
    assert max(parts) < 1.005 * np.mean(parts)
    assert layout.spread([5, 9, 0, 7], 2) == [[1], [0, 3]]
    sizes = [3, 3, 2, 5, 8, 1]  # the largest first makes 12 and 10 of them
    parts = layout.spread(sizes, 2)
    assert [sum(sizes[i] for i in part) for part in parts] == [11, 11]


def test_rows_that_were_filled_in_order_are_enough():
    """Best fit, longest first, would take three."""
    assert layout.pack([3, 5, 2, 2, 4, 4], 10) == [[0, 1, 2], [3, 4, 5]]


# -- the same numbers

NEEDS = (*logprob.READ, *logprob.VALUES)
CASES = {  # changes to the config, (B, G, T), L
    "pairs": ({"value_head": True}, (6, 2, 24), 64),
    "groups": (
        dict(
            num_layers=3, window=7, local_layers=(True, False, True),
            rope_theta_local=99.0, attn_softcap=4.0, final_softcap=3.0, attn_tile=16,
            remat="block", qkv_bias=True, value_head=True,
        ),
        (4, 4, 18), 131,
    ),
    "one-response": ({"tied": False, "remat": "dots", "attn_tile": 8}, (5, 1, 24), 57),
    "split-groups": ({"attn_tile": 8}, (4, 4, 18), 20),
}  # fmt: skip


def read(config, needs, batch, frozen, cotangent, params, mesh=None):
    def total(params):
        scores = logprob.score(
            LM(config, params), batch, needs=needs, kl_to=frozen, tiles=(16, 8),
            mesh=mesh,
        )  # fmt: skip
        found = [x for x in scores if x is not None]
        return sum(
            (x * cotangent ** (i + 1)).sum() for i, x in enumerate(found)
        ), scores

    (_, scores), grads = jax.value_and_grad(total, has_aux=True)(params)
    return scores, grads


def both(config, make_lm, batch, length, needs=NEEDS):
    """(scores, gradients) without and with a layout."""
    needs = needs if config.value_head else logprob.READ
    lm, frozen = make_lm(config), make_lm(config, 1)
    cotangent = np.random.default_rng(1).normal(size=batch.mask.shape)
    run = jax.jit(functools.partial(read, config, needs))
    packed = batch._replace(layout=layout.build(batch, length=length))
    assert packed.layout.tokens.size < batch.tokens.size
    return [
        jax.device_get(run(x, frozen, cotangent.astype(np.float32), lm.params))
        for x in (batch, packed)
    ]


def close(got, want, tolerance):
    """Relative to each leaf's largest entry."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(
            a, b, atol=tolerance * np.abs(b).max() + 1e-7, err_msg=str(path)
        )


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_give_the_plain_numbers_and_gradients(name, tiny_config, make_lm):
    changes, shape, length = CASES[name]
    config = dataclasses.replace(tiny_config, **changes)
    batch = ragged(*shape)
    want, got = both(config, make_lm, batch, length)
    close(got, want, 1e-5)
    assert (got[0].logps[~batch.mask] == 0).all()
    assert np.abs(got[0].logps[batch.mask]).min() > 0


def test_tiles_of_other_prompts_are_not_computed(tiny_config, make_lm):
    """NaN crosses any mask: it stays with its own prompt only where tiles are skipped."""
    lm = make_lm(dataclasses.replace(tiny_config, tied=False, attn_tile=8))
    poison = 36
    embed = lm.params["embed"].at[poison].set(jnp.nan)
    prompts = [[1] * 12, [poison] * 12, [2] * 12]
    batch = from_groups(prompts, [[[3, 4], [5, 6]]] * 3, length=16)
    batch = batch._replace(layout=layout.build(batch, length=48))
    assert batch.layout.tokens.shape == (1, 1, 48)

    def clean(embed):
        logps = logprob.score(LM(lm.config, {**lm.params, "embed": embed}), batch).logps
        return logps[0].sum() + logps[2].sum(), logps

    (_, logps), slope = jax.jit(jax.value_and_grad(clean, has_aux=True))(embed)
    logps = np.asarray(logps)[batch.mask].reshape(3, -1)
    assert np.isnan(logps).all(1).tolist() == [False, True, False]
    assert np.isnan(logps).any(1).tolist() == [False, True, False]
    assert np.isfinite(slope[1:3]).all()
    assert np.abs(slope[1:3]).min() > 0


def test_bfloat16_differs_by_its_rounding(tiny_config, make_lm):
    config = dataclasses.replace(tiny_config, dtype="bfloat16")
    want, got = both(config, make_lm, ragged(6, 2, 24), 64)
    close(got, want, 2e-2)  # 8 bits, and sums over some hundred tokens


def test_adapters_get_the_plain_gradient(tiny_lm, make_lm):
    adapters = lora.Lora(rank=2)
    params = lora.init(tiny_lm, adapters, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype("f"), params)
    batch = ragged(6, 2, 24)

    @jax.jit
    def grads(params, batch):
        def total(params):
            return logprob.score(
                lora.attach(tiny_lm, params, adapters), batch
            ).logps.sum()

        return jax.value_and_grad(total)(params)

    packed = batch._replace(layout=layout.build(batch, length=64))
    close(grads(params, packed), grads(params, batch), 1e-5)


def test_a_layout_of_another_batch_is_an_error(tiny_lm):
    batch, other = ragged(4, 2, 24), ragged(8, 2, 24)
    batch = batch._replace(layout=layout.build(other, length=64))
    with pytest.raises(
        ValueError, match=r"layout of 1 blocks .*\(8, 2, 24\).*\(4, 2, 24\)"
    ):
        jax.eval_shape(logprob.score, tiny_lm, batch)
    assert jnp.ndim(batch.layout.places) == 3


def test_a_layout_from_before_a_change_is_found_by_check():
    batch = ragged(4, 2, 24)
    batch = batch._replace(layout=layout.build(batch, length=64))
    check(batch)
    i, g, t = np.argwhere(batch.mask)[5]
    tokens, mask = batch.tokens.copy(), batch.mask.copy()
    tokens[i, g, t] += 1
    mask[0, 0, batch.mask[0, 0].argmax() - 1] = True  # the prompt's last token
    for changed in (batch._replace(tokens=tokens), batch._replace(mask=mask)):
        with pytest.raises(ValueError, match="lay the batch out anew"):
            check(changed)
    with pytest.raises(ValueError, match=r"places \(4, 2, 24\) in 1 blocks"):
        check(ragged(8, 2, 24)._replace(layout=batch.layout))


# -- over a mesh, in micro-batches


def test_packed_rows_on_a_mesh_are_those_on_one_device(tiny_config, make_lm):
    config = dataclasses.replace(tiny_config, value_head=True)
    batch, mesh = ragged(8, 2, 24), make_mesh((2, 2, 2))
    lm, frozen = make_lm(config), make_lm(config, 1)
    cotangent = np.random.default_rng(1).normal(size=batch.mask.shape).astype("f")
    want = jax.jit(functools.partial(read, config, NEEDS))(
        batch, frozen, cotangent, lm.params
    )
    packed = batch._replace(layout=layout.build(batch, length=48, shards=4))
    run = jax.jit(functools.partial(read, config, NEEDS, mesh=mesh))
    frozen = LM(config, put_params(frozen.params, mesh))
    got = run(
        put_batch(packed, mesh), frozen, put_batch(cotangent, mesh),
        put_params(lm.params, mesh),
    )  # fmt: skip
    close(got, want, 1e-5)
    wrong = batch._replace(layout=layout.build(batch, length=64, shards=2))
    with pytest.raises(ValueError, match=r"layout of 2 blocks does not divide .*=4"):
        jax.eval_shape(functools.partial(logprob.score, lm, mesh=mesh), wrong)


def test_packed_rows_stay_on_their_shard(tiny_lm):
    batch, mesh = ragged(8, 2, 24), make_mesh((8, 1, 1))
    batch = batch._replace(layout=layout.build(batch, length=48, shards=8))
    score = jax.jit(functools.partial(logprob.score, mesh=mesh))
    lm = LM(tiny_lm.config, put_params(tiny_lm.params, mesh))
    text = score.lower(lm, put_batch(batch, mesh)).compile().as_text()
    assert "num_partitions=8" in text
    # but for the head, which each shard has whole, and the length of the longest walk
    moved = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)\(", text)
    assert all(shape.startswith("f32[37,16]") for shape in moved)
    assert moved


STEPS = {
    "dpo": ((2, 2, 2), 2),
    "kto": ((1, 1, 1), 2),  # couples prompts: scored, differentiated, scored again
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_packed_rows_is_the_plain_step(name, tiny_config, make_lm):
    batch = ragged(8, 2, 24)
    batch.feedback[:3], batch.feedback[6, 0] = 1.0, 1.0
    loss = plugin.load("losses", name)

    def step(shape, accumulate, batch):
        mesh, tx = make_mesh(shape), optax.sgd(1e-2)
        step = make_train_step(tiny_config, tx, loss, mesh, accumulate=accumulate)
        state = init_state(make_lm(tiny_config).params, tx, mesh, ema=loss.ema)
        lms = {"ref": LM(tiny_config, put_params(make_lm(tiny_config, 1).params, mesh))}
        state, metrics = step(state, lms, put_batch(batch, mesh))
        return jax.device_get((state.params, metrics))

    want = step((1, 1, 1), 1, batch)
    shape, accumulate = STEPS[name]
    out = layout.build(
        batch, length=48, shards=shape[0] * shape[1], accumulate=accumulate
    )
    got = step(shape, accumulate, batch._replace(layout=out))
    close(got[0], want[0], 1e-5)
    for key in want[1]:
        assert got[1][key] == pytest.approx(want[1][key], rel=1e-4, abs=1e-5), key


# -- what reads batches


def test_scores_on_the_host_are_the_same_packed(tiny_lm):
    """For evaluations, rollouts and cached references; prompts do not divide here."""
    mesh, batch = make_mesh((2, 1, 1)), ragged(5, 2, 24)
    want, got = (
        parallel.scorer(mesh, packed=packed)(tiny_lm, batch).logps
        for packed in (False, True)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    b=st.sampled_from([2, 4, 12]), g=st.integers(1, 3), t=st.sampled_from([24, 700]),
    shards=st.sampled_from([1, 2]), hosts=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_batch_is_laid_out_in_one_of_sixteen_shapes(b, g, t, shards, hosts, seed):
    hosts = min(hosts, shards)
    batch = ragged(max(b, 3 * shards), g, t, seed)
    parts = [layout.lay(batch, shards=shards, host=(i, hosts)) for i in range(hosts)]
    rows, length = parts[0][0].layout.tokens.shape[1:]
    assert len({part.layout.tokens.shape for part, _ in parts}) == 1
    whole = len(batch.tokens) * g * t / shards
    assert any(
        rows * length == pytest.approx(whole * k / 16, abs=8 * rows) for k in range(17)
    )
    useful = layout.distinct(batch) / (shards * rows * length)
    assert [share for _, share in parts] == [useful] * hosts
    joined = np.concatenate([part.tokens for part, _ in parts])
    np.testing.assert_array_equal(joined, batch.tokens)


HH = pathlib.Path(os.environ.get("ALIGNAX_HH", "pairs.jsonl.gz"))
SMOLLM2 = os.environ.get("ALIGNAX_SMOLLM2", "")


@pytest.mark.skipif(
    not (HH.exists() and SMOLLM2), reason="set ALIGNAX_HH and ALIGNAX_SMOLLM2"
)
def test_nearly_all_tokens_of_hh_rlhf_are_useful():
    """At the settings of configs/dpo.py, with the last batches of an epoch."""
    config = dpo.get_config()
    assert config.layout == "packed"
    pairs = {**config.data, "path": str(HH)}
    data = hh_rlhf.examples(**{k: v for k, v in pairs.items() if k != "name"})
    source = dataset_source(
        data, tokenizer.load(SMOLLM2), batch_size=config.batch_size,
        length=config.length, buckets=config.buckets, seed=config.seed,
        grid=(1, config.accumulate),
    )  # fmt: skip
    report = source.report()
    assert report["useful"] >= 0.95
    batches = [source.next() for _ in range(100)]
    assert len({batch.layout.tokens.shape for batch in batches}) == 1
    shares = [distinct_prefixes(b) / b.layout.tokens.size for b in batches]
    assert np.mean(shares) >= 0.95


def distinct_prefixes(batch):
    """Distinct real tokens, one by one: prefixes of a prompt's rows."""
    return len({(i, batch.tokens[i, j, : t + 1].tobytes()) for i, j, t in real(batch)})


# -- tiles of keys that a response does not see


def far_apart(b=2, g=6, shared=20, own=20):
    """Groups whose responses are longer than a tile, laid out in one row."""
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(1, V, n).tolist()  # noqa: E731
    groups = [[ids(own) for _ in range(g)] for _ in range(b)]
    batch = from_groups([ids(shared) for _ in range(b)], groups, length=shared + own)
    return batch._replace(layout=layout.build(batch, length=b * (shared + g * own)))


def test_tiles_of_other_responses_are_not_read(tiny_config):
    config = dataclasses.replace(tiny_config, attn_tile=10)
    batch = far_apart()
    inputs = logprob._packed(batch, batch.layout)
    found = attention.with_tiles(inputs.attend, inputs.positions, config)
    many, order = map(np.asarray, found.tiles)
    read = [order[i, : many[i]].tolist() for i in range(len(many))]
    # of each group two tiles are shared; a response has two of its own
    assert read[:8] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 6],
        [0, 1, 6, 7],
    ]  # fmt: skip
    assert read[14:17] == [[14], [14, 15], [14, 15, 16]]
    assert read[-1] == [14, 15, 26, 27]
    plain = dataclasses.replace(tiny_config, attn_tile=512)
    assert attention.with_tiles(inputs.attend, inputs.positions, plain).tiles is None


@pytest.mark.parametrize("tile", [7, 10, 16])
def test_tiles_that_are_left_out_change_nothing(
    tiny_config, make_lm, tile, monkeypatch
):
    config = dataclasses.replace(tiny_config, attn_tile=tile)
    batch, lm = far_apart(), make_lm(config)
    cotangent = np.random.default_rng(1).normal(size=batch.mask.shape).astype("f")

    def run():
        def total(params):
            logps = logprob.score(LM(config, params), batch).logps
            return (logps * cotangent).sum(), logps

        return jax.jit(jax.value_and_grad(total, has_aux=True))(lm.params)

    got = run()
    monkeypatch.setattr(transformer, "with_tiles", lambda attend, *_: attend)
    close(got, run(), 1e-6)
