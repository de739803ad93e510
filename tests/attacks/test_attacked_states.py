"""A run that is killed at any file-system event goes on, and ends as if nothing had happened.

See `states`. `make attacks` visits every state of five runs and kills ten for real, which takes
most of an hour; `make test-training` every 16th state and two kills; `make test` some states of
the smallest run.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import states
import tiny
from ml_collections import ConfigDict

from alignax.respond import respond
from alignax.training import loop

pytestmark = pytest.mark.slow

ALL = os.environ.get("ALIGNAX_ATTACKS") == "all"
EVALUATED = {
    "eval_data": {"name": "synthetic", "split": "test", "kind": "pairs", "size": 8},
    "evals": {"ranking_accuracy": {}},
    "best_metric": "eval/ranking_accuracy/log_ratio_gap",
}  # fmt: skip


def dpo(root):
    """Evaluations, a best checkpoint, and old checkpoints that are deleted."""
    return tiny.config("pairs", **EVALUATED, **{
        "num_steps": 4, "checkpoint.every": 2, "checkpoint.keep": 1, "eval_every": 2,
        "checkpoint.asynchronous": True,
    })  # fmt: skip


def grpo(root):
    """Rollouts over two steps, which a checkpoint cuts; their samples are shown."""
    return tiny.config("sft", **{
        "num_steps": 4, "checkpoint.every": 1, "checkpoint.keep": 2, "length": 40,
        "loss": {"name": "policy_gradient"}, "lms": {"ref": "init"},
        "shaping": {"ctrl": {}, "kl": {"beta": 0.1}, "group_norm": {}},
        "rollout.reward": {"name": "constraints", "pattern": "[a-z]"},
        "rollout.max_new": 6, "rollout.batches": 2, "rollout.group": 2,
        "rollout.reference_samples": 4, "rollout.show": 1, "rollout.show_every": 1,
        "eval_data": {"name": "synthetic", "split": "test", "size": 4},
        "evals": {"sample": {"max_new": 4}}, "eval_every": 2, "eval_at_start": True,
    })  # fmt: skip


def cached(root):
    """The reference's log-probabilities are read from a file that the run writes."""
    return tiny.config("pairs", **{
        "num_steps": 3, "checkpoint.every": 2, "reference_cache": str(root / "cache"),
    })  # fmt: skip


def stages(root):
    """As the quickstart: a run that begins with the weights of the one before."""
    sft = tiny.config("sft", num_steps=2)
    after = tiny.config("pairs", **EVALUATED, num_steps=2)
    after.model.path = "stage:sft"
    return ConfigDict(
        {"stages": ConfigDict({"sft": sft, "dpo": after}, sort_keys=False)}
    )


def answers(root):
    """Prompts that are answered in three batches."""
    root.parent.mkdir(exist_ok=True)
    return tiny.to_respond(root.parent)


RUNS = {f.__name__: f for f in (dpo, grpo, cached, stages, answers)}


def runner(name, root):
    """() -> None, which starts a run, or goes on with it, in root/work."""
    program = respond.respond if name == "answers" else loop.train
    return lambda: program(RUNS[name](root), str(root / "work"))


def sweep(name, folder, every=1):
    """{(number, event): what differs} of the states of a run, and how many there are."""
    root = folder / "run"
    run = runner(name, root)
    found = states.record(run, root, folder / "copies")
    end = states.ending(root)
    lost = {}
    for state in found[::every]:
        try:
            differ = states.resume(run, root, state, end)
        except Exception as error:
            differ = [f"{type(error).__name__}: {error}"]
        if differ:
            lost[state.number, state.event] = differ
        print(f"{name} {state.number} {state.event}: {differ}", flush=True)
    print(f"{name}: {len(found)} states of {states.events()} events", flush=True)
    return lost, len(found)


def test_some_states_of_the_smallest_run(tmp_path):
    lost, many = sweep("cached", tmp_path, every=12)
    assert many > 40
    assert lost == {}


@pytest.mark.training
@pytest.mark.parametrize("name", RUNS)
def test_states_of_a_run(name, tmp_path):
    lost, many = sweep(name, tmp_path, every=1 if ALL else 16)
    assert many > 10
    assert lost == {}


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import states, test_attacked_states as runs
import pathlib
root = pathlib.Path({root!r})
def take(event):
    states._RECORDER.count += 1
    if states._RECORDER.count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
states._RECORDER.take = take
states.record(runs.runner("dpo", root), root, root.parent / "copies")
"""


@pytest.mark.training
def test_real_kills(tmp_path):
    """What a copy stands for: a process that is killed at that event."""
    root = tmp_path / "run"
    run = runner("dpo", root)
    states.record(run, root, tmp_path / "first")
    many = states.events()
    end = states.ending(root)
    for k in range(1, 11) if ALL else (3, 8):
        folder = tmp_path / f"kill{k}"
        folder.mkdir()
        at = k * many // 11
        code = KILLED.format(
            paths=[str(tiny.ROOT / "tests"), str(pathlib.Path(__file__).parent)],
            root=str(folder / "run"), at=at,
        )  # fmt: skip
        env = tiny.environment(XLA_FLAGS=os.environ["XLA_FLAGS"])
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == -9, result.stderr
        state = states.State(at, "a kill", folder / "run")
        assert states.resume(run, root, state, end) == [], at
