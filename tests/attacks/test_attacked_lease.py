"""One process per folder: who is refused, who takes over, and what is left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from alignax.respond import respond
from alignax.runs import lease, watchdog, workdirs
from alignax.training import loop

pytestmark = pytest.mark.slow

BEAT = 0.08


def other(folder, **changes):
    """The lease of a process of another host, which nobody here can look at."""
    folder.mkdir(exist_ok=True)
    content = {
        "host": "elsewhere",
        "process": 7,
        "uuid": "theirs",
        "beat": 1,
        **changes,
    }
    (folder / lease.NAME).write_text(json.dumps(content))
    return content


def left(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else None


def test_a_second_run_of_this_process_is_refused_at_once(tmp_path):
    with lease.Lease(str(tmp_path / "run"), BEAT) as first:
        for _ in range(2):  # the first refusal takes nothing away
            with pytest.raises(lease.Taken, match=rf"process {os.getpid()} on host .*/run"):  # fmt: skip
                lease.Lease(str(tmp_path / "run"), 60).__enter__()
        first.check()
    with lease.Lease(str(tmp_path / "run"), BEAT):
        pass
    assert left(tmp_path / "run") is None


@pytest.mark.parametrize("how", ["dead", "reused", "of an earlier run of this process"])
def test_a_lease_of_a_dead_process_is_taken_over_at_once(tmp_path, caplog, how):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    here = lease._identity(os.getpid())
    if how == "dead":
        here["process"] = process.pid
    elif how == "reused":
        here |= {"process": os.getppid(), "started": "1"}
    other(tmp_path, **here)
    start = time.monotonic()
    with lease.Lease(str(tmp_path), 60) as owner:
        assert time.monotonic() - start < 5
        owner.settle()
    assert f"process {here['process']} on host {here['host']} ended without" in caplog.text  # fmt: skip
    assert not left(tmp_path)


def test_a_lease_of_a_living_process_of_this_host_is_refused_at_once(tmp_path):
    here = lease._identity(os.getppid())
    other(tmp_path, **here)
    with pytest.raises(lease.Taken, match=rf"process {os.getppid()} on host"):
        lease.Lease(str(tmp_path), 60).__enter__()
    assert left(tmp_path) == [lease.NAME]


@pytest.mark.parametrize("content", ["", "[1]", '{"host": "elsew', b"\xff\xfe", "{}"])
def test_a_damaged_lease_is_waited_for_like_one_of_another_host(tmp_path, content):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / lease.NAME).write_bytes(data)
    start = time.monotonic()
    with lease.Lease(str(tmp_path), BEAT):
        assert (time.monotonic() - start >= 3 * BEAT) == bool(data)


def test_a_lease_that_does_not_beat_is_stale_by_the_clock_of_the_reader(
    tmp_path, caplog
):
    other(tmp_path, beat=10**9)
    start = time.monotonic()
    with lease.Lease(str(tmp_path), BEAT):
        assert time.monotonic() - start >= 3 * BEAT
    assert "process 7 on host elsewhere ended without" in caplog.text


def test_a_lease_that_beats_is_refused_by_name(tmp_path):
    other(tmp_path)
    timer = threading.Timer(BEAT, other, (tmp_path,), {"beat": 2})
    timer.start()
    with pytest.raises(lease.Taken, match="process 7 on host elsewhere writes to"):
        lease.Lease(str(tmp_path), BEAT).__enter__()
    timer.join()


def test_who_was_taken_over_stops_and_leaves_the_lease_of_the_other(tmp_path):
    with lease.Lease(str(tmp_path), BEAT) as owner:
        theirs = other(tmp_path)
        with pytest.raises(lease.Taken, match="taken over by process 7 on host elsew"):
            owner.check()
        time.sleep(2 * BEAT)  # its beats have ended too
        with pytest.raises(lease.Taken):
            owner.check(read=False)
    assert json.loads((tmp_path / lease.NAME).read_text()) == theirs


def test_of_two_that_start_at_once_one_goes_on(tmp_path):
    ends: list[str] = []
    together = threading.Barrier(2)
    read = lease._raw

    def both_see_nothing(folder):
        found = read(folder)
        if not found and len(ends) == 0 and together.n_waiting < 2:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(timeout=1)
        return found

    def run():
        try:
            with lease.Lease(str(tmp_path), BEAT) as owner:
                owner.settle()
                time.sleep(2 * lease.SETTLE)  # it is in use while the other looks
            ends.append("ran")
        except lease.Taken:
            ends.append("refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_raw", both_see_nothing)
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(ends) == ["ran", "refused"]
    assert not left(tmp_path)


def test_a_lease_beats_and_one_that_was_deleted_comes_back(tmp_path):
    with lease.Lease(str(tmp_path), BEAT) as owner:
        (tmp_path / lease.NAME).unlink()
        owner.check()
        first = json.loads((tmp_path / lease.NAME).read_text())["beat"]
        time.sleep(4 * BEAT)
        assert json.loads((tmp_path / lease.NAME).read_text())["beat"] > first


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"cannot write to workdir .*locked: Permission"):
        lease.Lease(str(tmp_path / "locked")).__enter__()


# -- runs


def test_an_error_of_the_config_leaves_no_folder_and_no_lease(tmp_path):
    config = tiny.config(num_steps=1, **{"optim.name": "nothing"})
    with pytest.raises(ValueError, match="nothing"):
        loop.train(config, str(tmp_path / "run"))
    assert left(tmp_path / "run") is None
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="nothing"):
        loop.train(config, str(tmp_path / "used"))
    assert left(tmp_path / "used") == ["notes.txt"]


def test_training_and_answering_are_refused_in_a_folder_that_is_in_use(tmp_path):
    config = tiny.to_respond(tmp_path)
    with lease.Lease(str(tmp_path / "run")):
        with pytest.raises(lease.Taken):
            loop.train(tiny.config(num_steps=1), str(tmp_path / "run"))
        with pytest.raises(lease.Taken):
            respond.respond(config, str(tmp_path / "run"))
        assert left(tmp_path / "run") == [lease.NAME]


def test_the_lease_is_read_before_a_checkpoint_and_given_back_at_sigterm(tmp_path):
    settings = {
        "evals": {"scripted": {"name": "tiny.scripted"}}, "eval_every": 1,
        "eval_data": {"name": "synthetic", "split": "test", "size": 8},
        "num_steps": 3,
    }  # fmt: skip
    folder = tmp_path / "run"

    def term():
        assert (folder / lease.NAME).exists()
        os.kill(os.getpid(), signal.SIGTERM)
        return 0.0

    tiny.SCRIPT[:] = [term]
    with pytest.raises(loop.Preempted):
        loop.train(tiny.config(**settings), str(folder))
    assert lease.NAME not in left(folder)

    tiny.SCRIPT[:] = [lambda: other(folder) and 0.0, 0.0]
    before = sorted((folder / "checkpoints").iterdir())
    with pytest.raises(lease.Taken):
        loop.train(tiny.config(**settings, **{"checkpoint.every": 2}), str(folder))
    assert sorted((folder / "checkpoints").iterdir()) == before


def test_who_lost_the_folder_leaves_what_is_in_it(tmp_path):
    workdirs.prepare(str(tmp_path), tiny.config("pairs", num_steps=2))
    with pytest.raises(lease.Taken), watchdog.Watchdog(str(tmp_path), 1.0):
        raise lease.Taken("another process writes there")
    assert (tmp_path / "config.json").exists()
    with pytest.raises(OSError, match="full"), watchdog.Watchdog(str(tmp_path), 1.0):
        raise OSError("full")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_a_damaged_lease_is_written_again(tmp_path, content):
    with lease.Lease(str(tmp_path), 60.0) as owner:
        (tmp_path / lease.NAME).write_bytes(content)
        owner.check()
        assert json.loads((tmp_path / lease.NAME).read_text())["process"] == os.getpid()


def test_an_error_of_a_bucket_does_not_end_the_beats(tmp_path, monkeypatch):
    calls, write = [], workdirs.write_json

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("503")
        return write(*args)

    monkeypatch.setattr(workdirs, "write_json", fails_once)
    with lease.Lease(str(tmp_path), 0.1):
        end = time.monotonic() + 20
        while len(calls) < 5 and time.monotonic() < end:
            time.sleep(0.05)
    assert len(calls) >= 5


def test_a_process_of_another_machine_of_the_same_name_is_waited_for(tmp_path):
    """Containers of two machines may have one host name, one namespace and one number."""
    here = lease._identity(os.getpid())
    assert here["boot"]
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    there = other(tmp_path, **{**here, "process": process.pid, "boot": "another"})
    start = time.monotonic()
    with lease.Lease(str(tmp_path), BEAT):
        assert time.monotonic() - start >= 3 * BEAT
    assert (
        lease._runs(there) is None
        and lease._runs({**there, "boot": here["boot"]}) is False
    )
