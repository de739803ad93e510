"""The console script: it dispatches, lists its commands and answers an unknown word."""

import json
import subprocess
import sys

import pytest
import tiny

from alignax import cli


@pytest.fixture
def ran(monkeypatch):
    """What was run, instead of running it: (module, argv)."""
    calls = []

    def run_module(module, run_name, alter_sys):
        assert (run_name, alter_sys) == ("__main__", True)
        calls.append((module, sys.argv))

    monkeypatch.setattr(cli.runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", ["alignax"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    return calls


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_runs_its_program_with_the_flags(ran, name):
    cli.main([name, "--config", "x.py", "--config.a=1"])
    ((module, argv),) = ran
    command = cli.COMMANDS[name]
    assert module == command.module
    assert argv == [
        f"alignax {name}",
        *command.flags,
        "--config",
        "x.py",
        "--config.a=1",
    ]


def test_help_has_a_line_for_every_command(ran, capsys):
    for arguments in ([], ["--help"], ["help"]):
        cli.main(arguments)
        lines = capsys.readouterr().out.splitlines()
        for name, command in cli.COMMANDS.items():
            assert [x for x in lines if x.split()[:1] == [name] and command.help in x]
    assert ran == []


def test_an_unknown_word_is_answered_with_the_nearest(ran, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["preflght"])
    assert stop.value.code == 2
    assert "'preflght' (did you mean 'preflight'?)" in capsys.readouterr().err
    assert ran == []


def script(*arguments, cwd):
    """The console script as setuptools writes it: the folder of a script is on its path."""
    code = "import sys; from alignax.cli import main; sys.exit(main())"
    env = tiny.environment()
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], cwd=cwd, env=env, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_word_that_does_not_fit_the_config_is_answered_with_the_other(tmp_path):
    wrong = script(
        "generate", "--config", "configs/dpo.py:smoke", "--workdir", tmp_path / "run",
        cwd=tiny.ROOT,
    )  # fmt: skip
    assert wrong.returncode == 1
    assert "no `prompts` to respond to: alignax train" in wrong.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_configs_and_data_are_found_from_the_current_folder(tmp_path):
    """A config beside the user, who is not in the folder of the repository."""
    (tmp_path / "mine.py").write_text(
        "import beside\nfrom alignax.configs import common\n\n"
        "def get_config():\n"
        "    c = common.get_config()\n"
        "    c.length, c.tokenizer, c.loss = 40, 'bytes', {'name': 'dpo'}\n"
        "    c.data = {'name': 'jsonl', 'path': beside.PATH, 'split': 'train'}\n"
        "    return c\n"
    )
    (tmp_path / "beside.py").write_text("PATH = 'pairs.jsonl'\n")
    row = {"prompt": "Say it.", "chosen": "yes", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    shown = script("show", "--config", "mine.py", "--rows", "1", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "⟦yes<eos>⟧" in shown.stdout
    wrong = script("show", "--config", "mine.py", "--config.lenth=3", cwd=tmp_path)
    assert wrong.returncode != 0
    assert "length" in wrong.stderr
