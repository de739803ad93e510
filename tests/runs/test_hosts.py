"""What several hosts have to agree on; each of them is played by a thread."""

import json
import logging
import pathlib
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
import tiny

from alignax.runs import hosts, watchdog
from alignax.training import loop


class Store:
    """The coordinator's key-value store."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values, key
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(
                lambda: key in self.values, milliseconds / 1000
            ):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]


@pytest.fixture
def together(monkeypatch):
    """together(f, n) -> what f(i) returned or raised in each of n threads."""
    place = threading.local()

    def one(function, count, i):
        place.size, place.asked = (count, i), iter(range(99))
        try:
            return function(i)
        except Exception as error:
            return error

    class Asked:
        def __next__(self):
            return next(place.asked)

    monkeypatch.setattr(hosts, "_size", lambda: place.size)
    monkeypatch.setattr(hosts, "_asked", Asked())
    monkeypatch.setattr(hosts.jax, "process_index", lambda: place.size[1])

    def run(function, count=2):
        monkeypatch.setattr(hosts.distributed.global_state, "client", Store())
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda i: one(function, count, i), range(count)))

    return run


def test_every_process_hears_all_in_their_order(together):
    said = together(lambda i: hosts.exchange({"i": i}), 3)
    assert said == [[{"i": 0}, {"i": 1}, {"i": 2}]] * 3


def test_who_says_nothing_is_named(together):
    said = together(lambda i: i == 1 or hosts.exchange(i, timeout=0.2))
    assert isinstance(said[0], OSError)
    assert str(said[0]) == "process 1 did not report within 0.2 s"


def test_one_process_agrees_with_itself(tmp_path):
    assert hosts.exchange("alone") == ["alone"]
    hosts.check(tiny.config(), str(tmp_path / "run"))
    hosts.meet("here")
    assert list((tmp_path / "run").iterdir()) == []


def checked(together, monkeypatch, tmp_path, **facts):
    """`hosts.check` of two hosts, of which the second has other facts."""
    same = dict.fromkeys(("jax", "commit", "code", "config"), "x")
    said = [same, same | facts]
    monkeypatch.setattr(
        hosts.socket, "gethostname", lambda: ("one", "two")[hosts._size()[1]]
    )

    def check(i):
        monkeypatch.setattr(hosts, "facts", lambda _: said[hosts._size()[1]])
        hosts.check(None, str(tmp_path / "run"))

    return together(check)


@pytest.mark.parametrize("key", ["jax", "commit", "code", "config"])
def test_what_differs_is_named_with_both_hosts(together, monkeypatch, tmp_path, key):
    for error in checked(together, monkeypatch, tmp_path, **{key: "y"}):
        assert isinstance(error, ValueError)
        assert str(error) == (
            f"the hosts differ: {key} is x on one (process 0) and y on two (process 1)"
        )


def test_a_commit_that_one_host_does_not_know_is_not_compared(
    together, monkeypatch, tmp_path
):
    """A copied tree has no repository; its code is compared in any case."""
    assert checked(together, monkeypatch, tmp_path, commit="") == [None, None]


def test_hosts_with_other_devices_are_named(together, monkeypatch, tmp_path):
    counts = {0: 4, 1: 3}
    monkeypatch.setattr(
        hosts.jax, "local_device_count", lambda: counts[hosts._size()[1]]
    )
    for error in checked(together, monkeypatch, tmp_path):
        assert "local devices is 4 x cpu on one" in str(error)
        assert "and 3 x cpu on two" in str(error)


def test_facts_are_those_of_this_process(tmp_path):
    config = tiny.config()
    found = hosts.facts(config)
    assert found["jax"] == jax.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert hosts.facts(tiny.config())["config"] == found["config"]
    assert hosts.facts(tiny.config(seed=1))["config"] != found["config"]


def test_a_changed_line_of_code_is_seen(tmp_path):
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "dpo.py").write_text("a = 1\n")
    before = hosts.digest(tmp_path)
    (tmp_path / "losses" / "dpo.py").write_text("a = 2\n")
    changed = hosts.digest(tmp_path)
    (tmp_path / "losses" / "dpo.py").rename(tmp_path / "losses" / "ipo.py")
    assert len({before, changed, hosts.digest(tmp_path)}) == 3


def test_the_commit_is_git_s_or_that_of_the_file_beside_a_copy(tmp_path):
    assert hosts.commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    said = subprocess.run([*git, "log", "--format=%H"], capture_output=True, text=True)
    assert hosts.commit(tmp_path) == said.stdout.strip() != ""
    (tmp_path / "COMMIT").write_text("abc\n")
    assert hosts.commit(tmp_path) == "abc"


# -- one host that fails


def test_what_fails_on_one_host_is_raised_on_all(together, monkeypatch, tmp_path):
    def facts(_):
        if hosts._size()[1] == 1:
            raise PermissionError(13, "denied", "/etc/x")
        return {}

    monkeypatch.setattr(hosts, "facts", facts)
    for error in together(lambda _: hosts.check(None, str(tmp_path / "run")), 3):
        assert type(error) is OSError
        assert str(error) == (
            f"{socket.gethostname()} (process 1): PermissionError: [Errno 13] denied: "
            "'/etc/x'"
        )
    assert list((tmp_path / "run").iterdir()) == []  # nothing is left behind


def shared(together, monkeypatch, *folders, patience=20.0):
    """`hosts.check` of alike hosts, each of which has a folder of its own as workdir."""
    monkeypatch.setattr(hosts, "facts", lambda _: {})
    return together(
        lambda i: hosts.check(None, str(folders[i]), patience), len(folders)
    )


def test_a_workdir_that_one_host_does_not_see(together, monkeypatch, tmp_path):
    """Each has a folder of its own under one name, as /tmp is."""
    folders = tmp_path / "0", tmp_path / "1"
    for error in shared(together, monkeypatch, *folders, patience=0.3):
        assert type(error) is OSError
        assert f"(process 1): OSError: workdir {tmp_path / '1'}: what" in str(error)
    assert list((tmp_path / "0").iterdir()) == []


def test_a_file_that_is_seen_late_is_seen(together, monkeypatch, tmp_path):
    """A network file system may take its time to show what another host wrote."""
    late = tmp_path / "late"
    threading.Timer(0.6, lambda: late.symlink_to(tmp_path / "run")).start()
    said = shared(together, monkeypatch, tmp_path / "run", late)
    assert said == [None, None]


def test_a_workdir_that_cannot_be_written_stops_all(together, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for error in shared(together, monkeypatch, *[tmp_path / "file" / "run"] * 2):
        assert type(error) is OSError
        assert "(process 0): NotADirectoryError: " in str(error)


def test_a_bucket_without_its_package_stops_all(together, monkeypatch):
    """What the file system raises need be no OSError."""

    def absolute(_):
        def mkdir(**_):
            raise ImportError("Please install gcsfs")

        return types.SimpleNamespace(mkdir=mkdir)

    monkeypatch.setattr(hosts.checkpoint, "absolute", absolute)
    for error in shared(together, monkeypatch, *["gs://bucket/run"] * 2):
        assert type(error) is OSError
        assert "(process 0): ImportError: Please install gcsfs" in str(error)


def test_a_full_disk_is_named(together, monkeypatch, tmp_path):
    full = tmp_path.stat().st_dev

    class Usage:
        free = hosts.LEAST_FREE - 1

    def usage(path):
        assert pathlib.Path(path).stat().st_dev == full  # that of the workdir
        return Usage

    monkeypatch.setattr(hosts.shutil, "disk_usage", usage)
    for error in checked(together, monkeypatch, tmp_path):
        assert "has 1024 MiB left, less than 1 GiB" in str(error)
    Usage.free += 1
    hosts.check_disk(str(tmp_path / "not" / "yet" / "there"))


# -- the start


def test_a_port_that_nobody_listens_at(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(OSError) as error:
        hosts.reach(address, 3, timeout=0.3)
    assert f"host {socket.gethostname()} (process 3) cannot reach" in str(error.value)
    assert address in str(error.value) and "refused" in str(error.value)


def test_a_port_that_opens_late_is_reached():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        timer = threading.Timer(0.5, server.listen)
        timer.start()
        hosts.reach(f"127.0.0.1:{server.getsockname()[1]}", 1, timeout=20)
        timer.join()


def test_half_of_the_variables_is_an_error(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ValueError, match=r"'JAX_NUM_PROCESSES'\] not set, though"):
        hosts.start()


def test_the_variables_reach_jax(monkeypatch):
    called = []
    monkeypatch.setattr(
        hosts.jax.distributed, "initialize", lambda *a, **k: called.append((a, k))
    )
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    hosts.start(timeout=7)
    ((given, named),) = called
    assert given == ("host:1234", 4, 0)
    assert named["cluster_detection_method"] == "deactivate"
    assert named["initialization_timeout"] > 7


def test_the_coordinator_that_jax_finds_is_reached_too(monkeypatch):
    """As under Slurm, for the second task of two; TPUs name theirs in the same way."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="no cluster here: set JAX_COORDINATOR_ADDR"):
        hosts.start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "JAX_COORDINATOR_PORT": port,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(
        OSError, match=rf"\(process 1\) cannot reach .* localhost:{port}"
    ):
        hosts.start(timeout=0.3)


