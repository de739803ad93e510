"""Trackers get every line once, and none of steps that a kill made void."""

import sys
import types

import pytest
import tiny
from etils import epath

from alignax.reports import metrics, trackers
from alignax.reports.metrics import Writer, read
from alignax.training import checks, loop

STARTED: list["Recorder"] = []  # in their order


class Recorder:
    """A tracker of one's own: its dotted name is 'test_trackers.Recorder'."""

    def __init__(self, start):
        self.start, self.lines, self.closed = start, [], False
        STARTED.append(self)

    def write(self, step, metrics):
        self.lines.append((step, dict(metrics)))

    def close(self):
        self.closed = True


class Broken(Recorder):
    """Fails at its second step."""

    def write(self, step, metrics):
        super().write(step, metrics)
        if len(self.lines) == 2:
            raise ConnectionError("no route to host")


@pytest.fixture(autouse=True)
def started(monkeypatch):
    monkeypatch.setitem(sys.modules, "test_trackers", sys.modules[__name__])
    STARTED.clear()
    return STARTED


class Cloud(types.ModuleType):
    """Stands for the library wandb: {id: [(step, values)]}, and the group of each id."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.groups = {}, {}

    def init(self, *, id, group, resume, **_):
        assert resume == "allow"
        self.groups[id] = group
        lines = self.runs.setdefault(id, [])

        def log(values, step):
            if not lines or step >= lines[-1][0]:  # it drops what goes back
                lines.append((step, values))

        return types.SimpleNamespace(log=log, finish=lambda: None)


@pytest.fixture
def cloud(monkeypatch):
    cloud = Cloud()
    monkeypatch.setitem(sys.modules, "wandb", cloud)
    return cloud


def test_a_library_that_is_missing_says_which_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"alignax\[wandb\]"):
        checks.check(tiny.config(trackers=("wandb",)))
    with pytest.raises(
        OSError, match=r"tracker 'wandb' does not start: .*alignax\[wandb\]"
    ):
        Writer(tmp_path, tracked_by=["wandb"])


def write(folder, step, until, *, by="wandb", scale=1.0):
    with Writer(folder, step=step, tracked_by=[by]) as writer:
        for k in range(step + 1, until + 1):
            writer.write(k, {"loss": scale * k})


def test_a_run_that_was_not_killed_stays_one_run(tmp_path, cloud):
    write(tmp_path, 0, 2)
    write(tmp_path, 2, 4)
    assert list(cloud.runs.values()) == [
        [(k, {"loss": float(k)}) for k in (1, 2, 3, 4)]
    ]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_steps_that_a_kill_made_void_are_not_in_the_run_that_goes_on(
    tmp_path, cloud, step
):
    write(tmp_path, 0, 4)
    write(tmp_path, step, 6, scale=10.0)
    first, second = cloud.runs
    old = [(k, {"loss": float(k)}) for k in range(1, step + 1)]
    assert cloud.runs[second] == old + [
        (k, {"loss": 10.0 * k}) for k in range(step + 1, 7)
    ]
    assert cloud.groups[first] == cloud.groups[second] == first
    write(tmp_path, 6, 7)  # and once more, without a kill
    assert len(cloud.runs) == 2 and cloud.runs[second][-1] == (7, {"loss": 7.0})


def test_steps_that_the_service_did_not_get_are_sent_later(tmp_path, cloud):
    write(tmp_path, 0, 2)
    write(tmp_path, 2, 4, by="tensorboard")
    write(tmp_path, 4, 5)
    assert list(cloud.runs.values()) == [
        [(k, {"loss": float(k)}) for k in (1, 2, 3, 4, 5)]
    ]


def test_a_start_that_fails_notes_no_run(tmp_path, cloud, monkeypatch):
    write(tmp_path, 0, 4)
    with monkeypatch.context() as patch:
        patch.setattr(cloud, "init", lambda **_: 1 / 0)
        with pytest.raises(OSError, match="does not start: division by zero"):
            write(tmp_path, 2, 3)
    write(tmp_path, 2, 4, scale=10.0)
    assert [*cloud.runs.values()][-1] == [
        (1, {"loss": 1.0}), (2, {"loss": 2.0}), (3, {"loss": 30.0}), (4, {"loss": 40.0}),
    ]  # fmt: skip


def test_a_run_in_a_bucket_that_was_killed_goes_to_a_new_one(
    tmp_path, cloud, monkeypatch
):
    """What W&B got after the last upload is not known there."""
    in_bucket(tmp_path, monkeypatch)
    writer = Writer("bucket://run", tracked_by=["wandb"])
    writer.write(1, {"loss": 1.0})
    writer.flush()
    for k in (2, 3):
        writer.write(k, {"loss": 7.0})  # and is killed
    write("bucket://run", 1, 3)
    assert len(cloud.runs) == 2
    assert [*cloud.runs.values()][-1] == [(k, {"loss": float(k)}) for k in (1, 2, 3)]


def in_bucket(tmp_path, monkeypatch):
    def local(path):
        return epath.Path(str(path).replace("bucket://", f"{tmp_path}/"))

    monkeypatch.setattr(metrics, "epath", types.SimpleNamespace(Path=local))


class Stubborn(Recorder):
    """Does not close."""

    def close(self):
        raise ConnectionError("service is down")


def test_a_tracker_that_does_not_close_ends_no_run(tmp_path, started, caplog):
    names = ["test_trackers.Stubborn", "test_trackers.Recorder"]
    loop.train(tiny.config(trackers=names, num_steps=1), str(tmp_path))
    assert started[1].closed and "did not close" in caplog.text


def test_a_run_in_a_bucket_keeps_its_id(tmp_path, cloud, monkeypatch):
    in_bucket(tmp_path, monkeypatch)
    write("bucket://run", 0, 2)
    write("bucket://run", 2, 3)
    assert len(cloud.runs) == 1


def test_a_function_of_ones_own_is_a_tracker(tmp_path, started):
    config = tiny.config(trackers=["test_trackers.Recorder"], num_steps=2)
    loop.train(config, str(tmp_path))
    (tracker,) = started
    assert tracker.closed and tracker.start.step == 0 and not tracker.start.rows
    assert tracker.start.config["num_steps"] == 2
    rows = [(int(row.pop("step")), row) for row in read(tmp_path)]
    assert tracker.lines == rows and [k for k, _ in rows] == [1, 2]
    assert not list(tmp_path.glob("events.*"))  # it is there instead of TensorBoard
    resumed = trackers.find("test_trackers.Recorder")
    Writer(tmp_path, step=1, tracked_by=["test_trackers.Recorder"]).close()
    assert resumed is Recorder
    assert [r["step"] for r in started[1].start.rows] == [1] and started[
        1
    ].start.dropped == 1


def test_a_tracker_that_fails_ends_no_run(tmp_path, started, caplog):
    names = ["test_trackers.Broken", "test_trackers.Recorder"]
    with Writer(tmp_path, tracked_by=names) as writer:
        for k in range(1, 5):
            writer.write(k, {"loss": 1.0})
    broken, good = started
    assert len(broken.lines) == 2 and len(good.lines) == 4 == len(read(tmp_path))
    assert caplog.text.count("failed at step 2: it gets no more metrics") == 1
    assert "no route to host" in caplog.text


@pytest.mark.parametrize("name", ["tensorbord", "tiny.nothing", "no_such.thing", "", 3])
def test_an_unknown_tracker_is_refused_before_anything_is_read(name):
    expected = (
        r"expected names" if name == 3 else r"or one of \['tensorboard', 'wandb'\]"
    )
    with pytest.raises(ValueError, match=expected):
        checks.check(tiny.config(trackers=(name,)))
