"""Real processes that are stopped in the middle, and go on as if nothing had happened."""

import json
import os
import random
import re
import signal
import subprocess
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

pytestmark = pytest.mark.slow

NUM_STEPS, EVERY = 12, 3
CONFIG = f"""
import tiny

def get_config(arg=""):
    return tiny.config("pairs", **{{
        "num_steps": {NUM_STEPS}, "checkpoint.every": {EVERY}, "checkpoint.keep": 2,
        "checkpoint.asynchronous": True, "loss.name": "tiny.slow_dpo", "average": 0.9,
        "eval_every": 2, "evals": {{"ranking_accuracy": {{}}}},
        "eval_data": {{"name": "synthetic", "split": "test", "size": 8}},
        "best_metric": "eval/ranking_accuracy/log_ratio_gap",
    }})
"""


def arguments(tmp_path, workdir):
    config = tmp_path / "stopped.py"
    config.write_text(CONFIG)
    return ["--config", config, "--workdir", workdir]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    result = tiny.main(*arguments(folder, folder / "run"))
    assert result.returncode == 0, result.stderr
    return folder / "run"


def rows(workdir):
    """The complete lines of metrics.jsonl: the run may be writing the last one."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def steps(workdir):
    return [row["step"] for row in rows(workdir) if "train/loss" in row]


def checkpoints(workdir):
    found = (workdir / "checkpoints").glob("*/commit_success.txt")
    return [int(path.parent.name) for path in found]


def interrupt(args, workdir, at, number, pause="0.3"):
    """Starts a run and sends a signal once `at` steps and a checkpoint are on disk."""
    env = tiny.environment(**{tiny.PAUSE: pause})
    process = subprocess.Popen(
        tiny.command(*args), cwd=tiny.ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while max(steps(workdir), default=0) < at or not checkpoints(workdir):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run makes no steps"
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def arrays(workdir, step=NUM_STEPS):
    """Every array of a checkpoint, as bytes: parameters, optimiser state, average."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(), rest=ocp.args.StandardRestore()
        )
        got = manager.restore(step, args=items)
    flat = {}

    def walk(tree, path=""):
        if isinstance(tree, dict | list | tuple):
            pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
            for key, value in pairs:
                walk(value, f"{path}/{key}")
        elif tree is not None:
            flat[path] = np.asarray(tree).tobytes()

    walk({"params": got.params, "rest": got.rest})
    return flat


def assert_same_end(workdir, whole):
    a, b = arrays(workdir), arrays(whole)
    assert len(a) > 20
    assert {k for k in {*a, *b} if a.get(k) != b.get(k)} == set()

    def told(folder):  # what does not depend on the clock
        fast = "train/tokens_per_second"
        return [{k: v for k, v in r.items() if k != fast} for r in rows(folder)]

    assert told(workdir) == told(whole)


def test_a_killed_run_resumes_and_ends_bit_identical(whole, tmp_path):
    workdir, at = tmp_path / "run", random.randint(EVERY, NUM_STEPS - 3)
    args = arguments(tmp_path, workdir)
    code, output = interrupt(args, workdir, at, signal.SIGKILL)
    assert code == -signal.SIGKILL, (at, output)
    last = max(checkpoints(workdir))
    assert 0 < last < NUM_STEPS, (at, last)

    again = tiny.main(*args)
    assert again.returncode == 0, again.stderr
    resumed = int(re.search(r"resumed at step (\d+) of", again.stdout).group(1))
    assert resumed == last
    # The first progress line is that of the first step made.
    assert re.search(r"^run (\d+)/", again.stderr, re.M).group(1) == str(resumed + 1)
    assert steps(workdir) == list(range(1, NUM_STEPS + 1))
    assert_same_end(workdir, whole)


def test_sigterm_saves_exits_with_tempfail_and_goes_on(whole, tmp_path):
    workdir = tmp_path / "run"
    args = arguments(tmp_path, workdir)
    code, output = interrupt(args, workdir, EVERY + 1, signal.SIGTERM)
    assert code == os.EX_TEMPFAIL, output
    assert "Traceback" not in output
    stopped = int(re.search(r"SIGTERM at step (\d+): saved", output).group(1))
    assert EVERY < stopped < NUM_STEPS
    assert max(checkpoints(workdir)) == stopped  # its own step, not the last round one
    assert steps(workdir) == list(range(1, stopped + 1))

    again = tiny.main(*args)
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {stopped} of {NUM_STEPS}" in again.stdout
    assert steps(workdir) == list(range(1, NUM_STEPS + 1))
    assert_same_end(workdir, whole)