def test_a_process_that_waits_in_vain_says_so():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = tiny.environment(
        JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0"
    )
    code = "from alignax.runs import hosts; hosts.start(timeout=0.5)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tiny.ROOT, timeout=120,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"not all of 2 processes met at {address} within 0.5 s" in done.stderr
    assert "open to all?" in done.stderr and "Traceback" not in done.stderr


# -- a run that hangs


def test_a_hang_leaves_the_stacks_of_all_threads(tmp_path, caplog):
    stuck = threading.Event()

    def a_collective_that_never_ends():
        stuck.wait(30)

    thread = threading.Thread(target=a_collective_that_never_ends)
    thread.start()
    path = tmp_path / "stacks-0.txt"
    with (
        caplog.at_level(logging.ERROR, "alignax"),
        watchdog.Watchdog(str(tmp_path), 0.2 / 60) as alive,
    ):
        alive(7)
        end = time.monotonic() + 20
        while not path.exists() or path.read_text().count("after step 7") < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
    stuck.set()
    thread.join()
    text = path.read_text()
    assert "no step for 0.00" in text
    assert "in a_collective_that_never_ends" in text
    assert "in test_a_hang_leaves_the_stacks_of_all_threads" in text
    assert str(path) in caplog.text


def test_a_run_that_makes_steps_is_left_alone(tmp_path, monkeypatch):
    """By a clock of its own, which jumps between steps by less than the limit."""
    path, now = tmp_path / "stacks-0.txt", [1000.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime)
    monkeypatch.setattr(watchdog, "time", clock)
    with watchdog.Watchdog(str(tmp_path), 0.2 / 60) as alive:
        for step in range(8):
            now[0] += 0.19
            time.sleep(0.06)  # it looks every 0.05 s
            alive(step)
        assert not path.exists()
        now[0] += 0.21
        end = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
    assert "after step 7" in path.read_text()


