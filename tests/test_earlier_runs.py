"""Runs that an earlier version of the package wrote go on: see golden/make_runs.py."""

import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from alignax.inputs import plan, source
from alignax.sampling import response_state
from alignax.training import loop

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parent / "golden"
spec = importlib.util.spec_from_file_location("make_runs", GOLDEN / "make_runs.py")
make_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_runs)
# Rows of the packed batches after the stop, as versions before 2026-12 filled them. Later
# ones put other rows there; the batches are put back, so that all else can be compared.
BATCHES = {"dpo": [[28, 11, 22, 13], [30, 12, 5, 17], [9, 0, 19, None]]}
LAID = ("padding", "useful_tokens")
CLOCK = ("tokens_per_second", "sampling", "scoring", "updating")


def metrics(row):
    """What depends neither on the clock nor on the shapes that rows are packed into."""
    return {k: v for k, v in row.items() if not k.endswith((*CLOCK, *LAID))}


@pytest.fixture
def earlier_draws(monkeypatch):
    """Tokens are drawn as versions before 2026-12 drew them: from a number for each."""
    jax.clear_caches()
    monkeypatch.setattr(response_state, "categorical", jax.random.categorical)
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("earlier_draws")
@pytest.mark.parametrize("name", ["dpo", "rl"])
def test_a_run_of_an_earlier_version_goes_on(
    name, tmp_path, capsys, caplog, monkeypatch
):
    workdir = tmp_path / "run"
    shutil.unpack_archive(GOLDEN / f"run_{name}.zip", workdir)
    after = json.loads((workdir / "after.json").read_text())
    rewards = workdir / "reference_rewards.npz"
    kept = rewards.read_bytes() if rewards.exists() else None
    monkeypatch.chdir(workdir)
    config = make_runs.configs()[name]
    config.truncate_prompts = "left"  # as earlier versions did
    if name in BATCHES:  # what that version put into its packed batches

        def earlier(order, k):
            return [None, None, None, *BATCHES[name]][k]

        monkeypatch.setattr(plan.Order, "batch", earlier)
        monkeypatch.setattr(source, "packing", lambda *_: plan.Packing(1, 1, 1, 384))
        monkeypatch.setattr(plan.Plan, "shares", lambda *_: {"useful": 1, "padding": 0})
    state = loop.train(config, ".")
    assert (name in BATCHES) == ("some rows come twice" in caplog.text)
    assert int(state.step) == make_runs.NUM_STEPS
    assert f"resumed at step {make_runs.STOPPED} of" in capsys.readouterr().out
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    steps = [r["step"] for r in rows if r["step"]]
    assert steps == list(range(1, make_runs.NUM_STEPS + 1))
    got = [r for r in rows if r["step"] > make_runs.STOPPED]
    for mine, theirs in zip(got, after, strict=True):
        mine, theirs = metrics(mine), metrics(theirs)
        assert mine.keys() >= theirs.keys()  # there are more metrics now
        for key, value in theirs.items():
            # another processor or compiler rounds differently, and three steps of a rate
            # of .01 amplify it
            np.testing.assert_allclose(
                mine[key], value, rtol=2e-3, atol=2e-4, err_msg=key
            )
    if kept is not None:  # they were read, not drawn again
        assert rewards.read_bytes() == kept
