"""Sweeps: which runs, where, what is started again, and the table; runs are stand-ins."""

import csv
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from alignax import sweep

pytestmark = pytest.mark.usefixtures("signal_handlers")

ROOT = pathlib.Path(__file__).parents[1]
PATH = ROOT / "alignax" / "sweep.py"

RUN = """
import json, pathlib, signal, sys, time
config, workdir, *flags = sys.argv[1:]
given = dict(f.removeprefix("--config.").split("=", 1) for f in flags)
folder = pathlib.Path(workdir)
folder.mkdir(parents=True, exist_ok=True)
calls = folder / "calls"
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
beta = float(given["loss.beta"])
rows = [{"step": 1, "train/loss": 9.0}, {"step": 2, "train/loss": beta, "eval/a/x": beta + 1,
        "eval/a/x/lo": 0.0, "train/lr": 1.0}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows) + '{"torn')
codes = json.loads((pathlib.Path(sys.argv[0]).parent / "codes").read_text())
code = codes.get(given["loss.beta"], [0])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("began", config, flush=True)
if code == ["wait"]:
    time.sleep(60)
print("the last word", file=sys.stderr)
sys.exit(code[min(len(calls.read_text()), len(code)) - 1])
"""


@pytest.fixture
def launcher(tmp_path):
    """A launcher whose runs end as the file `codes` says, start by start."""
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "codes").write_text("{}")
    return f"{sys.executable} {tmp_path / 'run.py'}"


def go(tmp_path, launcher, *more, codes=None):
    (tmp_path / "codes").write_text(json.dumps(codes or {}))
    words = ["c.py", str(tmp_path / "s"), "--launcher", launcher, *more]
    return sweep.main(words)


def starts(tmp_path, run):
    return len((tmp_path / "s" / run / "calls").read_text())


def test_a_grid_is_every_combination():
    assert sweep.grid(["loss.beta=1,2", "seed=0"]) == [
        {"loss.beta": "1", "seed": "0"}, {"loss.beta": "2", "seed": "0"}
    ]  # fmt: skip


def test_commas_inside_a_value_do_not_split_it():
    assert sweep.split("(1, 2),[3,(4,5)],'a,b'") == ["(1, 2)", "[3,(4,5)]", "'a,b'"]


