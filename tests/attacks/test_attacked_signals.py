"""SIGTERM and Ctrl-C inside rollouts and evaluations: heard soon, and nothing is lost."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
import states
import tiny

from alignax.runs import preemption
from alignax.runs.preemption import Preempted
from alignax.training import evaluation, loop

pytestmark = pytest.mark.slow

AT: list = []  # the call of the reward at which a signal comes, and which one
CALLS: list = []


def codes(batch, texts, lms) -> np.ndarray:
    """A number that differs between nearly all responses; a signal comes in some call."""
    CALLS.append(len(texts))
    if AT and len(CALLS) == AT[0]:
        os.kill(os.getpid(), AT[1])
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    at = np.arange(1, mask.shape[-1] + 1)
    return (np.where(mask, tokens, 0) * at).sum(-1) % 101.0


def config(**changes):
    c = tiny.config("sft", length=24, num_steps=6)
    c.truncate_prompts, c.plots = "left", False
    c.rollout.reward = {"name": f"{__name__}.codes"}
    c.rollout.max_new, c.rollout.batches = 6, 3
    c.loss, c.shaping = {"name": "policy_gradient"}, {"rloo": {}}
    c.rollout.show, c.checkpoint.keep = 0, 1
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def run(folder, at=(), **changes):
    CALLS[:], AT[:] = [], at
    return loop.train(config(**changes), str(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return states.ending(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call", [1, 4, 5])
def test_a_rollout_is_dropped_and_made_again(tmp_path, whole, call, number):
    """Three calls make a rollout, and three steps are on it."""
    with pytest.raises(Preempted) as stopped:
        run(tmp_path, (call, number))
    assert len(CALLS) == call  # the rest of the rollout was not made
    name = signal.Signals(number).name
    done = "step 0: nothing to save" if call == 1 else "step 3: saved"
    assert str(stopped.value).startswith(f"{name} at {done}")
    state = run(tmp_path)
    assert int(state.step) == 6
    assert len(CALLS) == (6 if call == 1 else 3)
    assert states.ending(tmp_path) == whole


def test_an_evaluation_is_dropped_and_made_when_the_run_goes_on(tmp_path):
    changes = {
        "evals": {"win_rate": {"reward": {"name": f"{__name__}.codes"}, "max_new": 4}},
        "eval_data": tiny.config().data, "eval_every": 3, "eval_batch_size": 2,
        "lms": {"ref": "init"}, "rollout.batches": 1,
    }  # fmt: skip
    run(tmp_path / "whole", **changes)
    every, want = len(CALLS), states.ending(tmp_path / "whole")
    assert every > 6 + 2
    with pytest.raises(Preempted, match=r"SIGTERM at step 3: saved"):
        run(tmp_path / "run", (4, signal.SIGTERM), **changes)
    assert len(CALLS) == 4
    run(tmp_path / "run", **changes)
    assert states.ending(tmp_path / "run") == want


def test_a_last_evaluation_is_dropped_too(tmp_path, monkeypatch):
    def evaluate(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        preemption.drop_if_asked()
        raise AssertionError("it went on")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", evaluate)
        with pytest.raises(Preempted, match=r"SIGTERM in an evaluation"):
            run(tmp_path)
    assert int(run(tmp_path).step) == 6
    assert not CALLS  # only the evaluation was left


def test_without_a_run_nothing_is_dropped():
    preemption.drop_if_asked()
    with preemption.preemption() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        preemption.drop_if_asked()  # whoever opened it looks itself
    with preemption.preemption(drops=True):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(preemption.Interrupted, match="SIGTERM"):
            preemption.drop_if_asked()
    preemption.drop_if_asked()


COMPILES = """
import hashlib, pathlib
import tiny
from alignax.losses import dpo

NEEDS = dpo.NEEDS
HERE = pathlib.Path(__file__).parent

def loss(policy, batch, *, beta=0.1):
    if not (HERE / "quick").exists():
        (HERE / "compiling").touch()
        # minutes without Python, which runs no handler meanwhile, as in a compiler
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    return dpo.loss(policy, batch, beta=beta)

def get_config():
    return tiny.config("pairs", **{"loss.name": "compiles.loss", "num_steps": 2})
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_the_first_step_compiles(tmp_path, number):
    (tmp_path / "compiles.py").write_text(COMPILES)
    command = tiny.command(
        "--config", tmp_path / "compiles.py", "--workdir", tmp_path / "run"
    )
    path = os.pathsep.join([str(tmp_path), str(tiny.ROOT), str(tiny.ROOT / "tests")])
    env = tiny.environment(PYTHONPATH=path)
    start = {"cwd": tiny.ROOT, "env": env, "text": True, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **start) as process:
        try:
            for _ in range(900):
                if (tmp_path / "compiling").exists():
                    break
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            sent = time.monotonic()
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == os.EX_TEMPFAIL, said
    assert time.monotonic() - sent < 30
    name = signal.Signals(number).name
    assert f"{name}: nothing to save; the same command goes on" in said
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert not left & {"owner.json", "starts.json"}  # it is free, and counted no start
    (tmp_path / "quick").touch()
    done = subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_callers_process_is_never_ended(monkeypatch):
    """Of a notebook, say: its own clean-up runs, however long that takes."""
    monkeypatch.setattr(preemption, "PATIENCE", 0.05)
    ended = []
    monkeypatch.setattr(preemption.os, "_exit", ended.append)
    with preemption.preemption(leave=lambda: ended.append("left")) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
    assert stop() and not ended
    monkeypatch.setattr(preemption, "of_program", True)
    with preemption.preemption(leave=lambda: ended.append("left")) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # the handler has run: the main thread goes on by itself
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop() and not ended
