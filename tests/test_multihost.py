"""Several processes as one run, for real: they find each other, train, die and go on.

Two processes of two fake devices each, through the entry point; the oracle is the same
config on four devices of this process.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
import tiny

from alignax.models import sharding, transformer
from alignax.runs import checkpoint
from alignax.training import loop

pytestmark = pytest.mark.slow

SPY, HOLD = "ALIGNAX_TEST_SPY", "ALIGNAX_TEST_HOLD"
CONFIG = """
import multihost_spy
from test_multihost import {name}

def get_config(arg=""):
    return {name}()
"""
SPIES = f'''
"""Notes what a process feeds to its devices, and what its devices run."""

import itertools, json, os, pathlib, time
import jax
import numpy as np
from alignax.models import sharding

put, folder = sharding.put_batch, pathlib.Path(os.environ["{SPY}"])

met = itertools.count()

def put_batch(batch, mesh):
    index, hold = jax.process_index(), int(os.environ["{HOLD}"])
    if (now := next(met)) == hold:
        (folder / f"holds-{{index}}").touch()
    while now == hold and not (folder / "go").exists():
        time.sleep(0.05)
    with (folder / f"rows-{{index}}.jsonl").open("a") as file:
        real = np.asarray(batch.valid).any(1)  # filler fills up a last batch
        tokens = np.asarray(batch.tokens)
        file.write(json.dumps([tokens.tolist(), real.tolist()]) + "\\n")
    module = folder / f"module-{{jax.process_index()}}.json"
    texts = [m.to_string() for e in jax.devices()[0].client.live_executables()
             for m in e.hlo_modules() if m.name == "jit_update"]
    if texts:
        owners = [d.process_index for d in mesh.devices.flat]
        module.write_text(json.dumps({{"owners": owners, "text": texts[0]}}))
    return put(batch, mesh)

sharding.put_batch = put_batch
'''
EVERY = 3


def dpo():
    return tiny.config("pairs", **{
        "num_steps": 8, "mesh": (2, 2, 1), "checkpoint.every": EVERY, "average": 0.9,
        "checkpoint.keep": 10, "checkpoint.asynchronous": True, "optim.lr": 1e-3,
        "evals": {"ranking_accuracy": {}}, "batch_size": 8, "watchdog.minutes": 0.5,
        "eval_data": {"name": "synthetic", "split": "test", "size": 8},
    })  # fmt: skip


def ctrl():
    c = tiny.config("sft", **{
        "num_steps": 6, "mesh": (2, 2, 1), "length": 40, "buckets": (40,),
        "checkpoint.every": 1, "checkpoint.keep": 10, "optim.lr": 1e-3,
    })  # fmt: skip
    for key, value in {
        "reward": {"name": "test_multihost.weighed"}, "max_new": 4, "batches": 2,
        "group": 2, "reference_samples": 4,
    }.items():  # fmt: skip
        c.rollout[key] = value
    c.lms = {"ref": "init"}
    c.loss = {"name": "policy_gradient", "reduction": "constant"}
    c.shaping = {
        "ctrl": {"transform": "exp", "t": 10.0}, "kl": {"beta": 0.1}, "rloo": {}
    }  # fmt: skip
    return c


def weighed(batch, texts, lms) -> np.ndarray:
    """A number that differs between nearly all responses."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    at = np.arange(1, mask.shape[-1] + 1)
    return (np.where(mask, tokens, 0) * at).sum(-1) % 101.0


