"""A run goes on with other settings: with those that change no number, and no others."""

import jax
import numpy as np
import pytest
import tiny

from alignax.reports.metrics import read
from alignax.runs import workdirs
from alignax.training import defaults, loop, optim

pytestmark = pytest.mark.slow

EVALUATED = {
    "eval_data": {"name": "synthetic", "split": "test", "kind": "pairs", "size": 8},
    "evals": {"ranking_accuracy": {}},
}  # fmt: skip


def losses(folder):
    return [row["train/loss"] for row in read(folder) if "train/loss" in row]


def test_more_steps_end_as_a_run_that_had_them_from_the_start(tmp_path):
    settings = {"optim.schedule": "constant", "checkpoint.every": 2, **EVALUATED}
    loop.train(tiny.config("pairs", num_steps=2, **settings), str(tmp_path / "a"))
    state = loop.train(
        tiny.config("pairs", num_steps=3, **settings), str(tmp_path / "a")
    )
    whole = loop.train(
        tiny.config("pairs", num_steps=3, **settings), str(tmp_path / "b")
    )
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = read(tmp_path / "a")
    evaluated = [int(r["step"]) for r in rows if any(k.startswith("eval/") for k in r)]
    assert evaluated == [2, 3]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_another_accumulation_is_allowed_and_said(tmp_path, caplog):
    settings = {"num_steps": 3, "checkpoint.every": 1}
    loop.train(tiny.config("pairs", **settings), str(tmp_path))
    whole = losses(tmp_path)
    for step in (2, 3):
        for path in sorted((tmp_path / f"checkpoints/{step}").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (tmp_path / f"checkpoints/{step}").rmdir()
    (tmp_path / workdirs.END).unlink()
    caplog.clear()
    loop.train(tiny.config("pairs", **settings, accumulate=2), str(tmp_path))
    assert "goes on with another accumulate, which rounds differently" in caplog.text
    np.testing.assert_allclose(losses(tmp_path), whole, rtol=1e-5)


def begun(folder, **settings):
    workdirs.prepare(str(folder), tiny.config("pairs", **settings))
    (folder / "checkpoints" / "1").mkdir(parents=True)  # the folder is this run's


def check(folder, **settings):
    config = tiny.config("pairs", **settings)
    workdirs.check_owner(str(folder), config, defaults.get_config())


@pytest.mark.parametrize(
    "before, now",
    [
        ({}, {"optim.schedule_steps": 6, "num_steps": 9}),
        ({"optim.schedule_steps": 4}, {"optim.schedule_steps": 4, "num_steps": 9}),
        ({"optim.schedule": "constant"}, {"optim.schedule": "constant", "num_steps": 9}),
        ({}, {"eval_every": 2, "plots": True, "accumulate": 2, "model.remat": "block"}),
        ({}, {"model.attn_kernel": "splash", "mesh": (2, 1, 1), "checkpoint.keep": 1}),
    ],
)  # fmt: skip
def test_what_leaves_every_step_as_it_was_may_change(tmp_path, before, now):
    begun(tmp_path, **before)
    check(tmp_path, **now)


@pytest.mark.parametrize(
    "now, named",
    [
        ({"num_steps": 9}, r"optim\.schedule_steps=6"),
        ({"num_steps": 9, "optim.schedule_steps": 9}, r"optim\.schedule_steps=6"),
        ({"optim.schedule_steps": 3}, r"num_steps \(6 there, 3 here\)"),
        ({"optim.schedule": "constant"}, r"optim\.schedule \(cosine there"),
        ({"batch_size": 8, "eval_every": 1}, r"undo: batch_size \(4 there, 8 here\)$"),
    ],
)
def test_what_changes_a_step_is_refused(tmp_path, now, named):
    begun(tmp_path)
    with pytest.raises(ValueError, match=named):
        check(tmp_path, **now)


def test_the_rate_stays_after_the_steps_of_the_schedule():
    c = tiny.config("pairs", **{"num_steps": 9, "optim.schedule_steps": 4})
    rate, _ = optim.from_config(c)
    four, _ = optim.from_config(tiny.config("pairs", num_steps=4))
    assert [float(rate(k)) for k in range(4)] == [float(four(k)) for k in range(4)]
    np.testing.assert_allclose([float(rate(k)) for k in (4, 8)], 1e-3, rtol=1e-6)
