"""What the path of a model means."""

import collections
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
import tiny
from etils import epath

from alignax.batch import LM
from alignax.models import save, transformer
from alignax.records import fetch
from alignax.runs import adapter_base, checkpoint, model_paths, workdirs
from alignax.runs.model_paths import resolve
from alignax.training import build, loading

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def run(folder, **changes):
    """The folder of a run, as far as its config goes."""
    workdirs.prepare(str(folder), tiny.config(**changes))
    return str(folder)


def test_a_hugging_face_folder_and_a_gguf_file():
    for name, kind in (("llama_tied", "hf"), ("llama_gguf/model.gguf", "gguf")):
        path = str(GOLDEN / name)
        found = resolve(path)
        assert (found.path, found.kind, found.tokenizer) == (path, kind, path)
        assert (found.base, found.config) == (None, None)


def test_adapters_know_their_base():
    path = str(GOLDEN / "peft_llama")
    found = resolve(path)
    assert found.kind == "peft"
    assert found.base is not None
    assert found.base.kind == "hf"
    assert (pathlib.Path(found.base.path) / "config.json").exists()
    assert found.tokenizer == found.base.tokenizer  # it has none of its own


def test_a_run_its_best_and_its_checkpoints_are_one_run(tmp_path):
    folder = run(tmp_path / "run")
    for path in (folder, f"{folder}/best", f"{folder}/checkpoints"):
        found = resolve(path)
        assert found.kind == "run"
        assert found.folder == folder
        assert found.tokenizer == "bytes"
        assert found.config["batch_size"] == 4
        assert found.base is None  # its weights were drawn from the seed


def test_the_tokenizer_of_a_run_is_that_of_the_model_it_started_from(tmp_path):
    """Also through another run."""
    hf = str(GOLDEN / "llama_tied")
    first = run(tmp_path / "first", **{"tokenizer": "", "model.path": hf})
    second = run(tmp_path / "second", **{"tokenizer": "", "model.path": first})
    assert resolve(second).tokenizer == hf
    assert resolve(second).base.base.path == hf


def test_a_run_whose_first_model_is_gone_is_still_described(tmp_path):
    """Its own checkpoints hold all weights."""
    gone = str(tmp_path / "gone")
    found = resolve(run(tmp_path / "run", **{"model.path": gone}))
    assert (found.kind, found.tokenizer, found.base) == ("run", "bytes", None)


def test_the_base_of_a_run_before_is_not_needed(tmp_path):
    """A full run that started from adapters, whose base is gone now."""
    first = run(tmp_path / "first", **{"tokenizer": "", "model.path": "/nowhere/base"})
    note = {"path": "/nowhere/base", "from_here": "", "checksum": ""}
    (tmp_path / "first" / "base.json").write_text(json.dumps(note))
    second = run(tmp_path / "second", **{"tokenizer": "", "model.path": first})
    found = resolve(second)
    assert (found.kind, found.tokenizer) == ("run", "")
    with pytest.raises(FileNotFoundError, match="/nowhere/base"):
        resolve(first)  # its own adapters are nothing without it


def test_checkpoints_without_a_config_are_a_run(tmp_path):
    (tmp_path / "3").mkdir()
    found = resolve(str(tmp_path))
    assert (found.kind, found.config) == ("run", None)


def test_the_base_of_adapters_is_found_where_it_is_now(tmp_path):
    folder = run(tmp_path / "run", **{"model.path": "/nowhere/base", "lora.rank": 2})
    note = {"path": "/nowhere/base", "from_here": "../base", "checksum": ""}
    (tmp_path / "run" / "base.json").write_text(json.dumps(note))
    with pytest.raises(FileNotFoundError, match=r"is in none of \['/nowhere/base'"):
        resolve(folder)
    (tmp_path / "base").mkdir()
    assert resolve(folder).base.path == str(tmp_path / "base")


def test_stages_are_folders_of_the_workdir(tmp_path):
    there = epath.Path(tmp_path)
    assert model_paths.of_stage("stage:sft", there) == str(tmp_path / "sft")
    assert model_paths.of_stage("init", there) == "init"
    with pytest.raises(ValueError, match="stage:sft is a path in a config with stages"):
        resolve("stage:sft")


def test_an_average_in_front_of_a_stage_or_of_a_base(tmp_path):
    assert (
        model_paths.of_stage("average:stage:sft", epath.Path(tmp_path))
        == f"average:{tmp_path}/sft"
    )
    assert (
        model_paths.of_stage("average:runs/x", epath.Path(tmp_path)) == "average:runs/x"
    )
    model, run = tmp_path / "a" / "model", tmp_path / "a" / "run"
    for folder in (model / "checkpoints", run):
        folder.mkdir(parents=True)
    adapter_base.note(
        run, f"average:{model}", checkpoint.fingerprint({"x": jnp.zeros(1)})
    )
    assert adapter_base.find(run, f"average:{model}") == f"average:{model}"
    (tmp_path / "a").rename(tmp_path / "b")
    moved = tmp_path / "b"
    assert (
        adapter_base.find(moved / "run", f"average:{model}") == f"average:{moved}/model"
    )
    assert model_paths.resolve(f"average:{moved}/model").average


def test_the_start_of_a_run_resolves_a_path_once(tmp_path, monkeypatch):
    """The policy's path, which gives weights and tokenizer, and each of the others."""
    config = tiny.config("pairs", num_steps=0, data={})
    model = loading.model_config(config, 259)
    lm = LM(model, transformer.init(model, jax.random.key(0)))
    for name in ("policy", "other"):
        save.save(lm, tmp_path / name)
    calls = collections.Counter()
    honest = model_paths.resolve
    monkeypatch.setattr(
        model_paths, "resolve", lambda path: calls.update([path]) or honest(path)
    )
    config.model.path = str(tmp_path / "policy")
    other = str(tmp_path / "other")
    config.lms = {"ref": "init", "other": other, "again": other}
    run = build.build(config, str(tmp_path / "run"))
    assert run.lms["again"].params["embed"] is run.lms["other"].params["embed"]
    assert calls == {str(tmp_path / "policy"): 1, str(tmp_path / "other"): 1}


def test_a_name_of_the_hub_is_the_folder_that_was_fetched(tmp_path, monkeypatch):
    there = str(GOLDEN / "llama_tied")
    monkeypatch.setattr(fetch, "model", lambda name: {"hf:me/model@v1": there}[name])
    assert resolve("hf:me/model@v1") == resolve(there)


def test_the_base_of_adapters_may_be_a_name_of_the_hub(tmp_path, monkeypatch):
    there = str(GOLDEN / "llama_tied")
    monkeypatch.setattr(fetch, "model", lambda name: {"hf:me/model": there}[name])
    folder = run(tmp_path / "run", **{"model.path": "hf:me/model", "lora.rank": 2})
    lm = loading.load_lm(there)
    adapter_base.note(folder, "hf:me/model", checkpoint.fingerprint(lm.params))
    known = json.loads((tmp_path / "run" / "base.json").read_text())
    assert (known["path"], known["from_here"]) == ("hf:me/model", "")
    assert resolve(folder).base == resolve(there)
    adapter_base.note(
        folder, "hf:me/model", checkpoint.fingerprint(lm.params)
    )  # the same base: it resumes