class Pair:
    """Two processes of one run; on leaving the context none is left over."""

    def __init__(self, folder, name, workdir, *flags, hold=-1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        folder.mkdir(exist_ok=True)
        (folder / "multihost_spy.py").write_text(SPIES)
        (folder / "config.py").write_text(CONFIG.format(name=name))
        self.folder, self.workdir = folder, workdir
        self.logs = [folder / f"log-{i}.txt" for i in range(2)]
        self.processes = []
        for i, log in enumerate(self.logs):
            env = tiny.environment(
                XLA_FLAGS=os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
                JAX_DISABLE_MOST_OPTIMIZATIONS="true",  # as in this process
                JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(i), **{SPY: str(folder), HOLD: str(hold)},
            )  # fmt: skip
            env["PYTHONPATH"] += f"{os.pathsep}{folder}"
            args = ["--config", folder / "config.py", "--workdir", workdir]
            mine = [f(i) if callable(f) else f for f in flags]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        tiny.command(*args, "--distributed", *mine), cwd=tiny.ROOT,
                        env=env, stdout=file, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def said(self):
        return [log.read_text(errors="replace") for log in self.logs]

    def until(self, true, seconds=300):
        end = time.monotonic() + seconds
        while not true():
            assert all(p.poll() is None for p in self.processes), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def wait(self, seconds=300):
        return [p.wait(timeout=seconds) for p in self.processes]

    def held(self):
        """Waits until both stand before their batch number `hold`."""
        self.until(lambda: all((self.folder / f"holds-{i}").exists() for i in range(2)))

    def rows(self):
        """[process][step] -> (tokens [B/2, G, T] fed to its devices, which are real)."""
        files = [self.folder / f"rows-{i}.jsonl" for i in range(2)]
        return [
            [tuple(map(np.array, json.loads(x))) for x in file.read_text().splitlines()]
            for file in files
        ]

    def module(self):
        found = json.loads((self.folder / "module-0.json").read_text())
        return found["owners"], found["text"]


def lines(workdir):
    """The complete lines of metrics.jsonl: the run may be writing the last one."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


# The clock decides on some, and what is padding is said of process 0's rows.
LOCAL = r"tokens_per_second|padding|useful|sampling|judging|scoring|updating"


def metrics(workdir):
    """{(step, name): value} of what does not depend on the clock or the process."""
    return {
        (int(row["step"]), k): float(v)
        for row in lines(workdir)
        for k, v in row.items()
        if k != "step" and not re.search(LOCAL, k)
    }


def steps(workdir):
    return [row["step"] for row in lines(workdir) if "train/loss" in row]


def checkpoints(workdir):
    found = (workdir / "checkpoints").glob("*/commit_success.txt")
    return sorted(int(path.parent.name) for path in found)


def size(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def close(a, b):
    """Of float32 after some optimiser steps: sums over devices have another order."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-5), key


def recorded(config, workdir, monkeypatch):
    """Trains in this process; the rows of every step."""
    met, put = [], sharding.put_batch
    with monkeypatch.context() as m:
        m.setattr(
            sharding,
            "put_batch",
            lambda batch, mesh: (
                met.append(np.asarray(batch.tokens)) or put(batch, mesh)
            ),
        )
        state = loop.train(config, str(workdir))
    return state, met


# -- DPO: killed, started again


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The config on four devices of one process: (state, rows, workdir)."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        state, met = recorded(dpo(), workdir, monkeypatch)
    return state, met, workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two processes of which the first is killed: (exit codes, metrics then, Pair)."""
    folder = tmp_path_factory.mktemp("killed")
    workdir = folder / "run"
    with Pair(folder / "spy", "dpo", workdir, hold=EVERY + 2) as pair:
        pair.held()
        pair.until(lambda: EVERY in checkpoints(workdir))
        pair.processes[0].send_signal(signal.SIGKILL)
        codes = pair.wait(60)
        return codes, metrics(workdir), pair


@pytest.fixture(scope="module")
def again(killed, tmp_path_factory):
    """The same command after that, run to its end: its Pair."""
    folder = tmp_path_factory.mktemp("again")
    _, _, before = killed
    with Pair(folder / "spy", "dpo", before.workdir) as pair:
        codes = pair.wait()
        assert codes == [0, 0], pair.said()
        return pair


def test_a_process_does_not_outlive_the_one_that_was_killed(killed):
    (first, second), _, pair = killed
    assert first == -signal.SIGKILL
    assert second not in (0, os.EX_TEMPFAIL), pair.said()[1]


def test_each_process_reads_rows_of_its_own(alone, killed):
    _, met, _ = alone
    _, _, pair = killed
    first, second = pair.rows()
    assert len(first) == len(second) == EVERY + 2
    full = 0
    for whole, *parts in zip(met, first, second, strict=False):
        tokens, real = zip(*parts, strict=True)
        np.testing.assert_array_equal(np.concatenate(tokens), whole)
        texts = [
            {row.tobytes() for row in part[some]}
            for part, some in zip(tokens, real, strict=True)
        ]
        assert not texts[0] & texts[1]
        full += all(texts)
    assert full >= EVERY  # the last batch of an epoch may be a small one


def test_the_program_adds_gradients_across_processes(alone, killed):
    owners, text = killed[2].module()
    assert sorted(owners) == [0, 0, 1, 1]
    summed = 0  # numbers added over both processes
    for line in text.splitlines():
        found = re.search(
            r" = (.*?) all-reduce(?:-start)?\(.*?replica_groups=(.*)", line
        )
        if found and any(len({owners[i] for i in g}) > 1 for g in groups(found[2])):
            shapes = re.findall(r"f32\[([\d,]*)\]", found[1])
            summed += sum(
                math.prod(int(n) for n in shape.split(",") if n) for shape in shapes
            )
    assert summed >= transformer.num_params(alone[0].params) / 4  # fsdp x data


def groups(text):
    """Who adds with whom, as XLA may write it: lists, or axes of an array of places."""
    if text.startswith("{{"):
        listed = re.findall(r"\{([\d,]+)\}", text.split("}}")[0] + "}")
        return [[int(i) for i in group.split(",")] for group in listed]
    if text.startswith("["):  # [2,2]<=[4] or [2,2]<=[2,2]T(1,0): a group a row
        shape, order = re.match(
            r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text
        ).groups()
        return places(order).reshape([int(n) for n in shape.split(",")]).tolist()
    # mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}: over the named axes
    sizes = re.findall(r"'(\w+)'=(\d+)", text.split("]")[0])
    order = re.search(
        r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", text.split("{")[0]
    )
    over = re.findall(r"'(\w+)'", text.split("{")[1].split("}")[0])
    shape = [int(n) for _, n in sizes]
    mesh = places(order[1] if order else f"[{math.prod(shape)}]").reshape(shape)
    axes = [i for i, (name, _) in enumerate(sizes) if name in over]
    rest = [i for i in range(len(shape)) if i not in axes]
    many = math.prod(shape[i] for i in axes)
    return mesh.transpose([*rest, *axes]).reshape(-1, many).tolist()


def places(text):
    """'[2,2]T(1,0)': the numbers from 0 in that shape, its axes in that order."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(n) for n in shape.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes)


def test_groups_of_a_collective_are_read_as_xla_writes_them():
    pairs = [[0, 2], [1, 3]]
    assert groups("{{0,2},{1,3}}, use_global") == pairs
    assert groups("[2,2]<=[2,2]T(1,0), use_global") == pairs
    assert groups("[2,2]<=[4], use_global") == [[0, 1], [2, 3]]
    assert groups("mesh['a'=2,'b'=2] {'a'}, use") == pairs
    assert groups("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'c'}, u") == pairs
    assert groups("mesh['a'=4,'b'=1] {'a'}, use") == [[0, 1, 2, 3]]


def test_two_processes_train_as_one_does_though_one_was_killed(alone, again):
    state, _, workdir = alone
    close(metrics(again.workdir), metrics(workdir))
    ours = checkpoint.load_lm(again.workdir).params  # on one device of one process
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(state.params), strict=True):
        # Adam divides by the gradient's own size: its rounding is not small where it is.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


