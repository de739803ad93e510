"""Checkpoints: what comes back is what went in, or the one before it, never less."""

import dataclasses
import json
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax.models import sharding
from alignax.runs import checkpoint
from alignax.runs.checkpoint import CheckpointError
from alignax.training import loading, loop

TX = optax.adam(1e-2)


@pytest.fixture(scope="module")
def one_device():
    return sharding.make_mesh((1, 1, 1))


def make_state(lm, mesh, step=0, **kwargs):
    """A state in which every number differs from every other state's."""
    state = loop.init_state(lm.params, TX, mesh, **kwargs)
    state = jax.tree.map(
        lambda x: x + step if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    return state._replace(step=state.step + step)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save_steps(folder, lm, mesh, steps, *, keep=10):
    with checkpoint.manager(folder, keep=keep, asynchronous=False) as manager:
        for step in steps:
            meta = {"data": {"at": step}, "nested": {"text": "x"}}
            state = make_state(lm, mesh, step)
            checkpoint.save(manager, state, model=lm.config, meta=meta)
    return state


def restore(folder, state):
    with checkpoint.manager(folder, keep=10, asynchronous=False) as manager:
        return checkpoint.restore(manager, state)


def test_a_state_comes_back_whole_with_its_meta(tmp_path, tiny_lm, one_device):
    kwargs = {"ema": {"delta": 2.5}, "average": True}
    with checkpoint.manager(tmp_path, asynchronous=True) as manager:
        state = make_state(tiny_lm, one_device, 7, **kwargs)
        checkpoint.save(manager, state, model=tiny_lm.config, meta={"data": {"k": [1]}})
        manager.wait_until_finished()
        got, meta = checkpoint.restore(
            manager, make_state(tiny_lm, one_device, **kwargs)
        )
    same(got, state)
    assert int(got.step) == 7
    assert float(got.ema["delta"]) == 9.5
    assert meta["data"] == {"k": [1]}


def test_there_is_nothing_to_restore_in_an_empty_folder(tmp_path, tiny_lm, one_device):
    assert restore(tmp_path, make_state(tiny_lm, one_device)) is None


@pytest.mark.parametrize("before, after", [((8, 1, 1), (2, 2, 2)), ((1, 4, 2), (1, 1, 1)), ((1, 1, 1), (1, 8, 1))])  # fmt: skip
def test_another_mesh_reads_the_same_numbers_in_its_own_shardings(
    tmp_path, make_lm, tiny_config, before, after
):
    lm = make_lm(dataclasses.replace(tiny_config, width=32, num_heads=8, mlp_width=32))
    old, new = sharding.make_mesh(before), sharding.make_mesh(after)
    state = save_steps(tmp_path, lm, old, [3])
    target = make_state(lm, new)
    got, _ = restore(tmp_path, target)
    same(got, state)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(target), strict=True):
        assert x.sharding == y.sharding


def test_the_newest_are_kept(tmp_path, tiny_lm, one_device):
    save_steps(tmp_path, tiny_lm, one_device, range(1, 6), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]


# -- damage


