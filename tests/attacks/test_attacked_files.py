"""Files of a run that are torn or damaged, a disk that is full, and other versions."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import states
import tiny
from etils import epath

import alignax as ax
from alignax import export
from alignax.inputs import reference_cache
from alignax.records import files
from alignax.reports.metrics import Writer, read
from alignax.respond import output, respond
from alignax.runs import adapter_base, checkpoint, model_paths, watchdog, workdirs
from alignax.training import defaults, loop

pytestmark = pytest.mark.slow

# -- lines


def begun(folder, steps=3):
    with Writer(folder) as writer:
        for step in range(1, steps + 1):
            writer.write(step, {"loss": step})
            writer.samples(step, [{"text": f"é {step}"}])
    return [folder / "metrics.jsonl", folder / "samples.jsonl"]


TORN = [b'{"step": 4, "lo', b'{"step": 4, "text": "\xc3', b"\0" * 40, b"\xff\xfe{", b"[4]", b"4"]  # fmt: skip


@pytest.mark.parametrize("tail", TORN)
def test_a_torn_last_line_is_left_out_and_the_file_goes_on(tmp_path, tail, caplog):
    for path in begun(tmp_path):
        path.write_bytes(path.read_bytes() + tail)
    with Writer(tmp_path, step=3) as writer:
        writer.write(4, {"loss": 4})
        writer.samples(4, [{"text": "é 4"}])
    assert [row["loss"] for row in read(tmp_path)] == [1, 2, 3, 4]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [f"é {k}" for k in (1, 2, 3, 4)]  # fmt: skip
    assert "metrics.jsonl:4 is a torn line" in caplog.text
    assert "samples.jsonl:4 is a torn line" in caplog.text


def test_a_last_line_without_its_end_is_not_glued_to_the_next(tmp_path):
    path = begun(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with Writer(tmp_path, step=3) as writer:
        writer.write(4, {"loss": 4})
    assert [row["loss"] for row in read(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", TORN)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    for path in begun(tmp_path):
        whole = path.read_bytes()
        first = whole.index(b"\n") + 1
        path.write_bytes(whole[:first] + line + b"\n" + whole[first:])
        with pytest.raises(ValueError, match=rf"{path.name}:2 is not JSON that a run"):
            Writer(tmp_path, step=3)
        path.write_bytes(whole)
    Writer(tmp_path, step=3).close()


@pytest.mark.parametrize("value", ['"abc"', "null", "[1]", "{}"])
def test_a_metric_that_is_no_number_is_named(tmp_path, value):
    path = begun(tmp_path)[0]
    whole = path.read_text()
    path.write_text(f'{{"step": 1, "loss": {value}}}\n' + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 .*'loss' is "):
        read(tmp_path)
    path.write_text('{"step": 1, "loss": "nan"}\n' + whole)
    assert len(read(tmp_path)) == 4


def test_a_sample_without_its_place_is_named(tmp_path):
    path = begun(tmp_path)[1]
    path.write_text('{"step": 1, "text": "a"}\n' + path.read_text())
    with pytest.raises(ValueError, match=r"samples\.jsonl:1 .*'step' and 'index'"):
        Writer(tmp_path, step=3)


# -- files of one object

DAMAGED = [b"", b'{"a": ', b"\xff\xfe", b"[1]", b"[" * 100_000, b"null", b"\0" * 9]


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize(
    "name, use",
    [
        ("config.json", lambda f: workdirs.check_owner(str(f), tiny.config())),
        ("config.json", lambda f: workdirs.saved_config(str(f))),
        ("finished.json", lambda f: workdirs.ended_at(str(f))),
        ("base.json", lambda f: adapter_base.find(str(f), "x")),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, use, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name} is ") as error:
        use(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


LACKING = [b"{}", b'{"step": "x", "path": 3}', b'{"step": true, "path": []}']


@pytest.mark.parametrize("content", LACKING)
@pytest.mark.parametrize(
    "name, use",
    [
        ("finished.json", lambda f: workdirs.ended_at(str(f))),
        ("base.json", lambda f: adapter_base.find(str(f), "x")),
    ],
)
def test_what_an_object_of_a_run_lacks_is_named(tmp_path, name, use, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name} has '(step|path)' "):
        use(tmp_path)


@pytest.mark.parametrize("content", [*DAMAGED, *LACKING, b'{"step": 0, "starts": "9"}'])
def test_a_damaged_count_of_starts_begins_again(tmp_path, content):
    path = tmp_path / watchdog.STARTS
    path.write_bytes(content)
    with watchdog.counted(str(tmp_path), 2):
        assert json.loads(path.read_text()) == {"step": 0, "starts": 1}


@pytest.mark.parametrize("value", [None, 3, "x", [1], True])
@pytest.mark.parametrize("key", ["model", "rollout", "loss", "evals", "evals.x", "tokenizer"])  # fmt: skip
def test_a_section_of_a_runs_config_that_is_none_is_named(tmp_path, key, value):
    if (key, value) == ("tokenizer", "x"):
        return
    config = tiny.config(evals={"x": {"name": "tiny.scripted"}}).to_dict()
    *section, last = key.split(".")
    (config[section[0]] if section else config)[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json has {key} "):
        model_paths.resolve(str(tmp_path))
    if key != "tokenizer":
        with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json has {key} "):
            workdirs.check_owner(str(tmp_path), tiny.config())


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no /proc")
def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for name, use in {
        "config.json": lambda: workdirs.saved_config(str(tmp_path)),
        "metrics.jsonl": lambda: read(tmp_path),
    }.items():
        (tmp_path / name).symlink_to("/proc/self/mem")  # whose bytes give EIO
        with pytest.raises(OSError, match=rf"cannot read {tmp_path}/{name}: "):
            use()


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "finished.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"finished\.json is a folder"):
        workdirs.ended_at(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]"])
def test_damaged_files_of_answers_are_named(tmp_path, content):
    folder = tmp_path / "run"
    config = tiny.to_respond(tmp_path)
    respond.respond(config, str(folder))
    whole = (folder / "responses.jsonl").read_bytes()
    (folder / "responses.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"responses\.json is "):
        respond.respond(config, str(folder))
    path = folder / "responses.jsonl"
    path.write_bytes(content + b"\n" + whole if content else b"\n" + whole)
    with pytest.raises(ValueError, match=r"responses\.jsonl:1 is no response"):
        output.read(epath.Path(path))


WRONG_LINES = [
    {"id": ["a"]}, {"id": 3}, {"id": None}, {"responses": None}, {"responses": "x"},
    {"tokens": []}, {"finish": {}}, {"logps": 3},
]  # fmt: skip


@pytest.mark.parametrize("change", [*WRONG_LINES, None])
def test_a_line_that_is_no_answer_is_named(tmp_path, change):
    lists = {key: [0] for key in output.LISTS}
    line = json.dumps({"id": "a", "prompt": "b", **lists})
    path = tmp_path / "responses.jsonl"
    path.write_text(line + "\n")
    assert len(output.read(epath.Path(path))) == 1
    bad = json.dumps({**json.loads(line), **change}) if change else "[" * 100_000
    path.write_text(f"{line}\n{bad}\n")
    with pytest.raises(ValueError, match=r"responses\.jsonl:2 is no response"):
        output.read(epath.Path(path))


def scored(text):
    return float(len(text))


def test_answers_are_not_scored_by_two_rewards(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    config = tiny.to_respond(tmp_path)
    config.generate.reward = {"name": "test_attacked_files.scored"}
    respond.respond(config, str(folder))
    path = folder / "responses.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    with monkeypatch.context() as patch:
        patch.setattr(respond.rewards, "identity", lambda reward: "other code")
        with pytest.raises(ValueError, match=r"answers something else; .*reward \("):
            respond.respond(config, str(folder))
    beside = folder / "responses.json"
    known = json.loads(beside.read_text())
    assert known.pop("reward")
    beside.write_text(json.dumps(known))  # as an earlier version wrote it
    first, *_ = path.read_text().splitlines()
    path.write_text(first.replace('"prompt": "', '"prompt": "x') + "\n")
    with pytest.raises(
        ValueError, match="is no prompt of this run, or has another text"
    ):
        respond.respond(config, str(folder))
    path.write_text(first + "\n")
    respond.respond(config, str(folder))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("lacking", ["key", "rows", "ends", "logps"])
def test_a_cache_without_a_part_is_named(tmp_path, lacking):
    path = tmp_path / "reference.npz"
    reference_cache.save(path, {b"a" * 32: np.zeros(3, np.float32)}, {"x": "1"})
    with np.load(path) as whole:
        arrays = {k: v for k, v in whole.items() if k != lacking}
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"reference\.npz does not read back .*delete"):
        reference_cache.load(path, {"x": "1"})


# -- other versions


def edited(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def config(tmp_path):
    config = tiny.config("pairs", num_steps=1)
    workdirs.prepare(str(tmp_path), config)
    return config


def check(folder, config):
    workdirs.check_owner(str(folder), config, defaults.get_config())


def test_a_run_of_an_earlier_version_takes_the_defaults_of_new_keys(
    tmp_path, config, caplog
):
    def earlier(c):
        del c["average_every"], c["optim"]["final"], c["rollout"]["max_draws"]

    edited(tmp_path, earlier)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)  # so the folder is this run's
    check(tmp_path, config)
    assert "new keys take their defaults: average_every=1, " in caplog.text
    assert {"optim.final=0.1", "rollout.max_draws=8"} <= {
        *caplog.text.replace(",", "").split()
    }
    config.optim.final = 0.5
    with pytest.raises(ValueError, match=r"optim\.final \(absent there, 0\.5 here\)"):
        check(tmp_path, config)


@pytest.mark.parametrize("key", ["optim.gain", "momentum", "rollout.speed"])
def test_a_run_of_a_newer_version_is_refused_with_both_versions(tmp_path, config, key):
    loop.train(config, str(tmp_path))

    def newer(c):
        *parents, name = key.split(".")
        for parent in parents:
            c = c[parent]
        c[name] = 3

    edited(tmp_path, newer)
    for meta in tmp_path.glob("checkpoints/*/meta/metadata"):
        meta.write_text(meta.read_text().replace('"alignax": "0', '"alignax": "7'))
    with pytest.raises(ValueError, match=rf"alignax 7\.\S+ with the keys \['{key}'\].* this alignax 0"):  # fmt: skip
        check(tmp_path, config)


# -- the disk


@pytest.mark.parametrize("place", ["/proc/alignax", "/sys/alignax"])
def test_a_folder_that_takes_no_files_is_named(tmp_path, place):
    with pytest.raises(OSError, match=f"cannot write to workdir {place}: "):
        loop.train(tiny.config(num_steps=1), place)
    with pytest.raises(OSError, match=f"cannot write to workdir {place}: "):
        respond.respond(tiny.to_respond(tmp_path), place)


CONFIG = """
import tiny

