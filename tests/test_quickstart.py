"""The quickstart as a user runs it: DPO wins, and loses when the pairs are swapped.

In processes of its own: what is tested are statistics of the real program, without the
suite's eight devices and its switched-off optimisations.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from alignax.reports.metrics import read

ROOT = pathlib.Path(__file__).parents[1]
SWAPPED = """
import sys
from alignax.training.loop import train
from alignax.configs import quickstart
config = quickstart.get_config().stages.dpo.copy_and_resolve_references()
config.model.path, config.data.swapped, config.plots = sys.argv[1], True, False
train(config, sys.argv[2])
"""


def run(*args):
    hidden = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def last(folder):
    """The last value of every metric of a run."""
    merged = {}
    for row in read(folder):
        merged |= row
    return merged


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    config = ["--config", "configs/quickstart.py", "--workdir", folder]
    return folder, run("-m", "alignax.main", *config)


@pytest.mark.training
def test_dpo_wins_four_in_five_within_two_nats(quickstart):
    folder, printed = quickstart
    got = last(folder / "dpo")
    assert got["eval/win_rate/strict_wins"] >= 0.8
    assert got["eval/win_rate/kl"] <= 2.0
    assert got["start/log_ratio"] == 0.0
    assert got["start/loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert got["eval/ranking_accuracy/accuracy/lo"] > 0.9
    for name in ("dpo/win_rate/strict_wins", "dpo/win_rate/kl", "reward_model/ranking"):
        assert name in printed
    assert (folder / "learning_curves.png").stat().st_size > 10_000
    assert "after" in (folder / "samples.md").read_text()


@pytest.mark.training
def test_the_reward_model_learns_the_taste(quickstart):
    got = last(quickstart[0] / "reward_model")
    assert got["eval/ranking_accuracy/accuracy/lo"] > 0.6


@pytest.mark.training
def test_with_swapped_pairs_dpo_loses_four_in_five(quickstart, tmp_path):
    run("-c", SWAPPED, quickstart[0] / "sft", tmp_path / "swapped")
    got = last(tmp_path / "swapped")
    assert got["eval/win_rate/strict_wins"] < 0.2
    assert got["eval/win_rate/kl"] <= 2.0
