"""Checkpoints: none is written twice, none is lost, and the best one is the best one."""

import json
import math
import os
import shutil
import signal

import pytest
import tiny

from alignax.reports.metrics import Writer, read
from alignax.runs import checkpoint, workdirs
from alignax.runs.checkpoint import CheckpointError
from alignax.training import loop

pytestmark = pytest.mark.slow

SETTINGS = {
    "num_steps": 4, "checkpoint.every": 2, "eval_every": 2, "best_metric": "eval/scripted/value",
    "evals": {"scripted": {"name": "tiny.scripted"}},
    "eval_data": {"name": "synthetic", "split": "test", "size": 8},
}  # fmt: skip


class Killed(BaseException):
    """What ends a run here, as a kill would: nothing of the loop handles it."""


def kill():
    raise Killed


def killed(config, folder):
    with pytest.raises(Killed):
        loop.train(config, str(folder))


def evaluations(folder):
    rows = [(int(r["step"]), r.get("eval/scripted/value")) for r in read(folder)]
    return [(step, value) for step, value in rows if value is not None]


def steps(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def inodes(folder):
    """The files of a checkpoint: another inode is another file."""
    return {str(p): p.stat().st_ino for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("last, best", [(3.0, 4), (1.0, 2)])
def test_a_kill_in_the_last_evaluation_loses_nothing(tmp_path, last, best):
    config = tiny.config(**SETTINGS)
    tiny.SCRIPT[:] = [2.0, kill]
    killed(config, tmp_path)
    before = inodes(tmp_path / "checkpoints/4")
    assert before
    tiny.SCRIPT[:] = [last]
    loop.train(config, str(tmp_path))
    assert inodes(tmp_path / "checkpoints/4") == before
    assert evaluations(tmp_path) == [(2, 2.0), (4, last)]
    assert steps(tmp_path / "best") == [best]
    loop.train(config, str(tmp_path))  # the script is empty: nothing is evaluated
    assert evaluations(tmp_path) == [(2, 2.0), (4, last)]


def test_what_the_last_evaluation_finds_writes_no_checkpoint_again(tmp_path):
    before = {}

    def look():
        before.update(inodes(tmp_path / "checkpoints/4"))
        return 3.0

    tiny.SCRIPT[:] = [2.0, look]
    loop.train(tiny.config(**SETTINGS), str(tmp_path))
    assert inodes(tmp_path / "checkpoints/4") == before != {}
    assert steps(tmp_path / "best") == [4]


def test_a_kill_after_the_last_line_repeats_the_evaluation(tmp_path, monkeypatch):
    config = tiny.config(**SETTINGS)
    tiny.SCRIPT[:] = [2.0, 3.0]
    with monkeypatch.context() as patch:
        honest = Writer.write

        def write(self, step, metrics):
            honest(self, step, metrics)
            if step == 4 and "eval/scripted/value" in metrics:
                raise Killed

        patch.setattr(Writer, "write", write)
        killed(config, tmp_path)
    assert evaluations(tmp_path)[-1] == (4, 3.0)
    assert steps(tmp_path / "best") == [2]
    tiny.SCRIPT[:] = [3.0]
    loop.train(config, str(tmp_path))
    assert evaluations(tmp_path) == [(2, 2.0), (4, 3.0)]
    assert steps(tmp_path / "best") == [4]


@pytest.mark.parametrize("first", [math.nan, -math.inf])
def test_a_first_evaluation_without_a_number_is_not_the_best(tmp_path, first):
    tiny.SCRIPT[:] = [first, 1.0]
    loop.train(tiny.config(**SETTINGS), str(tmp_path))
    assert steps(tmp_path / "best") == [4]


def test_a_best_of_nothing_is_forgotten_by_a_run_of_an_earlier_version():
    noted = loop.Best(math.nan, 2, 0)
    assert loop.better(1.0, noted, "max")
    assert loop.better(1.0, noted, "min")
    assert not loop.better(math.nan, loop.Best(), "max")


def test_sigterm_at_an_evaluation_leaves_it_to_the_next_start(tmp_path, monkeypatch):
    config = tiny.config(**SETTINGS)
    honest = loop.schedule

    def schedule(session, now, at):
        if at == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(session, now, at)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "schedule", schedule)
        with pytest.raises(loop.Preempted):
            loop.train(config, str(tmp_path))
    assert evaluations(tmp_path) == []
    tiny.SCRIPT[:] = [2.0, 1.0]
    loop.train(config, str(tmp_path))
    assert evaluations(tmp_path) == [(2, 2.0), (4, 1.0)]
    assert steps(tmp_path / "best") == [2]


def test_the_best_is_there_before_a_checkpoint_names_it(tmp_path, monkeypatch):
    """Both are saved asynchronously: the later one must not be committed first."""
    seen = []
    honest = checkpoint.save

    def save(manager, state, **kwargs):
        if manager.directory.name == "checkpoints":
            best = tmp_path / "best"
            named = kwargs["meta"]["best"]["step"]
            seen.append(named in steps(best))
        honest(manager, state, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    tiny.SCRIPT[:] = [1.0, 2.0, 3.0, 4.0]
    config = tiny.config(**SETTINGS | {"num_steps": 6, "checkpoint.asynchronous": True})
    loop.train(config, str(tmp_path))
    assert seen[:2] == [True, True]


# -- versions


@pytest.fixture(scope="module")
def run_of_one_step(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    loop.train(tiny.config(num_steps=1), str(folder))
    return folder


@pytest.fixture
def finished(run_of_one_step, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_of_one_step, folder)
    return tiny.config(num_steps=1), folder


def edit_meta(folder, change):
    """Rewrites the JSON of every checkpoint there."""
    for path in folder.glob("checkpoints/*/meta/metadata"):
        meta = json.loads(path.read_text())
        change(meta)
        path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["written_by"].update(format=99, alignax="9.9"),
        lambda m: (m["model"].update(moe=4), m["written_by"].update(alignax="9.9")),
    ],
    ids=["format", "field"],
)
def test_a_checkpoint_of_a_newer_version_is_no_damaged_one(finished, change):
    config, folder = finished
    edit_meta(folder, change)
    for read_it in (lambda: loop.train(config, str(folder)), lambda: checkpoint.load_lm(folder)):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"alignax 9\.9 .* this is alignax 0"):
            read_it()
    assert steps(folder / "checkpoints") == [1]


def test_a_checkpoint_of_an_earlier_version_is_read(finished):
    config, folder = finished
    (folder / workdirs.END).unlink()
    edit_meta(folder, lambda m: [m.pop(k) for k in ("written_by", "lines")])
    assert int(loop.train(config, str(folder)).step) == 1
    assert checkpoint.load_lm(folder).params