def get_config(arg=""):
    return tiny.config("pairs", **{
        "num_steps": 4, "checkpoint.every": 2, "checkpoint.asynchronous": arg == "async",
    })
"""


def limited(folder, variant, size):
    """A process none of whose files can grow beyond `size` bytes, as on a full disk."""
    (folder / "full.py").write_text(CONFIG)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(
        tiny.command("--config", f"{folder}/full.py:{variant}", "--workdir", folder / "run"),
        cwd=tiny.ROOT, env=tiny.environment(JAX_ENABLE_COMPILATION_CACHE="false"), text=True,
        capture_output=True, preexec_fn=limit, check=False,
    )  # fmt: skip


def test_only_the_writes_of_a_failed_save_are_left_unreported(monkeypatch):
    kept, past = [], logging.getLogger("asyncio")
    monkeypatch.setattr(sys, "unraisablehook", kept.append)
    checkpoint.quiet_threads()
    events = [
        SimpleNamespace(exc_value=RuntimeError(text))
        for text in ("Event loop is closed", "a reward's own")
    ]
    for event in events:
        sys.unraisablehook(event)
    assert kept == events[1:]

    monkeypatch.setattr(past, "filters", [checkpoint._not_of_a_thread])
    texts = [
        "Future exception was never retrieved\nfuture: <Future ... 4.orbax-checkpoint-tmp/d>",
        "Future exception was never retrieved\nfuture: <Future of a reward>",
    ]
    records = [past.makeRecord("asyncio", 40, "", 1, text, (), None) for text in texts]
    assert [bool(past.filter(record)) for record in records] == [False, True]


@pytest.mark.training
@pytest.mark.parametrize("variant", ["async", "sync"])
def test_a_full_disk_is_named_and_loses_nothing(tmp_path, variant):
    if variant == "sync" and os.environ.get("ALIGNAX_ATTACKS") != "all":
        pytest.skip("make attacks")
    root, free = tmp_path / "run", resource.RLIM_INFINITY
    assert limited(tmp_path, variant, free).returncode == 0
    end = states.ending(root)
    for size, named in ((9000, "checkpoint 4 in"), (1500, "cannot write")):
        shutil.rmtree(root / "checkpoints/4")
        (root / workdirs.END).unlink()
        full = limited(tmp_path, variant, size)
        last = full.stderr.strip().splitlines()
        assert full.returncode == 1, full.stderr
        assert "Traceback" not in full.stderr
        assert last[-1] == "(--debug shows the traceback)", full.stderr
        assert named in last[-2]
        assert "File too large" in last[-2]
        again = limited(tmp_path, variant, free)
        assert again.returncode == 0, again.stderr
        assert "resumed at step 2 of 4" in again.stdout
        assert states.ending(root) == end


@pytest.mark.parametrize("use", [
    lambda path: ax.load(path),
    lambda path: ax.load(f"average:{path}"),
    lambda path: files.existing(path),
    lambda path: loop.train(tiny.config(num_steps=1), path),
    lambda path: loop.train(tiny.config(**{"model.path": path}), "run"),
    lambda path: export.export(path, "there"),
])  # fmt: skip
def test_the_home_folder_of_a_user_that_there_is_not(tmp_path, monkeypatch, use):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="~nosuchuser"):
        use("~nosuchuser/x")
    assert not [*tmp_path.iterdir()]


def test_a_workdir_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    loop.train(tiny.config(num_steps=1), "~/run")
    assert (tmp_path / "run/checkpoints/1").is_dir()
    assert not (tmp_path / "~").exists()
    assert read("~/run") == read(tmp_path / "run")
