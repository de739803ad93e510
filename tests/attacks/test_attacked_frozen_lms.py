"""Frozen LMs and rewards that are replaced between two starts of a run; weights of nan."""

import importlib
import shutil
import sys

import jax
import numpy as np
import pytest
import tiny

from alignax import rewards
from alignax.batch import LM
from alignax.models import save, transformer
from alignax.models.transformer import ModelConfig
from alignax.respond import respond
from alignax.reward_functions import digest
from alignax.runs import workdirs
from alignax.training import loop

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    vocab_size=259, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_width=16, max_length=128,
)  # fmt: skip


def write(path, seed=0, change=None, **fields):
    """The folder of a small model; `change` changes its parameters."""
    shutil.rmtree(path, ignore_errors=True)
    model = ModelConfig(**{**vars(MODEL), **fields})
    params = transformer.init(model, jax.random.key(seed))
    save.save(LM(model, change(params) if change else params), path)


def forget_the_end(folder):
    """As if the run had been killed after its second step."""
    shutil.rmtree(folder / "checkpoints" / "3")
    (folder / workdirs.END).unlink()


def dpo(folder):
    write(folder / "ref")
    return tiny.config("pairs", lms={"ref": str(folder / "ref")})


def rollouts(folder):
    write(folder / "reward", value_head=True)
    return tiny.config("sft", **{
        "length": 40, "loss": {"name": "policy_gradient"}, "shaping": {"group_norm": {}},
        "lms": {"reward": str(folder / "reward")}, "rollout.reward": {"name": "model"},
        "rollout.max_new": 4, "rollout.group": 2,
    })  # fmt: skip


@pytest.mark.parametrize("make, name", [(dpo, "ref"), (rollouts, "reward")])
def test_a_run_does_not_go_on_with_another_frozen_lm(tmp_path, make, name):
    config, folder = make(tmp_path), tmp_path / "run"
    config.num_steps, config.checkpoint.every = 3, 2
    end = loop.train(config, str(folder))
    forget_the_end(folder)
    head = {"value_head": name == "reward"}
    write(tmp_path / name, seed=1, **head)
    with pytest.raises(ValueError, match=rf"lms\.{name} has other weights .*{tmp_path}/{name}"):  # fmt: skip
        loop.train(config, str(folder))
    write(tmp_path / name, **head)
    again = loop.train(config, str(folder))
    assert int(again.step) == 3
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


# -- weights that are no numbers


def spoilt(value):
    def change(params):
        head = np.array(params["embed"])
        head[7, 3] = value
        return {**params, "embed": head}

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_answer_nothing(tmp_path, value):
    write(tmp_path / "model", change=spoilt(value))
    config = tiny.to_respond(tmp_path, **{"model.path": str(tmp_path / "model")})
    config.tokenizer = "bytes"
    with pytest.raises(ValueError, match=r"/model: embed has weights that are NaN"):  # fmt: skip
        respond.respond(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_reference_that_is_not_finite_is_named_before_a_step(tmp_path):
    config = dpo(tmp_path)
    write(tmp_path / "ref", change=spoilt(np.nan))
    with pytest.raises(ValueError, match=r"/ref: embed has weights that are NaN"):
        loop.train(config, str(tmp_path / "run"))


# -- the code of a reward

REWARD = """
BONUS = 1.0

def helper(text):
    return len(text) + BONUS

def {name}(text):
    return helper(text)
"""
SAME = {
    "a comment": ("BONUS =", "# why\nBONUS ="),
    "a docstring": ("    return len", '    """What it is."""\n    return len'),
    "layout": ("len(text) + BONUS", "(\n        len(text)\n        + BONUS\n    )"),
}
OTHER = {
    "a helper": ("len(text) +", "len(text) -"),
    "a constant": ("BONUS = 1.0", "BONUS = 2.0"),
    "the function": ("return helper(text)", "return -helper(text)"),
}


def written(folder, monkeypatch, name, change=("", "")):
    """The reward of a module that is written and imported now."""
    monkeypatch.syspath_prepend(str(folder))
    path = folder / f"{name}.py"
    path.write_text(REWARD.format(name="judge").replace(*change))
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return rewards.load(f"{name}.judge")


@pytest.mark.parametrize("change", [*SAME, *OTHER])
def test_the_code_of_a_reward_is_its_module(tmp_path, monkeypatch, change):
    for place in "ab":
        (tmp_path / place).mkdir()
    first = rewards.identity(written(tmp_path / "a", monkeypatch, "own_reward"))
    pair = {**SAME, **OTHER}[change]
    now = rewards.identity(written(tmp_path / "b", monkeypatch, "own_reward", pair))
    assert (now == first) == (change in SAME)


def ctrl(folder, monkeypatch, change=("", "")):
    """A run with rewards of the reference in a folder of its own."""
    written(folder, monkeypatch, "cached_reward", change)
    return tiny.config("sft", **{
        "num_steps": 1, "length": 40, "loss": {"name": "policy_gradient"},
        "lms": {"ref": "init"}, "shaping": {"ctrl": {}, "rloo": {}},
        "rollout.reward": {"name": "cached_reward.judge"}, "rollout.max_new": 4,
        "rollout.group": 2, "rollout.reference_samples": 4,
        "rollout.cache": str(folder / "cache"),
    })  # fmt: skip


def test_kept_rewards_of_another_helper_are_refused_and_earlier_ones_are_read(
    tmp_path, monkeypatch
):
    path = tmp_path / "cache" / "reference_rewards.npz"
    with monkeypatch.context() as patch:  # as the version before wrote it
        before = (digest.saved_digest, digest.first_digest)
        patch.setattr(rewards, "DIGESTS", before)
        patch.setattr("alignax.training.on_policy.DIGESTS", before)
        patch.setattr("alignax.rollouts.source.DIGESTS", before)
        loop.train(ctrl(tmp_path, monkeypatch), str(tmp_path / "first"))
    kept = path.read_bytes()
    loop.train(ctrl(tmp_path, monkeypatch), str(tmp_path / "second"))
    assert path.read_bytes() == kept
    path.unlink()
    loop.train(ctrl(tmp_path, monkeypatch), str(tmp_path / "third"))
    changed = ctrl(tmp_path, monkeypatch, OTHER["a helper"])
    with pytest.raises(ValueError, match=r"reference_rewards\.npz holds rewards of something else: reward"):  # fmt: skip
        loop.train(changed, str(tmp_path / "fourth"))
