"""`alignax export`: what is written reads back, and every choice is made by its user."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import alignax as ax
from alignax import export
from alignax.models import load, peft
from alignax.reports import model_card
from alignax.runs import checkpoint, model_paths
from alignax.training import loading, loop

pytestmark = pytest.mark.slow

EVALUATED = {
    "eval_data": {"name": "synthetic", "split": "test", "kind": "pairs", "size": 8},
    "evals": {"ranking_accuracy": {}},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A DPO run that kept an average."""
    folder = tmp_path_factory.mktemp("export") / "run"
    loop.train(tiny.config("pairs", num_steps=2, average=0.5, **EVALUATED), str(folder))
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run of adapters."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    config = tiny.config("sft", **{"num_steps": 2, "lora.rank": 2, "lora.targets": ("q", "up")})  # fmt: skip
    loop.train(config, str(folder))
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model."""
    folder = tmp_path_factory.mktemp("judge") / "run"
    c = tiny.config("pairs", num_steps=2, lms={}, loss={"name": "reward_model"})
    c.model.value_head = True
    loop.train(c, str(folder))
    return folder


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_is_written_with_all_that_belongs_to_it(run, tmp_path, capsys):
    out = tmp_path / "out"
    export.main([str(run), str(out)])
    assert "causal LM" in capsys.readouterr().out
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} < names  # fmt: skip
    model, again = ax.load(str(run)), ax.load(str(out))
    same(model.lm.params, again.lm.params)
    assert model.tokenizer.encode("Ünïcode") == again.tokenizer.encode("Ünïcode")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted(model.tokenizer.eos_ids)
    card = (out / "README.md").read_text()
    assert "loss `dpo`, step 2 of 2 with 4 prompts each, all weights" in card
    assert (
        "## Evaluation at step 2" in card and "eval/ranking_accuracy/accuracy" in card
    )
    saved = json.loads(card.split("```json\n")[1].split("```")[0])
    assert saved == json.loads((run / "config.json").read_text())
    digest = checkpoint.last_meta(run)["data"]["data"]
    assert f"- digest of the data: {digest}" in card


def test_the_average_is_another_model(run, tmp_path):
    export.main([str(run), str(tmp_path / "out"), "--average"])
    again = load.load(tmp_path / "out")
    same(again.params, loading.load_lm(f"average:{run}").params)
    assert "## Evaluation" not in (tmp_path / "out" / "README.md").read_text()
    assert not np.array_equal(again.params["embed"], loading.load_lm(str(run)).params["embed"])  # fmt: skip


def test_a_cast_of_a_run_that_computes_in_bfloat16_is_measured_too(run):
    """In bfloat16 the rounded weights give the same, which says nothing of the others."""
    lm, text = loading.load_lm(str(run)), ax.tokenizer(str(run))
    half = dataclasses.replace(lm.config, dtype="bfloat16")
    said = [
        export.cast(export.LM(c, lm.params), "bfloat16", text)[1]
        for c in (lm.config, half)
    ]
    assert said[0] == said[1] and "change by 0 nats" not in said[0]


def test_what_a_cast_changes_is_measured(run, tmp_path, capsys):
    export.main([str(run), str(tmp_path / "out"), "--dtype", "bfloat16"])
    said = capsys.readouterr().out
    lm, text = loading.load_lm(str(run)), ax.tokenizer(str(run))
    new = export.LM(
        lm.config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
    )
    a, b = (ax.score(ax.Model(x, text), *map(list, zip(*export.TEXTS, strict=True))) for x in (lm, new))  # fmt: skip
    change = np.abs(a.logps - b.logps)[a.mask]
    assert change.mean() > 0
    assert (
        f"change by {change.mean():.2g} nats per token, by {change.max():.2g}" in said
    )
    same(load.load(tmp_path / "out", dtype="bfloat16").params, new.params)


def test_adapters_are_merged_or_written_for_peft(adapted, tmp_path, capsys):
    export.main([str(adapted), str(tmp_path / "merged")])
    same(load.load(tmp_path / "merged").params, loading.load_lm(str(adapted)).params)
    export.main([str(adapted), str(tmp_path / "peft"), "--peft"])
    assert (
        "parameters of adapters of weights that were drawn" in capsys.readouterr().out
    )
    held = checkpoint.load_lm(adapted)
    again, settings = peft.load(tmp_path / "peft", loading.load_lm(str(adapted)))
    same(again, held.params)
    assert settings.rank == 2 and set(settings.targets) == {"q", "up"}
    assert "library_name: peft" in (tmp_path / "peft" / "README.md").read_text()
    assert (tmp_path / "peft" / "tokenizer.json").exists()
    with pytest.raises(SystemExit, match="exists; overwrite=True"):
        export.main([str(adapted), str(tmp_path / "peft"), "--peft"])
    export.main([str(adapted), str(tmp_path / "peft"), "--peft", "--overwrite"])


def test_a_scalar_head_is_written_or_left_out_as_the_user_says(judge, tmp_path):
    with pytest.raises(
        SystemExit, match=r"--sequence-classifier writes it.*--drop-value"
    ):
        export.main([str(judge), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    export.main([str(judge), str(tmp_path / "out"), "--sequence-classifier"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    same(load.load(tmp_path / "out").params, loading.load_lm(str(judge)).params)
    export.main([str(judge), str(tmp_path / "lm"), "--drop-value-head"])
    assert "value_head" not in load.load(tmp_path / "lm").params


def test_adapters_of_a_reward_model_are_a_sequence_classifier(tmp_path, capsys):
    c = tiny.config("pairs", num_steps=2, lms={}, loss={"name": "reward_model"})
    c.model.value_head = True
    c.lora.update(rank=2, targets=("q",), saved=("embed",))
    loop.train(c, str(tmp_path / "run"))
    export.main([str(tmp_path / "run"), str(tmp_path / "peft"), "--peft"])
    assert "of a sequence classifier" in capsys.readouterr().out
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["task_type"] == "SEQ_CLS"
    assert written["modules_to_save"] == ["embed_tokens", "classifier", "score"]
    held = checkpoint.load_lm(str(tmp_path / "run"))
    plain = loading.with_value_head(loading.load_lm(str(tmp_path / "run")), False)
    same(peft.load(tmp_path / "peft", plain)[0], held.params)
    flags = ["--peft", "--drop-value-head"]
    export.main([str(tmp_path / "run"), str(tmp_path / "policy"), *flags])
    written = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert written["task_type"] == "CAUSAL_LM" and written["ensure_weight_tying"]


REFUSED = {
    "no head": (["--sequence-classifier"], "has no scalar head"),
    "no adapters": (["--peft"], "is no run with adapters"),
    "adapters of a dtype": (["--peft", "--dtype", "bfloat16"], "are written in float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_source_does_not_have_is_refused_and_nothing_is_written(
    run, tmp_path, name
):
    flags, message = REFUSED[name]
    with pytest.raises(SystemExit, match=message):
        export.main([str(run), str(tmp_path / "out"), *flags])
    assert not [*tmp_path.iterdir()]


def test_a_source_that_is_not_there_and_a_folder_that_would_be_lost(run, tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        export.main([str(tmp_path / "nowhere"), str(tmp_path / "out")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(SystemExit, match=r"exists|holds thesis"):
            export.main([str(run), str(tmp_path / "out"), *flags])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(SystemExit, match="only a run has an average"):
        export.main([str(tmp_path / "out"), str(tmp_path / "other"), "--average"])


def test_weights_that_do_not_read_back_are_an_error(run, tmp_path):
    lm = loading.load_lm(str(run))
    ax.save(ax.load(str(run)), str(tmp_path / "out"))
    again = load.load(tmp_path / "out").params
    export.check_written(lm.params, again, str(tmp_path / "out"))
    changed = {**lm.params, "embed": lm.params["embed"] + 1}
    with pytest.raises(ValueError, match="embed differs"):
        export.check_written(changed, again, str(tmp_path / "out"))


def test_a_card_names_its_base_only_where_the_hub_knows_it():
    config = {"model": {"path": "hf:org/name"}, "loss": {"name": "dpo"}, "num_steps": 3, "batch_size": 2}  # fmt: skip
    assert "base_model: org/name" in model_card.card("x", config, {}, {})
    config["model"]["path"] = "/models/mine"
    assert "base_model" not in model_card.card("x", config, {}, {})
    assert "which did not train it" in model_card.card("x", None, {}, {})


def test_a_card_has_the_evaluation_of_its_step_alone():
    rows = [
        {"step": 2.0, "eval/a": 1.0, "eval/b": 2.0}, {"step": 4.0, "train/loss": 1.0},
        {"step": 4.0, "eval/a": 5.0}, {"step": 4.0, "eval/c": 6.0}, {"step": 6.0, "eval/a": 7.0},
    ]  # fmt: skip
    assert model_card.evaluation(rows, 4) == {"step": 4.0, "eval/a": 5.0, "eval/c": 6.0}
    assert model_card.evaluation(rows, 3) == {}


@pytest.mark.parametrize("other", ["a run", "the run itself", "a folder of adapters"])
def test_what_holds_more_than_a_model_is_never_replaced(run, adapted, tmp_path, other):
    target, flags = tmp_path / "out", []
    if other == "a folder of adapters":
        flags = ["--peft"]
        export.main([str(adapted), str(target), *flags])
        (target / "checkpoint-500").mkdir()
        (target / "checkpoint-500" / "optimizer.pt").write_text("weeks")
    else:
        shutil.copytree(run, target)
    before = sorted(str(p) for p in target.rglob("*"))
    source = target if other == "the run itself" else adapted
    with pytest.raises(SystemExit, match=r"holds (best|checkpoint\S*), which a model"):
        export.main([str(source), str(target), "--overwrite", *flags])
    assert sorted(str(p) for p in target.rglob("*")) == before


def test_a_dtype_stays_that_of_the_source(run, tmp_path, capsys):
    export.main([str(run), str(tmp_path / "half"), "--dtype", "bfloat16"])
    export.main([str(tmp_path / "half"), str(tmp_path / "again")])
    a, b = (tmp_path / n / "model.safetensors" for n in ("half", "again"))
    assert a.read_bytes() == b.read_bytes()
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    config |= {"dtype": "float16", "torch_dtype": "float16"}
    (tmp_path / "half" / "config.json").write_text(json.dumps(config))
    export.main([str(tmp_path / "half"), str(tmp_path / "third")])
    assert "the weights are float16 there, and float32 here" in capsys.readouterr().out


def test_the_base_of_adapters_is_named_as_others_know_it(adapted):
    found = export.model_paths.resolve(str(adapted))
    assert export.base_of(found)[0] == ""
    config = {**found.config, "model": {**found.config["model"], "path": "hf:org/name"}}
    assert export.base_of(found._replace(config=config)) == ("org/name", "org/name")
    of_run = found._replace(config={"model": {"path": "x"}}, base=found)
    assert "which PEFT and vLLM do not read" in export.base_of(of_run)[1]


def test_a_remote_folder_is_refused(run):
    with pytest.raises(SystemExit, match="is remote: export to a local folder"):
        export.main([str(run), "gs://bucket/model"])


# -- the licence of the model that another was made of

README = """---
license: other
license_name: llama3
license_link: LICENSE
language: [en, 'no', no]
base_model: someone/older
datasets: [a]
---
# A model
"""


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (README, {"license": "other", "license_name": "llama3", "license_link": "LICENSE", "language": ["en", "no", "no"]}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: mit\nlanguage: {a: b}\n---", {"license": "mit"}),
        ("---\nlicense: [mit, [x]]\nlanguage: en\n---\n", {"language": "en"}),
        ("---\nlicense: mit\n", {}),  # it does not end
        ("# A model\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\nlicense: \x00\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense:\n---\n", {}),
        (f"---\nlicense: {'x' * 501}\n---\n", {}),
        (f"---\nlicense: {'[' * 5000}\n---\n", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_what_a_card_says_of_its_licence(text, want):
    assert model_card.inherited(text) == want


def header(folder):
    import yaml

    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(text)


def test_the_licence_of_a_folder_goes_with_its_export(run, tmp_path):
    """Also with a run that begins there, with one that begins with that run, and from a cache."""
    base = tmp_path / "base-1B"
    export.main([str(run), str(base)])
    assert "license" not in header(base)
    (base / "README.md").write_text(README)
    export.main([str(base), str(tmp_path / "copy")])
    want = {"license": "other", "license_name": "llama3", "license_link": "LICENSE", "language": ["en", "no", "no"]}  # fmt: skip
    assert header(tmp_path / "copy") == {
        "library_name": "transformers", **want, "base_model": "base-1B", "tags": ["alignax"],
    }  # fmt: skip
    found = model_paths.resolve(str(run))
    sources = [str(base), "hf:org/name", str(tmp_path / "nowhere")]
    got = [
        export.origin(found._replace(base=None, config={"model": {"path": p}}))
        for p in sources
    ]
    assert got == [{**want, "base_model": "base-1B"}, {}, {}]
    adapters = found._replace(
        kind="peft", base=model_paths.resolve(str(base)), config=None
    )
    assert export.origin(adapters) == got[0]
    cached = tmp_path / "models--org--name" / "snapshots" / "0f"
    cached.parent.mkdir(parents=True)
    base.rename(cached)
    assert export.origin(model_paths.resolve(str(cached)))["base_model"] == "org/name"
    (cached / "README.md").write_bytes(b"\xff\xfe---\nlicense: mit\n---\n")
    assert export.origin(model_paths.resolve(str(cached))) == {"base_model": "org/name"}
