"""The reference's log-probs on disk: the same training, one forward pass less."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import logprob, plugin
from alignax.batch import LM
from alignax.data import synthetic
from alignax.inputs import reference_cache
from alignax.inputs.annotate import annotate
from alignax.models import sharding
from alignax.models.transformer import ModelConfig
from alignax.reports.metrics import read
from alignax.training import build, loop, optim, start_check
from alignax.training.step import init_state, make_train_step

pytestmark = pytest.mark.slow


def config(cache="", **changes):
    changes = {
        "reference_cache": str(cache),
        "loss.beta": 1.0,
        "num_steps": 10,
        "layout": "rows",  # one shape, in which a row's numbers never round differently
        **changes,
    }
    return tiny.config("pairs", **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of the cache, state without it, state that made it, state that read it)."""
    folder = tmp_path_factory.mktemp("runs")
    cache = folder / "cache"
    states = [
        loop.train(config(where), str(folder / name))
        for name, where in (("without", ""), ("makes", cache), ("reads", cache))
    ]
    return cache, folder, states


def test_training_with_the_cache_is_training_without_it_exactly(runs):
    """More than an epoch, so that every row meets others than it was scored with."""
    _, folder, (without, makes, reads) = runs
    for other in (makes, reads):
        for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    losses = [
        [r["train/loss"] for r in read(folder / name) if "train/loss" in r]
        for name in ("without", "reads")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.01


def test_the_second_run_reads_the_file_and_does_not_write_it(
    runs, monkeypatch, tmp_path
):
    cache, _, _ = runs

    def never(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr(reference_cache, "compute", never)
    build.build(config(cache), str(tmp_path / "run"))


def test_a_step_with_cached_rows_skips_the_reference(make_batch, tiny_lm):
    mesh, tx = sharding.make_mesh((1, 1, 1)), optim.make_tx(1e-3)
    step = make_train_step(tiny_lm.config, tx, plugin.load("losses", "dpo"), mesh)
    state, lms = init_state(tiny_lm.params, tx, mesh), {"ref": tiny_lm}
    batch = make_batch(4, 2, 12)
    cached = batch._replace(ref_logps=jax.numpy.zeros(batch.mask.shape))

    def never(*args):
        raise AssertionError("the reference was read")

    step = step._replace(fill=never)
    step(state, lms, cached)
    with pytest.raises(AssertionError, match="the reference was read"):
        step(init_state(tiny_lm.params, tx, mesh), lms, batch)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data.size": 16}, "data"),
        ({"length": 80, "buckets": (80,)}, "length"),
        ({"seed": 3}, "parameters"),
        ({"model.dtype": "bfloat16"}, "dtype"),
        ({"model.sizes.rope_theta": 5e3}, "model"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_another_key_is_refused_and_the_part_named(runs, tmp_path, changes, part):
    cache, _, _ = runs
    with pytest.raises(
        ValueError, match="log-probabilities of something else"
    ) as error:
        build.build(config(cache, **changes), str(tmp_path / "run"))
    assert f"{part} (" in str(error.value)
    others = {
        "data",
        "platform",
        "length",
        "parameters",
        "dtype",
        "model",
        "tokenizer",
        "kernel",
    }
    unexpected = [p for p in others - {part} if f"{p} (" in str(error.value)]
    assert unexpected == []


def test_how_a_model_is_computed_is_no_part_of_the_key(tiny_lm):
    def key(**change):
        config = dataclasses.replace(tiny_lm.config, **change)
        return reference_cache.describe_lm(tiny_lm._replace(config=config))

    kernels = {"head_kernel": "pallas", "attn_kernel": "splash", "attn_tile": 64}
    assert key(remat="block", dtype="bfloat16", **kernels) == key() | {
        "dtype": "bfloat16"
    }
    assert key(rope_theta=5.0) != key()


def test_a_kernel_that_changed_its_numbers_is_another_key(runs, tmp_path, monkeypatch):
    cache, _, _ = runs
    monkeypatch.setattr(reference_cache, "KERNEL", reference_cache.KERNEL + 1)
    with pytest.raises(ValueError, match=r"kernel \(1 there, 2 here\)"):
        build.build(config(cache), str(tmp_path / "run"))


def test_a_cache_that_is_wrong_is_found_before_the_first_step(runs, tmp_path):
    cache, _, _ = runs
    saved = dict(np.load(cache / "reference.npz"))
    (tmp_path / "cache").mkdir()
    saved["logps"] = saved["logps"] + 0.5
    np.savez(tmp_path / "cache" / "reference.npz", **saved)
    with pytest.raises(RuntimeError, match=r"reference_cache is 0\.5\d* nats off"):
        loop.train(config(tmp_path / "cache"), str(tmp_path / "run"))


def test_an_error_of_a_source_does_not_ask_to_delete_a_cache(tiny_config):
    with pytest.raises(RuntimeError, match=r"source says of the reference is 2 nats"):
        start_check.check_cache(2.0, tiny_config, "")


def test_a_row_is_its_tokens_and_mask_whatever_pads_it(make_batch):
    batch = jax.tree.map(np.asarray, make_batch(2, 2, 12))
    longer = batch._replace(
        tokens=np.pad(batch.tokens, ((0, 0), (0, 0), (0, 4)), constant_values=5),
        mask=np.pad(batch.mask, ((0, 0), (0, 0), (0, 4))),
    )
    contents = [[c for c, _ in reference_cache._rows(b)] for b in (batch, longer)]
    assert contents[0] == contents[1]
    assert len(set(contents[0])) == 4


def test_a_moving_reference_has_no_cache(tmp_path):
    changes = {"lms": {"ref": "average"}, "average": 0.9}
    with pytest.raises(ValueError, match=r"need a frozen lms\.ref"):
        build.build(config(tmp_path / "cache", **changes), str(tmp_path / "run"))


def test_a_table_comes_back_from_disk(tmp_path):
    table = {bytes([i] * 32): np.arange(i, dtype=np.float32) for i in range(1, 4)}
    reference_cache.save(tmp_path / "a" / "reference.npz", table, {"data": "x"})
    back = reference_cache.load(tmp_path / "a" / "reference.npz", {"data": "x"})
    assert back.keys() == table.keys()
    for row, values in table.items():
        np.testing.assert_array_equal(back[row], values)


# -- a reference that reads other prompts


def long(*, split: str, size: int = 32):
    """The synthetic pairs behind some more context, under the same ids."""
    inner = synthetic.examples(split=split, size=size)
    return [e._replace(prompt=f"Later. {e.prompt}") for e in inner]


def changed(*, split: str):
    inner = synthetic.examples(split=split, size=32)
    return [e._replace(responses=(e.responses[0] + "!", e.responses[1])) for e in inner]


def two_contexts(tmp_path, data="long", **more):
    short = {"name": "synthetic", "split": "train", "kind": "pairs", "size": 32}
    changes = {
        "data": {"name": f"{__name__}.{data}", "split": "train"}, "reference_data": short,
        "length": 80, "buckets": (80,), "reference_cache": "", **more,
    }  # fmt: skip
    return build.build(config(**changes), str(tmp_path / "run"))


def test_the_reference_reads_its_own_prompts(tmp_path):
    run = two_contexts(tmp_path)
    batch = run.source.next(None, 0)
    ids = run.source.report()["ids"]
    shorts = {e.id: e for e in synthetic.examples(split="train", size=32)}
    score = jax.jit(logprob.sequence_logps)
    for b, name in enumerate(ids):
        prompt, answers, _ = run.tokenizer.tokenize(shorts[name])
        for g, answer in enumerate(answers):
            row = np.zeros((1, 80), np.int32)
            end = len(prompt) + len(answer)
            row[0, :end] = [*prompt, *answer]
            want = np.asarray(score(run.lms["ref"], row))[0, len(prompt) : end]
            got = batch.ref_logps[b, g][batch.mask[b, g]]
            np.testing.assert_allclose(got, want, atol=1e-5)
    own = annotate(batch._replace(ref_logps=None), run.lms)
    assert np.abs(own.ref_logps - batch.ref_logps).max() > 1e-3


def test_such_a_run_trains_and_does_not_ask_for_agreement_at_the_start(tmp_path):
    short = {"name": "synthetic", "split": "train", "kind": "pairs", "size": 32}
    loop.train(
        config(
            data={"name": f"{__name__}.long", "split": "train"}, reference_data=short,
            length=80, buckets=(80,), num_steps=2,
        ),
        str(tmp_path / "other"),
    )  # fmt: skip


def test_responses_that_differ_between_the_contexts_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"response 0 of synthetic/train/pairs:\d+ is another"
    ):
        two_contexts(tmp_path, data="changed")


def test_an_example_without_its_other_context_is_named(tmp_path):
    few = {"name": "synthetic", "split": "train", "kind": "pairs", "size": 8}
    with pytest.raises(ValueError, match="reference_data has no response 0 of"):
        two_contexts(tmp_path, reference_data=few)


def swapped(*, split: str):
    return [e._replace(responses=e.responses[::-1]) for e in long(split=split)]


def twice(*, split: str):
    return [e._replace(id="same") for e in synthetic.examples(split=split, size=32)]


def test_swapped_responses_and_repeated_ids_are_refused(tmp_path):
    """They have the right number of tokens, perhaps, and would be silently wrong."""
    with pytest.raises(
        ValueError, match=r"response \d of synthetic/train/pairs:\d+ is another"
    ):
        two_contexts(tmp_path, data="swapped")
    both = {"name": f"{__name__}.twice", "split": "train"}
    with pytest.raises(ValueError, match="reference_data has two examples same"):
        two_contexts(tmp_path, reference_data=both)


def test_a_torn_file_is_named(tmp_path):
    path = tmp_path / "reference.npz"
    reference_cache.save(path, {b"1" * 32: np.zeros(3, np.float32)}, {"data": "x"})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"reference\.npz does not read back"):
        reference_cache.load(path, {"data": "x"})


def test_a_cache_from_before_a_field_of_the_model_still_holds():
    """The digest is that of the version of 2026-11-29, which had fewer fields."""
    config = ModelConfig(
        vocab_size=37, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp_width=24, max_length=64,
    )  # fmt: skip
    params = {"embed": jnp.zeros((2, 2))}

    def digest(**changes):
        lm = LM(dataclasses.replace(config, **changes), params)
        return reference_cache.describe_lm(lm)["model"]

    assert digest() == digest(dtype="bfloat16") == "4fd8f01f0c633cd3"
    later = {
        "o_bias": True, "mlp_bias": True, "qk_norm": True, "pre_norms": False,
        "rope_layers": (True, False), "rope_theta": 5e5,
    }  # fmt: skip
    found = {digest(**{name: value}) for name, value in later.items()}
    assert len(found) == len(later) and digest() not in found