def test_no_minutes_watch_nothing(tmp_path):
    with watchdog.Watchdog(str(tmp_path), 0.0):
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


# -- a run that dies again and again


def begin(workdir, step, most=3, error=RuntimeError):
    """A start from the checkpoint of `step` that ends in an error, after it was built."""
    for folder in (workdir / "checkpoints").glob("*"):
        folder.rmdir()
    (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
    try:
        with watchdog.counted(str(workdir), most):
            pass
        with watchdog.Watchdog(str(workdir), 0.0):
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass


def test_starts_without_a_newer_checkpoint_are_refused(tmp_path):
    for _ in range(3):
        begin(tmp_path, 5)
    path = tmp_path / watchdog.STARTS
    for _ in range(2):
        with pytest.raises(ValueError, match="3 starts in a row from step 5") as error:
            begin(tmp_path, 5)
        assert f"delete {path}" in str(error.value)
        path.write_text(json.dumps({"step": 5, "starts": 3}))
    begin(tmp_path, 5, most=0)  # any number
    path.unlink()  # as it says
    begin(tmp_path, 5)


def test_a_newer_checkpoint_counts_from_one(tmp_path):
    for step in (0, 0, 0, 4, 4, 4, 0, 0, 0):  # or an older one: not the same place
        begin(tmp_path, step)
    assert json.loads((tmp_path / watchdog.STARTS).read_text()) == {
        "step": 0, "starts": 3
    }  # fmt: skip


def test_a_count_torn_by_a_kill_is_none(tmp_path):
    for torn in ("", '{"step": 5, "st'):
        (tmp_path / watchdog.STARTS).write_text(torn)
        begin(tmp_path, 5)
        assert json.loads((tmp_path / watchdog.STARTS).read_text())["starts"] == 1


@pytest.mark.parametrize("end", [None, KeyboardInterrupt])
def test_a_run_that_ends_well_or_by_its_user_is_forgotten(tmp_path, end):
    begin(tmp_path, 5)
    begin(tmp_path, 5, error=end)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_run_killed_while_it_reads_weights_has_started(tmp_path, monkeypatch):
    """A config that cannot run has not, and leaves no trace."""

    def end(error):
        def build(*_):
            raise error

        monkeypatch.setattr(loop.build, "build", build)
        with pytest.raises(type(error)):
            loop.train(tiny.config(), str(tmp_path / "run"))

    end(ValueError("no such loss"))
    assert not (tmp_path / "run").exists()
    end(SystemExit(137))
    path = tmp_path / "run" / watchdog.STARTS
    assert json.loads(path.read_text()) == {"step": 0, "starts": 1}


def test_all_hosts_refuse_or_none(together, tmp_path):
    """Only process 0 counts; the others could read before or after it."""

    def start(_):
        with watchdog.counted(str(tmp_path), 2):
            pass

    assert [together(start) for _ in range(2)] == [[None, None]] * 2
    said = together(start)
    assert [type(error) for error in said] == [OSError, OSError]
    assert "(process 0): ValueError: 2 starts in a row" in str(said[1])
