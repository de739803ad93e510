"""What a wheel brings: configs and commands, from an empty folder, without a clone."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the content of a wheel that was built from a copy of the sources."""
    root = tmp_path_factory.mktemp("package")
    source = root / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(tiny.ROOT / name, source)
    skipped = shutil.ignore_patterns("__pycache__")
    for name in ("alignax", "configs"):
        shutil.copytree(tiny.ROOT / name, source / name, symlinks=True, ignore=skipped)
    build = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(root / "site")
    return root / "site"


def command(installed, cwd, *words, **more):
    """An alignax command of the wheel, with no clone to be found."""
    env = tiny.environment(PYTHONPATH=str(installed), **more)
    return subprocess.run(
        [sys.executable, "-m", "alignax.cli", *map(str, words)], cwd=cwd, env=env,
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def test_every_config_and_module_is_in_it(installed):
    ours = {p.name for p in (tiny.ROOT / "configs").glob("*.py")}
    assert {p.name for p in (installed / "alignax/configs").glob("*.py")} == ours
    modules = {
        str(p.relative_to(tiny.ROOT)) for p in (tiny.ROOT / "alignax").rglob("*.py")
    }
    assert {str(p.relative_to(installed)) for p in installed.rglob("*.py")} >= modules
    assert (installed / "alignax/py.typed").exists()
    assert not (installed / "configs").exists() and not (installed / "tests").exists()


def test_a_config_is_found_by_its_name_in_an_empty_folder(installed, tmp_path):
    shown = command(installed, tmp_path, "show", "--config", "quickstart:smoke")
    assert shown.returncode == 0, shown.stderr
    assert "scored" in shown.stdout
    for name in ("configs/quickstrat.py", "quickstrat"):
        wrong = command(
            installed, tmp_path, "train", "--config", name, "--workdir", "run"
        )
        assert wrong.returncode == 1
        assert f"no file {name}; alignax brings quickstart" in wrong.stderr
    assert not [*tmp_path.iterdir()]


MINE = """
import beside
from alignax.configs import dpo_jsonl

def get_config(arg=""):
    c = dpo_jsonl.get_config("smoke")
    c.data = {"name": "jsonl", "path": "pairs.jsonl", "split": "train", "test_fraction": 0.0}
    c.loss, c.evals, c.eval_data, c.best_metric = {"name": "beside.loss"}, {}, {}, ""
    c.plots = False
    return c
"""
LOSS = """
from alignax.losses import dpo

NEEDS = dpo.NEEDS

def loss(policy, batch, *, beta=0.2):
    return dpo.loss(policy, batch, beta=beta)
"""


def test_a_config_loss_and_data_of_ones_own_and_a_sweep_with_relative_paths(
    installed, tmp_path
):
    """The config lies in another folder than the one that the commands are called from."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text(MINE)
    (tmp_path / "own" / "beside.py").write_text(LOSS)
    rows = [
        {"prompt": f"Say {i}.", "chosen": "yes", "rejected": "no"} for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    swept = command(
        installed,
        tmp_path,
        "sweep",
        "own/mine.py",
        "runs",
        "--grid",
        "loss.beta=0.1,0.3",
    )
    log = "\n".join(p.read_text() for p in (tmp_path / "runs").glob("*.log"))
    assert swept.returncode == 0, swept.stderr + log
    assert swept.stdout.count("| well |") == 2
    out = command(installed, tmp_path, "export", "runs/loss.beta=0.1", "exported")
    assert out.returncode == 0, out.stderr
    assert {"config.json", "model.safetensors"} <= {*os.listdir(tmp_path / "exported")}
