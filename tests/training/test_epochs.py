"""The number of steps of a number of epochs, and a checkpoint every so many minutes."""

import json
import types

import pytest
import tiny

from alignax.respond import respond
from alignax.runs import checkpoint
from alignax.training import build, checks, loop

pytestmark = pytest.mark.slow

SOME = {"name": "synthetic", "split": "train", "kind": "sft", "seed": 0}


def steps_of(folder, **changes):
    settings = {"num_steps": 0, "num_epochs": 1.0, **changes}
    run = build.build(tiny.config(**settings), str(folder))
    return run.config.num_steps


@pytest.mark.parametrize(
    "epochs, size, batch_size, steps",
    [
        (1.0, 32, 4, 8),
        (1.0, 33, 4, 9),
        (2.5, 32, 4, 20),
        (0.1, 32, 4, 1),
        (3, 30, 8, 12),
    ],
)
def test_epochs_count_rows_and_are_rounded_up(
    tmp_path, epochs, size, batch_size, steps
):
    data = {**SOME, "size": size}
    found = steps_of(tmp_path, num_epochs=epochs, data=data, batch_size=batch_size)
    assert found == steps


def test_rows_that_cannot_be_used_are_no_part_of_an_epoch(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {i}", "response": "word " * (1 + i)} for i in range(20)]
    rows += [{"prompt": "x " * 200, "response": "too long"}] * 8
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "jsonl", "path": str(path), "test_fraction": 0.0, "split": "train"}
    steps = steps_of(tmp_path / "run", data=data, truncate="drop")
    said = capsys.readouterr().out
    assert steps == 4 and "num_epochs=1: 4 steps" in said
    assert "28 read, 13 used, 0 cut, 15 dropped" in said


ROLLOUT = {
    "num_epochs": 2.0, "length": 40, "loss": {"name": "policy_gradient"},
    "shaping": {"rloo": {}}, "rollout.reward": {"name": "constraints", "max_words": 3},
    "rollout.max_new": 4, "rollout.group": 2,
}  # fmt: skip


@pytest.mark.parametrize("passes, steps", [(1, 16), (3, 48)])
def test_an_epoch_of_rollouts_asks_every_prompt_once(tmp_path, passes, steps):
    settings = {**ROLLOUT, "rollout.epochs": passes}
    assert steps_of(tmp_path, **settings) == steps
    run = build.build(tiny.config(num_steps=0, **settings), str(tmp_path))
    met = []
    for step in range(steps // 2):
        run.source.next(run.policy.params, step)
        met += run.source.report().get("ids", [])
    assert len({*met}) == 32 and len(met) == 32 * passes


def test_epochs_decide_whatever_the_steps_are(tmp_path):
    assert steps_of(tmp_path, num_steps=3) == 8


def test_a_mixture_has_no_epochs():
    mixture = {"a": {**SOME, "size": 8, "ratio": 1.0}}
    with pytest.raises(ValueError, match="a mixture is drawn by ratios: set num_steps"):
        checks.check(tiny.config(num_epochs=1.0, data={}, mixture=mixture))


def test_a_run_that_answers_prompts_has_none(tmp_path):
    config = tiny.to_respond(tmp_path, num_epochs=1.0)
    with pytest.raises(
        ValueError, match=r"num_epochs is 1\.0, but a config with prompts"
    ):
        respond.respond(config, str(tmp_path / "run"))


def run(folder, **changes):
    return loop.train(tiny.config(num_steps=0, **changes), str(folder))


def test_a_run_of_epochs_goes_on_and_more_of_them_need_their_rate(tmp_path, capsys):
    assert int(run(tmp_path, num_epochs=0.25).step) == 2
    assert int(run(tmp_path, num_epochs=0.25).step) == 2
    assert "resumed at step 2 of 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"num_steps \(2 there, 4 here\).*schedule_steps=2"):  # fmt: skip
        run(tmp_path, num_epochs=0.5)
    with pytest.raises(ValueError, match=r"num_steps \(2 there, 3 here\)"):
        loop.train(tiny.config(num_steps=3), str(tmp_path))
    with pytest.raises(ValueError, match=r"num_steps \(2 there, 8 here\)"):
        loop.train(tiny.config(num_steps=2, num_epochs=1.0), str(tmp_path))
    assert int(loop.train(tiny.config(num_steps=2), str(tmp_path)).step) == 2
    schedule = {"optim.schedule_steps": 2}
    assert int(run(tmp_path, num_epochs=0.5, **schedule).step) == 4
    with pytest.raises(ValueError, match=r"num_steps \(2 there, none here\)"):
        run(tmp_path)  # which would evaluate only


def kept(folder):
    with checkpoint.manager(f"{folder}/checkpoints", keep=9) as found:
        return sorted(found.all_steps())


@pytest.mark.parametrize("minutes, some", [(0.0, False), (1.0, True), (1e3, False)])
def test_a_checkpoint_that_is_old_is_followed_by_another(
    tmp_path, monkeypatch, minutes, some
):
    now = iter(range(0, 10**6, 10))  # seconds; a step reads the clock several times
    clock = types.SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr(loop, "time", clock)
    settings = {"checkpoint.minutes": minutes, "checkpoint.keep": 9}
    loop.train(tiny.config(**settings), str(tmp_path))
    found = kept(tmp_path)
    assert found[-1] == 6 and (len(found) > 1) == some
