"""Batches: what is in them, what was cut, and that a stop loses nothing."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax import masked
from alignax.batch import Example, check
from alignax.data import Examples, synthetic
from alignax.inputs import detokenize, plan, prompts, source
from alignax.text import tokenizer

TK = tokenizer.load("bytes")


def make(n, *, group=1, name="e", spread=20):
    """Examples 'e0', 'e1', ... with responses of differing lengths."""
    rng = np.random.default_rng(0)
    return [
        Example(f"{name}{i}", f"{name}{i}:", ["x" * int(rng.integers(1, spread)) for _ in range(group)])
        for i in range(n)
    ]  # fmt: skip


def build(examples, **kwargs):
    defaults = {"batch_size": 4, "length": 32, "seed": 0}
    return source.dataset_source(examples, TK, **defaults | kwargs)


def prompts_of(batch):
    """The prompt text of each valid row."""
    out = []
    for row in range(batch.tokens.shape[0]):
        if batch.valid[row, 0]:
            n = int(batch.mask[row, 0].argmax())
            out.append(TK.decode(batch.tokens[row, 0, :n]))
    return out


def drain(src, limit=10_000):
    batches = []
    for step in range(limit):
        try:
            batches.append(src.next(None, step))
        except StopIteration:
            return batches
    raise AssertionError("the source does not end")


def same(a, b):
    for x, y in zip(a[:5], b[:5], strict=True):
        np.testing.assert_array_equal(x, y)


# -- what a batch holds


def test_rows_are_prompt_then_response_with_eos_scored():
    batch = build([Example("a", "ab", ["cd", "e"], (1.0, 0.0))], batch_size=1).next(
        None, 0
    )
    check(batch)
    assert batch.tokens[0, 0, :5].tolist() == [97, 98, 99, 100, TK.eos_id]
    assert batch.mask[0].tolist()[0][:6] == [False, False, True, True, True, False]
    assert batch.lengths.tolist() == [[5, 4]]
    assert batch.feedback.tolist() == [[1.0, 0.0]]
    assert batch.tokens.dtype == np.int32


def test_every_example_occurs_once_an_epoch_and_the_rest_is_invalid():
    batches = drain(build(make(10), epochs=2, batch_size=4, window=2))
    assert [b.tokens.shape[0] for b in batches] == [4] * 5
    seen = collections.Counter(p for b in batches for p in prompts_of(b))
    assert seen == {f"e{i}:": 2 for i in range(10)}
    batches = drain(build(make(10), epochs=1, batch_size=4))
    assert [int(b.valid.sum()) for b in batches] == [4, 4, 2]
    check(batches[-1])
    assert not batches[-1].mask[2:].any()
    assert (batches[-1].lengths[2:] == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    b=st.integers(1, 9),
    w=st.integers(1, 5),
    epochs=st.integers(1, 3),
)
def test_no_example_is_lost_or_starved_whatever_the_sizes(n, b, w, epochs):
    src = build(make(n), batch_size=b, window=w, epochs=epochs)
    order = [p for batch in drain(src) for p in prompts_of(batch)]
    assert collections.Counter(order) == {f"e{i}:": epochs for i in range(n)}
    # No example waits longer than to the end of the next epoch.
    for i in range(0, n * epochs, n):
        assert len(set(order[max(0, i - b) : i + n + b])) == n


def test_shuffle_changes_from_epoch_to_epoch_and_with_the_seed():
    def order(seed, **kwargs):
        src = build(make(16), batch_size=4, seed=seed, epochs=2, window=1, **kwargs)
        got = [p for b in drain(src) for p in prompts_of(b)]
        return got[:16], got[16:]

    assert order(0) == order(0)
    assert order(0)[0] != order(0)[1]
    assert order(0) != order(1)
    in_order = [f"e{i}:" for i in range(16)]
    assert order(0, shuffle=False) == (in_order, in_order)


def test_shapes_are_a_small_fixed_set_and_like_lengths_meet():
    src = build(
        make(200, spread=90), batch_size=8, length=96, buckets=(24, 48, 96), epochs=1
    )
    batches = drain(src)
    assert {b.tokens.shape[-1] for b in batches} == {24, 48, 96}
    alone = build(
        make(200, spread=90), batch_size=8, length=96, buckets=(24, 48, 96), window=1
    )
    assert src.report()["padding"] < 0.7 * alone.report()["padding"]


def test_padding_is_the_share_of_tokens_that_are_padding():
    src = build(make(30), batch_size=4, epochs=1)
    batches = drain(src)
    total = sum(b.tokens.size for b in batches)
    real = sum(int(b.lengths.sum()) for b in batches)
    assert src.report()["padding"] == pytest.approx(1 - real / total, abs=1e-12)


def test_ragged_groups_have_one_shape_and_invalid_slots():
    rows = [Example("a", "p", ["x"]), Example("b", "p", ["x", "y", "z"])]
    for batch in drain(build(rows, batch_size=1, epochs=1)):
        assert batch.tokens.shape[1] == 3
        check(batch)
    assert batch.valid.sum() in (1, 3)


def test_several_scored_turns_keep_their_gaps():
    turns = [
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    rows = [Example("a", [{"role": "user", "content": "a"}], [turns])]
    batch = build(rows, batch_size=1, length=64).next(None, 0)
    assert TK.decode(batch.tokens[batch.mask]) == " b d"
    assert (batch.tokens[batch.mask] == TK.eos_id).sum() == 2


# -- truncation


def test_cut_examples_are_counted_and_a_cut_response_has_no_eos():
    rows = [Example("long", "p", ["x" * 40]), Example("fits", "p", ["x"])]
    src = build(rows, batch_size=2, length=16, epochs=1)
    batch = src.next(None, 0)
    assert src.report()["cut"] == 1
    assert sorted((batch.tokens == TK.eos_id).sum(-1).ravel().tolist()) == [0, 1]
    assert sorted(batch.lengths.ravel().tolist()) == [3, 16]


def test_prompt_longer_than_the_context_is_cut_and_counted():
    src = build([Example("a", "0123456789" * 10, ["yes"])], batch_size=1, length=16)
    batch = src.next(None, 0)
    assert src.report()["cut"] == 1
    assert TK.decode(batch.tokens[0, 0]) == "890123456789yes"


def test_example_whose_response_would_vanish_is_dropped_and_counted():
    gone = [
        {"role": "user", "content": "u" * 50},
        {"role": "assistant", "content": "a"},
    ]
    rows = [Example("gone", [{"role": "user", "content": "q"}], [gone]), *make(3)]
    src = build(rows)
    report = src.report()
    assert (report["read"], report["used"], report["dropped"]) == (4, 3, 1)
    assert report["dropped_ids"] == ["gone: no room for a scored token at length 32"]


# -- counts and errors


def test_what_the_reader_refused_is_in_the_report():
    rows = Examples(
        make(3), report={"malformed": ["f:1: bad"], "dropped": ["f:2: empty"] * 30}
    )
    report = build(rows).report()
    assert (report["read"], report["used"], report["malformed"], report["dropped"]) == (
        34, 3, 1, 30,
    )  # fmt: skip
    assert report["malformed_ids"] == ["f:1: bad"]
    assert len(report["dropped_ids"]) == 20
    json.dumps(report)


def test_examples_that_cannot_be_tokenised_are_malformed_and_named():
    rows = [Example("none", "p", []), Example("odd", "p", ["x"], (1.0, 2.0)), *make(2)]
    report = build(rows).report()
    assert report["malformed"] == 2
    assert report["malformed_ids"][0] == "none: no response"
    assert "2 feedback values for 1 responses" in report["malformed_ids"][1]


def test_no_usable_example_is_an_error_with_the_reason():
    with pytest.raises(ValueError, match="empty"):
        build([])
    with pytest.raises(ValueError, match="among 1 read; first: a: no response"):
        build([Example("a", "p", [])])


def test_token_id_beyond_the_vocabulary_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"e0: token id 257 \('<eos>'\).* 257"):
        build(make(1), vocab_size=257)
    build(make(1), vocab_size=259)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length": 1}, "length is 1"),
        ({"buckets": (16, 64)}, "between 1 and length=32"),
        ({"host": (0, 3)}, "4 does not divide over 3 hosts"),
        ({"host": (2, 2)}, "host is"),
    ],
)
def test_impossible_settings_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(make(4), **kwargs)


# -- mixtures


@pytest.mark.parametrize(
    ("ratio", "size"), [((5, 1), 12), ((4, 16), 20), ((0.5, 1.5), 8)]
)
def test_every_step_holds_exactly_the_stated_ratio(ratio, size):
    parts = {"f": (make(30, name="f"), ratio[0]), "r": (make(7, name="r"), ratio[1])}
    src = build(parts, batch_size=size)
    share = round(size * ratio[0] / sum(ratio))
    for step in range(20):
        batch = src.next(None, step)
        assert batch.valid.all()
        names = [p[0] for p in prompts_of(batch)]
        assert names == ["f"] * share + ["r"] * (size - share)
        assert batch.extra["source"].tolist() == [0] * share + [1] * (size - share)


def test_ratio_that_the_batch_cannot_hold_is_an_error():
    parts = {"forget": (make(9), 5), "retain": (make(9), 1)}
    with pytest.raises(ValueError, match="multiple of 6"):
        build(parts, batch_size=16)


def test_parts_of_a_mixture_pass_through_their_own_epochs():
    parts = {"f": (make(10, name="f"), 1), "r": (make(3, name="r"), 1)}
    batches = drain(build(parts, batch_size=4, epochs=1))
    seen = collections.Counter(p for b in batches for p in prompts_of(b))
    assert {k: v for k, v in seen.items() if k[0] == "f"} == {
        f"f{i}:": 1 for i in range(10)
    }
    assert sum(v for k, v in seen.items() if k[0] == "r") == 10
    assert {v for k, v in seen.items() if k[0] == "r"} <= {3, 4}


# -- stopping and going on


@pytest.mark.parametrize("stop", [0, 1, 3, 7, 12])
@pytest.mark.parametrize("mixture", [False, True])
def test_restored_source_gives_the_same_batches(stop, mixture):
    def fresh():
        rows = make(18, group=2)
        parts = {"a": (rows, 3), "b": (make(5, group=2), 1)} if mixture else rows
        return build(parts, window=2)

    whole = fresh()
    batches = [whole.next(None, i) for i in range(20)]
    first = fresh()
    for i in range(stop):
        first.next(None, i)
    saved = json.loads(json.dumps(first.state()))  # as a checkpoint keeps it
    second = fresh()
    second.next(None, 0)  # a source that has already moved
    second.restore(saved)
    for expected in batches[stop:]:
        same(second.next(None, 0), expected)


def test_state_of_other_data_is_refused():
    saved = build(make(8)).state()
    others = [
        build(make(9)),
        build(make(8), seed=1),
        build(make(8), batch_size=8),
        build(make(8), length=16),
    ]
    for other in others:
        with pytest.raises(ValueError, match="other data"):
            other.restore(saved)
    build(make(8), host=(1, 2)).restore(
        saved
    )  # another number of hosts is no other data


def test_report_names_the_examples_of_the_last_batch():
    src = build(make(8))
    assert src.report()["ids"] == []
    batch = src.next(None, 0)
    assert [i + ":" for i in src.report()["ids"]] == prompts_of(batch)


# -- hosts


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_take_disjoint_rows_of_one_batch_in_the_same_shapes(count):
    rows = make(21, group=2, spread=60)
    settings = {"batch_size": 8, "length": 64, "epochs": 2}
    whole = drain(build(rows, **settings))
    hosts = [drain(build(rows, **settings, host=(i, count))) for i in range(count)]
    assert {len(h) for h in hosts} == {len(whole)}
    for step, batch in enumerate(whole):
        shards = [h[step] for h in hosts]
        assert len({s.tokens.shape for s in shards}) == 1
        for field in range(5):
            joined = np.concatenate([s[field] for s in shards])
            np.testing.assert_array_equal(joined, batch[field])


# -- evaluation and generation


def test_evaluation_sees_every_example_once_in_a_fixed_order():
    rows = make(13, group=2)
    batches = source.eval_batches(rows, TK, batch_size=4, length=32)
    ids = [i for k in range(len(batches)) for i in batches.ids(k)]
    assert sorted(ids) == sorted(r.id for r in rows)
    assert sum(int(b.valid[:, 0].sum()) for b in batches) == 13
    assert [i + ":" for i in ids] == [p for b in batches for p in prompts_of(b)]
    assert {b.tokens.shape[0] for b in batches} == {4}
    longest = [int(b.lengths.max()) for b in batches]
    assert longest == sorted(longest)
    again = source.eval_batches(rows, TK, batch_size=4, length=32)
    for a, b in zip(batches, again, strict=True):
        same(a, b)
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_prompts_to_generate_from_keep_their_order():
    rows = [Example(str(i), "p" * (i + 1), []) for i in range(5)]
    batches = prompts.prompt_batches(rows, TK, batch_size=2, length=4, buckets=(2, 4))
    assert [b.tokens.shape for b in batches] == [(2, 2), (2, 4), (2, 4)]
    assert [b.lengths.tolist() for b in batches] == [[1, 2], [3, 4], [4, 4]]
    assert batches[-1].valid.tolist() == [True, False]
    assert batches[0].texts == ["p", "pp"]
    assert [i for b in batches for i in b.ids][:5] == ["0", "1", "2", "3", "4"]
    with pytest.raises(ValueError, match="empty"):
        prompts.prompt_batches([], TK, batch_size=2, length=4)


def test_description_shows_the_mask_in_the_text():
    rows = [Example("a", "é?", ["öb"], (1.0,))]
    batch = build(rows, batch_size=1, length=16, buckets=(16,)).next(None, 0)
    assert detokenize.describe(batch, TK).splitlines() == [
        "[0, 0] 7 tokens, 4 scored, 9 padding, feedback 1",
        "é?⟦öb<eos>⟧",
    ]


def test_quickstart_data_pass_through_whole():
    rows = synthetic.examples(split="train", size=64)
    src = build(rows, batch_size=8, length=96, epochs=1)
    batches = drain(src)
    assert len(batches) == 8
    for batch in batches:
        check(batch)
        assert batch.valid.all()
        assert ((batch.tokens == TK.eos_id) & batch.mask).sum(-1).tolist() == [
            [1, 1]
        ] * 8
        good, bad = (
            [synthetic.judge(TK.decode(t[m])) for t, m in zip(batch.tokens[:, g], batch.mask[:, g], strict=True)]
            for g in (0, 1)
        )  # fmt: skip
        assert all(a > b for a, b in zip(good, bad, strict=True))
    report = src.report()
    assert (report["read"], report["used"], report["cut"]) == (64, 64, 0)


# -- packed


def distinct_tokens(batch):
    """Tokens of a batch, what responses share once: prefixes, one by one."""
    seen = set()
    for b, group in enumerate(batch.tokens):
        for tokens, mask in zip(group, batch.mask[b], strict=True):
            end = len(mask) - int(mask[::-1].argmax()) if mask.any() else 0
            seen |= {(b, tuple(tokens[: t + 1])) for t in range(end)}
    return len(seen)


def test_packed_batches_hold_every_example_once_an_epoch_in_one_shape():
    rows = make(96, group=2, spread=40)
    src = build(rows, batch_size=8, length=64, epochs=2, grid=(1, 1))
    batches = drain(src)
    assert [int(b.valid.any(1).sum()) for b in batches] == [8] * 24
    seen = collections.Counter(p for b in batches for p in prompts_of(b))
    assert seen == {f"e{i}:": 2 for i in range(96)}
    assert len({b.tokens.shape for b in batches}) == 1
    assert len({b.layout.tokens.shape for b in batches}) == 1
    for batch in batches:
        check(batch)
    once = batches[: len(batches) // 2]
    assert len({p for b in once for p in prompts_of(b)}) == 96
    share = sum(map(distinct_tokens, once)) / sum(b.layout.tokens.size for b in once)
    report = src.report()
    assert report["useful"] == pytest.approx(share, abs=1e-12)
    assert report["padding"] == pytest.approx(1 - share, abs=1e-12)
    assert share > 0.9
    plain = build(rows, batch_size=8, length=64, epochs=2).report()["useful"]
    assert plain < 0.8
    last = batches[-1]
    assert report["metrics"] == pytest.approx(
        {
            "useful_tokens": distinct_tokens(last) / last.layout.tokens.size,
            "padding": 1 - distinct_tokens(last) / last.layout.tokens.size,
        }
    )


@pytest.mark.parametrize("epochs", [1, 3])
def test_only_the_last_packed_batch_of_all_may_hold_fewer(epochs):
    rows = make(107, group=2, spread=40)
    settings = dict(batch_size=8, length=64, epochs=epochs, grid=(1, 1))
    many = [int(b.valid.any(1).sum()) for b in drain(build(rows, **settings))]
    assert many[:-1] == [8] * (107 * epochs // 8)
    assert sum(many) == 107 * epochs


LONG = {  # share and characters of long rows among short ones of 20 to 40
    "bimodal": (0.3, (150, 220)),
    "rare": (0.02, (300, 360)),
}


def with_long_rows(kind, many=800):
    """Pairs, of which some are long."""
    share, sizes = LONG[kind]
    rng = np.random.default_rng(0)

    def one(i):
        n = int(rng.integers(*(sizes if rng.random() < share else (20, 40))))
        return Example(f"e{i}", "ab", ("x" * n, "y" * n))

    return [one(i) for i in range(many)]


@pytest.mark.parametrize("kind, clip", [("rare", 0.0), ("bimodal", 1.0)])
def test_every_row_has_the_same_weight_in_packed_batches(kind, clip):
    """A linear toy: the parameter of a row moves by the weight that its steps gave it.

    Where batches held fewer rows if these were long, long rows weighed 1.2 to 2.6 times
    as much, and with clipping 1.1 to 1.6 times.
    """
    rows = with_long_rows(kind)
    src = build(rows, batch_size=8, length=400, grid=(1, 1))
    tx = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(), optax.sgd(1.0)
    )
    weights = {e.id: 0.0 for e in rows}
    counts = collections.Counter()
    state, update = tx.init(np.zeros(8)), jax.jit(tx.update)
    for _ in range(2 * 100):
        src.next()
        ids = src.report()["ids"]
        # loss: the mean over the step's rows of -9 times the row's parameter
        slopes = np.where(np.arange(8) < len(ids), -9 / len(ids), 0.0)
        moved, state = update(np.float32(slopes), state, np.zeros(8))
        for name, x in zip(ids, np.asarray(moved).tolist(), strict=False):
            weights[name] += x
            counts[name] += 1
    assert set(counts.values()) == {2}
    long = {e.id for e in rows if len(e.responses[0]) > 40}
    mean = {
        which: np.mean([w for name, w in weights.items() if (name in long) == which])
        for which in (True, False)
    }
    assert mean[True] / mean[False] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("balanced", [True, False])
def test_every_token_has_about_the_same_weight_in_packed_batches(balanced):
    """Reduction 'token' divides a step by its tokens: steps of equally many are fair.

    Where batches are of like length, a token of a short row counts several times as much.
    """
    rows = with_long_rows("bimodal")
    src = build(rows, batch_size=8, length=400, grid=(1, 1), balanced=balanced)
    total: dict[bool, float] = {True: 0.0, False: 0.0}
    tokens: dict[bool, int] = {True: 0, False: 0}
    for _ in range(100):
        batch = src.next()
        scored = batch.mask.sum((1, 2))
        on_device = jax.tree.map(jnp.asarray, batch)
        weights = np.asarray(masked.token_weights(on_device, "token")).sum((1, 2))
        for long in (True, False):
            which = (batch.mask[:, 0].sum(-1) > 60) == long
            total[long] += weights[which].sum()
            tokens[long] += int(scored[which].sum())
    ratio = total[True] / tokens[True] * tokens[False] / total[False]
    assert ratio == pytest.approx(1, abs=0.02) if balanced else ratio < 0.6


def test_rows_that_would_be_emptier_than_batches_of_like_length_are_reported(caplog):
    rows = with_long_rows("rare")
    settings = dict(batch_size=8, length=400, epochs=1)
    alone = build(rows, **settings, grid=(1, 1)).report()["useful"]
    (line,) = caplog.messages
    grouped = build(rows, **settings, grid=(1, 1), balanced=False).report()["useful"]
    assert alone < grouped - 0.02
    assert f"{100 * alone:.0f} % of what" in line
    assert f"useful, {100 * grouped:.0f} % where" in line
    assert "config.layout = 'grouped'" in line
    build(with_long_rows("bimodal"), **settings, grid=(1, 1))
    assert len(caplog.messages) == 1


def test_a_run_of_packed_batches_of_an_earlier_version_goes_on_and_says_so(caplog):
    """Its identity is that of the same settings, with True for `filled`."""
    rows = make(24, group=2)
    src = build(rows, grid=(1, 1))
    for _ in range(3):
        src.next()
    own = src.state()
    plain = build(rows, grid=(1, 1), balanced=False)
    read = source.read_rows(rows, TK, 32)
    settings = (TK.fingerprint, 4, 32, 0, *plan_settings(rows))
    before = plan.identity([read], (*settings, "packed", True))
    assert plan.identity([read], (*settings, "packed", "balanced")) == own["data"]
    assert plan.identity([read], (*settings, "packed", False)) == plain.state()["data"]
    resumed = build(rows, grid=(1, 1))
    resumed.restore({**own, "data": before})
    assert "some rows come twice" in caplog.text
    same(resumed.next(), src.next())
    assert resumed.state() == src.state()
    with pytest.raises(ValueError, match="another batch layout"):
        plain.restore({**own, "data": before})


def plan_settings(rows):
    """Buckets that occur, shuffle, epochs, window, shares."""
    longest = max(len(f"{e.prompt}{r}") + 1 for e in rows for r in e.responses)
    sizes = plan.bucket_sizes((), 32)
    return (plan.fit(longest, sizes),), True, None, 16, [4]


def test_devices_and_micro_batches_do_not_change_what_a_packed_batch_holds():
    rows = make(60, group=2, spread=40)
    settings = dict(batch_size=8, length=64, epochs=1)
    whole = drain(build(rows, **settings, grid=(1, 1)))
    assert len(whole) == 8
    for grid in ((2, 1), (2, 2), (1, 4)):
        batches = drain(build(rows, **settings, grid=grid))
        assert [sorted(prompts_of(b)) for b in batches] == [
            sorted(prompts_of(b)) for b in whole
        ]
        for batch in batches:
            assert batch.layout.tokens.shape[0] == grid[0] * grid[1]
    saved = build(rows, **settings, grid=(1, 1)).state()
    build(rows, **settings, grid=(2, 2)).restore(saved)
    with pytest.raises(ValueError, match="another batch layout"):
        build(rows, **settings).restore(saved)
    with pytest.raises(ValueError, match="8 does not divide over 3 shards x 1"):
        build(rows, **settings, grid=(3, 1))


@pytest.mark.parametrize("stop", [1, 9])
@pytest.mark.parametrize("mixture", [False, True])
def test_restored_packed_source_gives_the_same_batches(stop, mixture):
    def fresh():
        rows = make(18, group=2)
        parts = {"a": (rows, 3), "b": (make(5, group=2), 1)} if mixture else rows
        return build(parts, window=2, grid=(2, 1))

    whole = fresh()
    batches = [whole.next(None, i) for i in range(14)]
    first = fresh()
    for i in range(stop):
        first.next(None, i)
    second = fresh()
    second.next(None, 0)
    second.restore(json.loads(json.dumps(first.state())))
    for expected in batches[stop:]:
        got = second.next(None, 0)
        same(got, expected)
        for a, b in zip(got.layout, expected.layout, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mixture", [False, True])
def test_hosts_lay_out_their_own_rows_in_the_same_shapes(mixture):
    rows = make(21, group=2, spread=60)
    parts = {"a": (rows, 3), "b": (make(5, group=2), 1)} if mixture else rows
    settings = {"batch_size": 8, "length": 64, "epochs": 2, "grid": (4, 1)}
    whole = drain(build(parts, **settings))
    hosts = [drain(build(parts, **settings, host=(i, 2))) for i in range(2)]
    for step, batch in enumerate(whole):
        shards = [h[step] for h in hosts]
        for field, want in enumerate(batch.layout):
            joined = np.concatenate([s.layout[field] for s in shards])
            np.testing.assert_array_equal(joined, want)


def test_packed_batches_without_shuffling_keep_the_order():
    batches = drain(build(make(20), epochs=1, shuffle=False, grid=(1, 1)))
    assert [p for b in batches for p in prompts_of(b)] == [f"e{i}:" for i in range(20)]
