"""What went wrong is the error that a user sees, in a new folder and in a used one.

A start that fails leaves nothing that owns the folder, and takes nothing from it.
"""

import json
import os
import signal
import time

import pytest
import tiny

from alignax.respond import respond
from alignax.reward_functions import process
from alignax.runs import checkpoint, watchdog, workdirs
from alignax.runs.preemption import preemption
from alignax.training import loop, stages

pytestmark = pytest.mark.slow

EVAL = {"name": "synthetic", "split": "test", "kind": "pairs", "size": 8, "seed": 0}


def failing_reward(text):
    raise OSError("the judge is away")


def failing_evaluation(
    lm, lms, data, *, key, tokenizer, generate, score, batch_size: int, length: int
):
    raise ValueError("no such judge")


def failing_data(*, split: str):
    return [*tiny.synthetic.examples(split=split, kind="pairs", size=3), None]


MINE = "test_attacked_starts"
WRONG = {  # where -> (changes, the message that a user has to see)
    "build: mesh": ({"mesh": (16, 1, 1)}, "16 devices"),
    "build: loss": ({"loss.name": "dpoo"}, "unknown name 'dpoo'"),
    "build: a range": ({"average_every": 0}, "average_every"),
    "build: weights": ({"model.path": "nowhere"}, "nowhere"),
    "build: tokenizer": ({"tokenizer": "nowhere"}, "no tokenizer at nowhere"),
    "data: no file": ({"data": {"name": "jsonl", "path": "nowhere.jsonl", "split": "train"}}, "nowhere"),
    "data: rows": ({"data": {**EVAL, "kind": "sft"}}, "reads pairs"),
    "evaluation: no metric": (
        {"evals": {"scripted": {"name": "tiny.scripted"}}, "eval_data": EVAL, "eval_at_start": True,
         "best_metric": "eval/scripted/nothing", "num_steps": 1}, "best_metric"),
    "evaluation: raises": (
        {"evals": {"x": {"name": f"{MINE}.failing_evaluation"}}, "eval_data": EVAL,
         "eval_at_start": True}, "no such judge"),
    "rollout: reward": (
        {"rollout.reward": {"name": f"{MINE}.failing_reward"}, "loss": {"name": "policy_gradient"},
         "shaping": {"rloo": {}}, "lms": {}, "rollout.max_new": 4}, "the judge is away"),
}  # fmt: skip
USED = ("new", "empty", "killed before a checkpoint", "run")


def files(folder):
    """{path: content} of what is in a folder; None where there is no folder."""
    if not folder.exists():
        return None
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("where", WRONG)
def test_an_error_is_the_last_thing_a_user_sees(tmp_path, where, used):
    tiny.SCRIPT[:] = [0.0] * 9
    folder = tmp_path / "run"
    changes, message = WRONG[where]
    config = tiny.config("pairs", **{k: v for k, v in changes.items() if k != "evals"})
    config.evals = changes.get("evals", {})
    if used != "new":
        folder.mkdir()
    if used == "killed before a checkpoint":  # of a config that could run
        (folder / "config.json").write_text(json.dumps(tiny.config("sft").to_dict()))
        (folder / watchdog.STARTS).write_text('{"step": 0, "starts": 1}')
    if used == "run":  # which goes on with this config
        there = json.dumps(config.to_dict())
        (folder / "config.json").write_text(there)
        (folder / "checkpoints" / "3").mkdir(parents=True)
        (folder / "checkpoints" / "3" / "damaged").write_text("")
        if not where.startswith(("build", "data")):  # the resume is refused before
            message = r"none of the checkpoints \[3\] .* reads back"
    with pytest.raises((ValueError, OSError), match=message) as caught:
        loop.train(config, str(folder))
    assert "not empty" not in str(caught.value)
    left = files(folder)
    if used == "run":
        assert left is not None
        assert json.loads(left["config.json"]) == json.loads(there)
        assert "checkpoints/3/damaged" in left
        assert watchdog.STARTS not in left
    elif where == "evaluation: no metric":  # found after a step, whose metrics stay
        assert left is not None and "metrics.jsonl" in left
    else:
        assert left is None, left


def test_a_folder_without_a_checkpoint_takes_another_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("sft").to_dict()))
    loop.train(tiny.config("pairs", num_steps=1), str(tmp_path))
    with pytest.raises(ValueError, match="another config"):
        loop.train(tiny.config("sft", num_steps=1), str(tmp_path))