def data_files(folder):
    """The files that hold the arrays of one item; which are read is Orbax's business."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    return files


def truncate(folder):
    for path in data_files(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(folder):
    for path in data_files(folder):
        path.unlink()


def flip(folder):
    for path in data_files(folder):
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        for i in range(middle, middle + 4):
            content[i] ^= 0x55
        path.write_bytes(content)


def no_meta(folder):
    for path in (folder.parent / "meta").iterdir():
        path.write_bytes(b"")


DAMAGE = [truncate, delete, flip, no_meta]


@pytest.mark.parametrize("item", ["params", "rest"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path, tiny_lm, one_device, caplog, damage, item
):
    save_steps(tmp_path, tiny_lm, one_device, [2, 4])
    damage(tmp_path / "4" / item)
    with caplog.at_level(logging.WARNING, "alignax"):
        got, meta = restore(tmp_path, make_state(tiny_lm, one_device))
    same(got, make_state(tiny_lm, one_device, 2))
    assert meta["data"] == {"at": 2}
    assert f"checkpoint 4 in {tmp_path} does not read back" in caplog.text
    assert f"falling back to checkpoint 2 in {tmp_path}" in caplog.text
    # The run will come to step 4 again, and must be able to save there.
    with checkpoint.manager(tmp_path, asynchronous=False) as manager:
        checkpoint.save(manager, make_state(tiny_lm, one_device, 4), model=tiny_lm.config, meta={})  # fmt: skip
    assert int(restore(tmp_path, make_state(tiny_lm, one_device))[0].step) == 4


def test_if_nothing_reads_back_a_run_does_not_start_over(tmp_path, tiny_lm, one_device):
    save_steps(tmp_path, tiny_lm, one_device, [2, 4])
    for step in (2, 4):
        truncate(tmp_path / str(step) / "params")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[4, 2\] in .* reads back"):  # fmt: skip
        restore(tmp_path, make_state(tiny_lm, one_device))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "2",
        "4",
    ]  # nothing is deleted


def test_wrong_numbers_that_read_back_fine_are_noticed(tmp_path, tiny_lm, one_device):
    """The storage is intact and the sum is not: only the checksum can tell."""
    with checkpoint.manager(tmp_path, asynchronous=False) as manager:
        meta = {"data": {}}
        checkpoint.save(manager, make_state(tiny_lm, one_device, 1), model=tiny_lm.config, meta=meta)  # fmt: skip
        honest = checkpoint.checksum
        try:
            checkpoint.checksum = lambda tree: honest(tree) + np.uint32(1)
            checkpoint.save(manager, make_state(tiny_lm, one_device, 2), model=tiny_lm.config, meta=meta)  # fmt: skip
        finally:
            checkpoint.checksum = honest
    got, _ = restore(tmp_path, make_state(tiny_lm, one_device))
    assert int(got.step) == 1


def test_checksum_sees_one_bit_and_a_swap_and_not_the_mesh():
    a, b = np.arange(8, dtype=np.float32), np.arange(8, 16).astype(np.float32)
    base = int(checkpoint.checksum({"a": a, "b": b}))
    one_bit = a.copy().view(np.uint32)
    one_bit[3] ^= 1
    assert int(checkpoint.checksum({"a": one_bit.view(np.float32), "b": b})) != base
    assert int(checkpoint.checksum({"a": b, "b": a})) != base
    mesh = sharding.make_mesh((8, 1, 1))
    put = jax.device_put({"a": a, "b": b}, jax.NamedSharding(mesh, jax.P("data")))
    assert int(checkpoint.checksum(put)) == base
    within = a.copy()
    within[[1, 4]] = within[[4, 1]]
    assert int(checkpoint.checksum({"a": within, "b": b})) != base
    bits = [[int(n) for n in x.view(np.uint32)] for x in (a, b)]
    sums = [sum(n * (2 * i + 1) for i, n in enumerate(x)) for x in bits]
    assert base == (sums[0] + 3 * sums[1]) % 2**32


# -- another model


def test_a_checkpoint_of_another_model_is_an_error_and_stays(
    tmp_path, make_lm, tiny_config, one_device
):
    save_steps(tmp_path, make_lm(tiny_config), one_device, [2, 4])
    wider = make_lm(dataclasses.replace(tiny_config, mlp_width=28))
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, make_state(wider, one_device))
    message = str(error.value)
    assert f"checkpoint {tmp_path}/4 is of another model or optimiser" in message
    assert "blocks/mlp/down/kernel is [[2, 24, 16], 'float32'] there and [[2, 28, 16], 'float32'] here" in message  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4"]


def test_a_checkpoint_of_another_optimiser_is_an_error(tmp_path, tiny_lm, one_device):
    save_steps(tmp_path, tiny_lm, one_device, [1])
    state = loop.init_state(tiny_lm.params, optax.sgd(0.1, momentum=0.9), one_device)
    with pytest.raises(CheckpointError, match=r"opt_state/.* is .* there and"):
        restore(tmp_path, state)


# -- the policy alone


def test_load_lm_needs_only_the_folder(tmp_path, make_lm, tiny_config, one_device):
    config = dataclasses.replace(
        tiny_config, value_head=True, window=8, local_layers=(True, False),
        rope_scaling=("linear", 2.0), eos_ids=(1, 2),
    )  # fmt: skip
    lm = make_lm(config)
    state = save_steps(tmp_path / "checkpoints", lm, one_device, [3, 9])
    for folder in (tmp_path, tmp_path / "checkpoints"):
        got = checkpoint.load_lm(folder)
        assert got.config == config
        same(got.params, state.params)
    same(loading.load_lm(str(tmp_path)).params, state.params)


def test_the_best_checkpoint_of_a_run_is_a_model_path(tmp_path, tiny_lm, one_device):
    state = save_steps(tmp_path / "best", tiny_lm, one_device, [3])
    save_steps(tmp_path / "checkpoints", tiny_lm, one_device, [5])
    same(loading.load_lm(str(tmp_path / "best")).params, state.params)


def test_the_average_of_a_run_is_a_model_path(tmp_path, tiny_lm, one_device):
    folder = tmp_path / "checkpoints"
    with checkpoint.manager(folder, asynchronous=False) as manager:
        state = make_state(tiny_lm, one_device, 3, average=True)
        state = state._replace(average=jax.tree.map(lambda x: x - 0.5, state.params))
        checkpoint.save(manager, state, model=tiny_lm.config, meta={})
    got = loading.load_lm(f"average:{tmp_path}")
    same(got.params, state.average)
    assert got.config == tiny_lm.config
    same(loading.load_lm(str(tmp_path)).params, state.params)
    other = make_state(tiny_lm, one_device, average=True)
    same(restore(folder, other)[0].average, state.average)


def test_an_average_that_is_not_there_is_said(tmp_path, tiny_lm, one_device):
    save_steps(tmp_path / "checkpoints", tiny_lm, one_device, [3])
    with pytest.raises(CheckpointError, match=r"checkpoints/3 has no average of the"):
        loading.load_lm(f"average:{tmp_path}")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"only a run has an average"):
        loading.load_lm(f"average:{tmp_path / 'model'}")
    with pytest.raises(FileNotFoundError, match=r"elsewhere: there is no"):
        loading.load_lm(f"average:{tmp_path / 'elsewhere'}")


def test_a_damaged_average_does_not_load(tmp_path, tiny_lm, one_device, caplog):
    folder = tmp_path / "checkpoints"
    with checkpoint.manager(folder, asynchronous=False) as manager:
        state = make_state(tiny_lm, one_device, 3, average=True)
        checkpoint.save(manager, state, model=tiny_lm.config, meta={})
    meta = folder / "3" / "meta" / "metadata"
    saved = json.loads(meta.read_text())
    saved["checksum"]["average"] += 1
    meta.write_text(json.dumps(saved))
    loading.load_lm(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no checkpoint that reads back"):
        loading.load_lm(f"average:{tmp_path}")
    assert "its checksum differs" in caplog.text
    del saved["checksum"]["average"]  # as earlier versions wrote it
    meta.write_text(json.dumps(saved))
    restored = restore(folder, make_state(tiny_lm, one_device, average=True))
    same(restored[0].average, state.average)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_load_lm_skips_a_damaged_checkpoint(
    tmp_path, tiny_lm, one_device, caplog, damage
):
    save_steps(tmp_path / "checkpoints", tiny_lm, one_device, [2, 4])
    damage(tmp_path / "checkpoints" / "4" / "params")
    got = checkpoint.load_lm(tmp_path)
    same(got.params, make_state(tiny_lm, one_device, 2).params)
    assert "checkpoint 4" in caplog.text


def test_load_lm_logs_and_warns_of_nothing(
    tmp_path, tiny_lm, one_device, caplog, capfd
):
    """A notebook that loads a run shows no warning of Orbax."""
    save_steps(tmp_path / "checkpoints", tiny_lm, one_device, [2])
    caplog.clear()
    capfd.readouterr()
    filters = [*logging.getLogger("absl").filters]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load_lm(tmp_path)
    assert [
        r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING
    ] == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("absl").filters == filters


def test_load_lm_says_where_it_looked(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint that reads back in {tmp_path}"):  # fmt: skip
        checkpoint.load_lm(tmp_path)


def test_reading_a_run_leaves_a_save_in_progress_alone(tmp_path, tiny_lm, one_device):
    """An evaluation may read the folder of a run that is still training."""
    save_steps(tmp_path / "checkpoints", tiny_lm, one_device, [2])
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    checkpoint.load_lm(tmp_path)
    assert half.is_dir()