def test_a_restart_is_exact(killed, again):
    """What the killed run had logged past its checkpoint is computed again, to the bit."""
    _, before, first = killed
    after = metrics(again.workdir)
    assert f"resumed at step {EVERY} of" in again.said()[0]
    assert max(step for step, _ in before) == EVERY + 1
    assert {k: after[k] for k in before} == before
    for process in range(2):
        old, new = first.rows()[process], again.rows()[process]
        np.testing.assert_array_equal(old[EVERY][0], new[0][0])
    assert steps(again.workdir) == list(range(1, dpo().num_steps + 1))


def test_a_checkpoint_is_written_once(alone, again):
    """Not once a process: as many bytes as that of one process, and one set of files."""
    last = f"checkpoints/{dpo().num_steps}"
    assert size(again.workdir / last) < 1.2 * size(alone[2] / last)
    names = [p.name for p in again.workdir.iterdir()]
    assert sum("tfevents" in name for name in names) == 2  # one a start
    assert not [name for name in names if name.startswith(".seen")]


def test_another_mesh_and_another_number_of_processes_read_it(again, alone, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(again.workdir, workdir)
    for step in checkpoints(workdir):
        if step > EVERY:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    config = dpo()
    config.mesh = (1, 2, 2)
    loop.train(config, str(workdir))
    close(metrics(workdir), metrics(alone[2]))


# -- CTRL: begun by one process, continued by two, ended by one


@pytest.mark.training
def test_ctrl_goes_on_in_two_processes_and_in_one_again(tmp_path, monkeypatch):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    _, met = recorded(ctrl(), whole, monkeypatch)
    shutil.copytree(whole, workdir)
    for step in checkpoints(workdir)[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    (workdir / "reference_rewards.npz").unlink()  # two processes sample them anew
    (workdir / "metrics.jsonl").unlink()  # so that what they write is seen

    with Pair(tmp_path / "spy", "ctrl", workdir, hold=2) as pair:
        pair.held()
        pair.processes[1].send_signal(signal.SIGTERM)  # one of them is enough
        pair.until(lambda: "SIGTERM caught" in pair.said()[1])
        time.sleep(3)  # jax looks once a second, then its threads agree on a step
        (pair.folder / "go").touch()
        codes = pair.wait()
        assert codes == [os.EX_TEMPFAIL] * 2, pair.said()
        stopped = [
            int(re.search(r"SIGTERM at step (\d+): saved", text).group(1))
            for text in pair.said()
        ]
    assert stopped[0] == stopped[1] == max(checkpoints(workdir))
    assert 4 <= stopped[0] < ctrl().num_steps
    first, second = pair.rows()
    assert len(first) == len(second) == stopped[0] - 1
    for k, parts in enumerate(zip(first, second, strict=True)):
        tokens = np.concatenate([part for part, _ in parts])
        np.testing.assert_array_equal(tokens, met[k + 1])

    loop.train(ctrl(), str(workdir))
    once = metrics(whole)
    close(metrics(workdir), {k: once[k] for k in once if k[0] > 1})


# -- what differs


def test_hosts_with_another_config_do_not_start(tmp_path):
    rate = lambda i: f"--config.optim.lr={i + 1}e-3"  # noqa: E731
    with Pair(tmp_path / "spy", "dpo", tmp_path / "run", rate) as pair:
        assert pair.wait() == [1, 1], pair.said()
        name = socket.gethostname()
        for text in pair.said():
            assert re.search(
                rf"error: the hosts differ: config is \w+ on {name} \(process 0\) and \w+ on "
                rf"{name} \(process 1\)",
                text,
            ), text
            assert "Traceback" not in text
    assert not (tmp_path / "run" / "config.json").exists()