def test_an_evaluation_owns_the_folder_of_its_metrics(tmp_path):
    changes = {"num_steps": 0, "eval_data": EVAL, "evals": {"perplexity": {}}}
    loop.train(tiny.config("pairs", **changes), str(tmp_path))
    with pytest.raises(ValueError, match="another config"):
        loop.train(tiny.config("pairs", **changes, seed=1), str(tmp_path))


def test_a_respond_run_that_fails_leaves_nothing(tmp_path):
    folder = tmp_path / "run"
    config = tiny.to_respond(tmp_path)
    config.generate.reward = {"name": f"{MINE}.failing_reward"}
    with pytest.raises((ValueError, OSError), match="the judge is away"):
        respond.respond(config, str(folder))
    assert files(folder) is None


def test_a_stage_names_one_before_it(tmp_path):
    first, second = tiny.config("sft"), tiny.config("pairs")
    config = tiny.common.get_config()
    for path, names in (("stage:secnd", r"\['first'\]"), ("stage:first", "")):
        second.model.path = path
        with config.unlocked():
            config.stages = {"first": first, "second": second}
        if names:
            with pytest.raises(ValueError, match=rf"stages\.second\.model\.path is '{path}'.*{names}"):  # fmt: skip
                loop.train(config, str(tmp_path / "run"))
        else:
            stages.check(config.stages)
    assert files(tmp_path / "run") is None


# -- Ctrl-C


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    return 0.0


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    changes = {"eval_every": 2, "evals": {"scripted": {"name": "tiny.scripted"}}, "eval_data": EVAL}  # fmt: skip
    before = signal.getsignal(signal.SIGINT)
    tiny.SCRIPT[:] = [interrupt, *[0.0] * 9]
    with pytest.raises(loop.Preempted, match=r"SIGINT at step 2: saved"):
        loop.train(tiny.config("pairs", **changes), str(tmp_path / "a"))
    assert signal.getsignal(signal.SIGINT) is before
    tiny.SCRIPT[:] = [0.0] * 9
    state = loop.train(tiny.config("pairs", **changes), str(tmp_path / "a"))
    whole = loop.train(tiny.config("pairs", **changes), str(tmp_path / "b"))
    assert int(checkpoint.checksum(state)) == int(checkpoint.checksum(whole))


def test_a_second_ctrl_c_stops_at_once():
    with preemption() as stop:
        assert not stop()
        interrupt()
        assert stop() and stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), watchdog.counted(str(tmp_path / "run"), 5):
        raise KeyboardInterrupt
    assert files(tmp_path / "run") is None


@pytest.mark.parametrize(
    "content", ["{}", '{"model_type": "llama", "num_hidden_layers": 2}']
)
def test_a_folder_that_is_not_of_a_run_is_refused_and_left_as_it_is(tmp_path, content):
    own = {"config.json": content, "base.json": "{}", "__init__.py": "", "notes.txt": "x",
           "events.out.tfevents.1.other": "e"}  # fmt: skip
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    for start in (
        lambda: loop.train(tiny.config("pairs", num_steps=1), str(tmp_path)),
        lambda: respond.respond(tiny.to_respond(tmp_path), str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"holds a config\.json that is no run's"):
            start()
    workdirs.release(str(tmp_path))
    found = {p.name: p.read_text() for p in tmp_path.iterdir() if p.name in own}
    assert found == own


def test_a_failed_start_leaves_the_files_of_its_folder(tmp_path):
    own = {"__init__.py": "", "py.typed": "", "events.out.tfevents.1.other": "e"}
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    config = tiny.config("pairs", num_steps=1)
    config.data = {
        "name": "jsonl",
        "path": str(tmp_path / "nowhere.jsonl"),
        "split": "train",
    }
    with pytest.raises(FileNotFoundError):
        loop.train(config, str(tmp_path))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == own


def test_a_base_beside_checkpoints_stays_without_a_config(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "base.json").write_text("{}")
    workdirs.release(str(tmp_path))
    assert (tmp_path / "base.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_ignored(number):
    old = signal.signal(number, signal.SIG_IGN)
    try:
        with preemption() as stop:
            os.kill(os.getpid(), number)
            assert not stop()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, old)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_DFL])
def test_a_second_ctrl_c_inside_a_reward_stops_at_once(
    signal_handlers, caplog, handler
):
    signal.signal(signal.SIGINT, handler)
    with preemption() as stop:
        with process.kept("my.reward"):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt), process.kept("my.reward"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "my.reward changes" not in caplog.text
