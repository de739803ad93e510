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
    return str(workdir)


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
