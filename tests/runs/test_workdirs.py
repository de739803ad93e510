"""A folder belongs to one config; what stands in the way of writing there is named."""

import json
import os
import pathlib

import numpy as np
import pytest
import tiny

from alignax.runs import workdirs


@pytest.fixture
def begun(tmp_path):
    workdir = tmp_path / "run"
    workdirs.prepare(str(workdir), tiny.config("pairs"))
    saved(workdir)
    return str(workdir)


def saved(workdir):
    """As a run leaves it that saved a checkpoint, and so owns its folder."""
    (workdir / "checkpoints" / "3").mkdir(parents=True)


def test_a_workdir_of_another_config_lists_the_keys(begun):
    other = tiny.config(
        "pairs", **{"loss.beta": 0.2, "optim.lr": 3e-4, "loss.name": "dpo"}
    )
    with pytest.raises(ValueError) as error:
        workdirs.check_owner(begun, other)
    assert str(error.value) == (
        f"{begun} holds a run of another config; take another workdir or undo: "
        "loss.beta (0.1 there, 0.2 here); optim.lr (0.01 there, 0.0003 here)"
    )
    stored = json.loads((pathlib.Path(begun) / "config.json").read_text())
    assert stored["loss"]["beta"] == 0.1


def test_a_key_that_only_one_config_has_is_listed(begun):
    other = tiny.config("pairs", **{"loss.label_smoothing": 0.1})
    with pytest.raises(ValueError, match=r"loss\.label_smoothing \(absent there, 0\.1 here\)"):  # fmt: skip
        workdirs.check_owner(begun, other)


def test_what_changes_no_number_may_change(begun):
    config = tiny.config("pairs", **{"log_every": 7, "checkpoint.every": 2, "checkpoint.keep": 1, "profile": (1, 2)})  # fmt: skip
    workdirs.check_owner(begun, config)


def test_the_same_config_is_the_same_after_json(begun):
    """Tuples become lists in config.json."""
    workdirs.check_owner(begun, tiny.config("pairs", buckets=[72]))


def test_a_file_in_the_place_of_the_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"cannot write to workdir {path}: ") as error:
            workdirs.prepare(str(path), tiny.config())
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"cannot write to workdir .*: Permission denied"):
        workdirs.prepare(str(tmp_path / "locked"), tiny.config())


def test_hosts_that_see_different_files_are_an_error(monkeypatch):
    monkeypatch.setattr(workdirs.jax, "process_count", lambda: 2)
    gather = workdirs.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda x: np.array([x, True]))
    assert workdirs.everywhere(True, "the cache is there")
    with pytest.raises(ValueError, match=r"the cache is there only on hosts \[1\]"):
        workdirs.everywhere(False, "the cache is there")


def test_a_new_key_of_a_fixed_section_that_is_off_is_no_difference(tmp_path):
    """A key of a plug-in that is absent has the plug-in's default, whatever that is."""
    config = tiny.config("pairs")
    config.rollout.reward = {"name": "final_answer"}
    workdirs.prepare(str(tmp_path), config)
    saved(tmp_path)
    path = tmp_path / "config.json"
    there = json.loads(path.read_text())
    del (
        there["rollout"]["reward_seconds"],
        there["optim"]["critic_lr"],
        there["template"],
    )
    path.write_text(json.dumps(there))
    workdirs.check_owner(str(tmp_path), config)
    for key, value in {
        "loss.label_smoothing": 0.0, "rollout.reward.correct": 0.0, "data.strict": False,
        "optim.critic_lr": 1e-4, "rollout.reward_seconds": 3.0,
    }.items():  # fmt: skip
        other = config.copy_and_resolve_references()
        with other.unlocked():
            other.update_from_flattened_dict({key: value})
        with pytest.raises(ValueError, match=key):
            workdirs.check_owner(str(tmp_path), other)


def test_a_reward_that_an_evaluation_takes_from_rollouts_may_be_written_out(tmp_path):
    config = tiny.config("sft")
    config.rollout.reward = {"name": "constraints", "max_words": 3}
    config.evals = {"sample": {"max_new": 4}}
    workdirs.prepare(str(tmp_path), config)
    saved(tmp_path)
    config.evals.sample.reward = {"name": "constraints", "max_words": 3}
    workdirs.check_owner(str(tmp_path), config)
    config.evals.sample.reward.max_words = 4
    with pytest.raises(ValueError, match=r"evals\.sample\.reward\.max_words"):
        workdirs.check_owner(str(tmp_path), config)