def test_a_file_has_a_run_a_line():
    text = "loss.beta=1 'data.path=a b'  # the first\n\n# nothing\n--config.seed=2\n"
    assert sweep.listed(text) == [{"loss.beta": "1", "data.path": "a b"}, {"seed": "2"}]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--grid", "beta"], "'beta' is not key=value"),
        (["--grid", "a=1", "a=2"], "names a key twice"),
        (["--grid", "a=x y,x/y"], "two runs are called 'a=x_y'"),
        ([], "no runs"),
        (["--runs", "nowhere.txt"], "nowhere.txt"),
        (["--grid", "a=1", "--launcher", "launch/gone.sh x"], "'launch/gone.sh' is not there"),
        (["--grid", "a=1", "--launcher", "no-such-program"], "'no-such-program' is not there"),
        (["--grid", "a=1", "--launcher", f"{ROOT}/launch/xpk.sh c w v6e-8"], "xpk.sh returns when"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        sweep.main(["c.py", str(tmp_path / "s"), *words])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_dry_run_prints_the_commands_and_does_nothing(tmp_path, capsys):
    words = ["c.py", str(tmp_path / "s"), "--grid", "mesh=(1, 2),(2, 1)", "seed=3"]
    assert sweep.main([*words, "--dry_run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        [sys.executable, "-m", "alignax.main", "--config", "c.py", "--workdir",
         str(tmp_path / "s" / name), f"--config.mesh={mesh}", "--config.seed=3"]
        for name, mesh in (("mesh=_1__2_,seed=3", "(1, 2)"), ("mesh=_2__1_,seed=3", "(2, 1)"))
    ]  # fmt: skip
    assert not (tmp_path / "s").exists()


def test_dry_run_prints_what_local_sh_takes(tmp_path, capsys):
    local = str(ROOT / "launch/local.sh")
    sweep.main(
        ["c.py", str(tmp_path), "--grid", "x=(1, 2)", "--dry_run", "--launcher", local]
    )
    script, *rest = shlex.split(capsys.readouterr().out)
    told = subprocess.run(
        [script, "--dry_run", *rest],
        text=True, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert shlex.split(told)[-1] == "--config.x=(1, 2)"


def test_the_table_has_the_last_values_and_how_runs_ended(tmp_path, launcher, capsys):
    code = go(tmp_path, launcher, "--grid", "loss.beta=1,2", codes={"2": [3]})
    assert code == 1
    with (tmp_path / "s" / "results.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["run", "loss.beta", "ended", "step", "train/loss", "eval/a/x"],
        ["loss.beta=1", "1", "well", "2", "1", "2"],
        ["loss.beta=2", "2", "failed (3)", "2", "2", "3"],
    ]
    said = capsys.readouterr()
    assert said.err == "loss.beta=2 failed (3): the last word\n"
    assert "| loss.beta=1 | 1 | well | 2 | 1 | 2 |" in said.out
    assert said.out.endswith((tmp_path / "s" / "results.md").read_text())
    assert "began c.py" in (tmp_path / "s" / "loss.beta=1.log").read_text()


def test_metrics_of_stages_are_told_apart(tmp_path):
    for stage, value in (("sft", 1.0), ("dpo", 2.0)):
        (tmp_path / stage).mkdir()
        row = json.dumps({"step": 5, "eval/x": value, "eval/y": "nan"})
        (tmp_path / stage / "metrics.jsonl").write_text(row + "\n")
    found = sweep.last_metrics(tmp_path, "^eval/x")
    assert found == {"dpo/step": 5, "dpo/eval/x": 2, "sft/step": 5, "sft/eval/x": 1}
    assert sweep.last_metrics(tmp_path / "none", "") == {}


def test_what_ended_well_is_not_started_again(tmp_path, launcher):
    words = ["--grid", "loss.beta=1,2"]
    assert go(tmp_path, launcher, *words, codes={"2": [1]}) == 1
    assert go(tmp_path, launcher, *words) == 0
    assert starts(tmp_path, "loss.beta=1") == 1
    assert starts(tmp_path, "loss.beta=2") == 2
    assert (
        go(tmp_path, launcher, "--grid", "loss.beta=3") == 0
    )  # more of the same sweep
    text = (tmp_path / "s" / "results.md").read_text()
    assert [text.count(f"| loss.beta={b} |") for b in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.parametrize(
    "config, value, said",
    [
        ("kto.py", "1", "'loss.beta=1,x=a_b' there is of c.py: kto.py needs another"),
        ("c.py", "a_b", "changes {'loss.beta': '1', 'x': 'a/b'}, this one"),
    ],
)
def test_another_run_of_the_same_name_is_not_taken_for_done(
    tmp_path, launcher, capsys, config, value, said
):
    assert go(tmp_path, launcher, "--grid", "loss.beta=1", "x=a/b") == 0
    before = (tmp_path / "s" / sweep.STATUS).read_text()
    words = [config, str(tmp_path / "s"), "--launcher", launcher]
    with pytest.raises(SystemExit) as stop:
        sweep.main([*words, "--grid", "loss.beta=1", f"x={value}"])
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert starts(tmp_path, "loss.beta=1,x=a_b") == 1
    assert (tmp_path / "s" / sweep.STATUS).read_text() == before


def test_a_run_that_wants_to_go_on_is_started_again_some_times(tmp_path, launcher):
    codes = {"1": [75, 75, 0], "2": [75]}
    words = ["--grid", "loss.beta=1,2", "--retries", "2"]
    assert go(tmp_path, launcher, *words, codes=codes) == 1
    assert starts(tmp_path, "loss.beta=1") == 3
    assert starts(tmp_path, "loss.beta=2") == 3
    assert "| loss.beta=2 | 2 | stopped |" in (tmp_path / "s/results.md").read_text()


def test_sigterm_reaches_the_run_and_the_rest_is_left_for_later(tmp_path, launcher):
    (tmp_path / "codes").write_text(json.dumps({"1": ["wait"]}))
    process = subprocess.Popen(
        [sys.executable, str(PATH), "c.py", str(tmp_path / "s"), "--launcher", launcher,
         "--grid", "loss.beta=1,2"],
        env=os.environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    log, end = tmp_path / "s" / "loss.beta=1.log", time.monotonic() + 60
    while not (log.exists() and "began" in log.read_text()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert "the same command goes on" in process.stderr.read()
    text = (tmp_path / "s" / "results.md").read_text()
    assert "| loss.beta=1 | 1 | stopped |" in text
    assert "| loss.beta=2 | 2 | not run |" in text
