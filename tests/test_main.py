"""The entry point as a user meets it: a subprocess, its exit code and what it prints."""

import pytest
import tiny

from alignax.runs import workdirs


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny_run.py"
    path.write_text(
        "import tiny\n\ndef get_config(arg=''):\n    return tiny.config('pairs')\n"
    )
    return path


def run(config, *flags):
    return tiny.main("--config", config, *flags)


def assert_one_line(result, *words):
    """Exit code 1 and one line that says what is wrong: no traceback."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def test_explain_prints_and_exits(config, tmp_path):
    result = run(config, "--explain", "--workdir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "blocks/attn/q/kernel" in result.stdout
    assert "(None, 'fsdp', 'model', None)" in result.stdout
    assert "MiB a copy; 2 copies" in result.stdout
    assert not (tmp_path / "run").exists()


def test_explain_answers_a_bad_config_with_one_line(config):
    assert_one_line(run(config, "--explain", "--config.mesh=(16,1,1)"), "16 devices, there are 1")  # fmt: skip


def test_workdir_is_needed(config):
    result = run(config)
    assert result.returncode != 0
    assert "--workdir is needed" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_unknown_key_is_answered_with_the_nearest_name(config, tmp_path):
    result = run(config, "--workdir", tmp_path / "run", "--config.batch_sise=8")
    assert result.returncode == 1
    assert "batch_sise" in result.stderr
    assert "nearest: batch_size" in result.stderr
    assert not (tmp_path / "run").exists()


def test_unknown_hyper_parameter_on_the_command_line(config, tmp_path):
    result = run(config, "--workdir", tmp_path / "run", "--config.loss.betta=0.2")
    assert result.returncode == 1
    assert "betta" in result.stderr
    assert "did you mean 'beta'" in result.stderr


def test_another_config_in_a_workdir_is_refused_with_the_keys_that_differ(
    config, tmp_path
):
    workdir = tmp_path / "run"
    workdirs.prepare(str(workdir), tiny.config("pairs"))
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    again = run(
        config, "--workdir", workdir, "--config.loss.beta=0.25", "--config.seed=3"
    )
    differ = r"loss.beta (0.1 there, 0.25 here); seed (0 there, 3 here)"
    assert_one_line(again, "holds a run of another config", differ)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--config.accumulate=3", ["batch_size=4 does not divide over accumulate=3"]),
        ("--config.mesh=(2,1,1)", ["needs 2 devices, there are 1"]),
        ("--config.model.path=/no/such/folder", ["/no/such/folder"]),
        ("--config.loss.name=dpoo", ["unknown name 'dpoo' in losses", "did you mean 'dpo'"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(config, tmp_path, flag, words):
    assert_one_line(run(config, "--workdir", tmp_path / "run", flag), *words)


def test_an_unwritable_workdir_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(config, "--workdir", tmp_path / "file" / "run")
    assert_one_line(result, f"cannot write to workdir {tmp_path}/file/run")


@pytest.mark.slow
def test_debug_runs_without_jit_and_shows_tracebacks(config, tmp_path):
    flags = ["--debug", "--config.num_steps=1", "--config.batch_size=1"]
    flags += ["--config.length=40", "--config.buckets=(40,)"]
    result = run(config, *flags, "--workdir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    broken = run(
        config, "--debug", "--config.loss.name=dpoo", "--workdir", tmp_path / "x"
    )
    assert broken.returncode == 1
    assert "Traceback" in broken.stderr


def test_overrides_reach_the_run_and_are_kept(config, tmp_path):
    flags = ("--config.num_steps=1", "--config.loss.beta=0.25", "--config.optim.lr=0.5")
    result = run(config, *flags, "--workdir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    kept = (tmp_path / "run" / "config.json").read_text()
    assert '"beta": 0.25' in kept
    assert '"lr": 0.5' in kept
    assert "run 1/1" in result.stderr
    assert "⟦" in result.stdout  # the first batch, with the mask shown
