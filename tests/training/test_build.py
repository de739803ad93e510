"""A config that cannot run is refused before anything compiles, and leaves no trace."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax.batch import LM
from alignax.inputs.annotate import annotate
from alignax.models import load, save, sharding, transformer
from alignax.runs import checkpoint
from alignax.text import tokenizer
from alignax.training import build, checks, loading, loop, optim, parallel


def refuse(tmp_path, message, config, error=(ValueError, OSError)):
    """`config` is refused with `message`, and may be corrected in the same workdir.

    A ValueError or an OSError is what `main` answers with one line.
    """
    workdir = tmp_path / "run"
    with pytest.raises(error, match=message) as caught:
        build.build(config, str(workdir))
    assert not workdir.exists(), "the workdir was touched by a config that cannot run"
    return str(caught.value)


PAIRS = {"kind": "pairs"}
BAD = {
    "unknown loss": (
        {"loss": {"name": "dpoo"}}, r"unknown name 'dpoo' in losses \(did you mean 'dpo'\?\)",
    ),
    "unknown data": (
        {"data": {"name": "synthetics", "split": "train"}},
        r"unknown name 'synthetics' in data \(did you mean 'synthetic'\?\); available: .*hh_rlhf,",
    ),
    "unknown evaluation": (
        {"evals": {"win_rates": {}}}, r"unknown name 'win_rates' in evals \(did you mean 'win_rate'\?\)",
    ),
    "unknown hyper-parameter of a loss": (
        {"loss": {"name": "dpo", "betta": 0.1}},
        r"losses\.dpo has no hyper-parameter 'betta' \(did you mean 'beta'\?\); it takes 'beta'",
    ),
    "unknown parameter of the data": (
        {"data": {"name": "synthetic", "split": "train", "sizes": 4}},
        r"data\.synthetic has no hyper-parameter 'sizes' \(did you mean 'size'\?\)",
    ),
    "unknown parameter of the evaluation data": (
        {"eval_data": {"name": "synthetic", "splt": "test"}},
        r"data\.synthetic has no hyper-parameter 'splt' \(did you mean 'split'\?\)",
    ),
    "unknown hyper-parameter of an evaluation": (
        {"evals": {"win_rate": {"reward": "x", "max_now": 3}}},
        r"evals\.win_rate has no hyper-parameter 'max_now' \(did you mean 'max_new'\?\)",
    ),
    "responses beyond the context": (
        {"evals": {"win_rate": {"reward": "model", "max_new": 57}},
         "eval_data": {"name": "synthetic", "split": "test"}},
        r"evals\.win_rate: config\.length \+ max_new = 129 is beyond the context of the policy, 128",
    ),
    "a KL without the LM it is to": (
        {"loss": {"name": "gkd"}},
        r"loss 'losses\.gkd' needs \['kl', 'forward_kl'\]: add config\.lms, there are \[\]",
    ),
    "no LM whose name begins as the loss asks": (
        {"loss": {"name": "poft"}, "lms": {"ref": "init"}},
        r"loss 'losses\.poft' needs \['aligned\*_logps'\]: add config\.lms, there are \['ref'\]",
    ),
    "an average that is never updated": ({"average_every": 0}, "average_every is 0"),
    "an average that does not move": (
        {"average": 0.9, "average_every": 7}, "average_every is 7: .* would not move in 6 steps",
    ),
    "an LM in the place of the base of adapters": (
        {"lora.rank": 2, "lms": {"base": "init"}}, "lms.base is the base of the adapters",
    ),
    "unknown reweighting": (
        {"reweight": {"wpoo": {}}}, r"unknown name 'wpoo' in reweight \(did you mean 'wpo'\?\)",
    ),
    "adapters of what is no projection": (
        {"lora.rank": 2, "lora.targets": ("query",)},
        r"lora\.targets is \['query'\]; it takes some of \['q',",
    ),
    "adapters of rank 0": (
        {"lora.dora": True}, r"lora\.dora is set, but lora\.rank is 0",
    ),
    "evaluation without data": (
        {"evals": {"perplexity": {}}}, r"evals \['perplexity'\] need config\.eval_data",
    ),
    "no name of a loss": ({"loss": {"beta": 0.1}}, r"config\.loss.*name"),
    "no name of the data": ({"data": {"split": "train"}}, r"config\.data.*name"),
    "batch that the mesh does not divide": (
        {"mesh": (2, 2, 1), "batch_size": 6},
        r"batch_size=6 does not divide over accumulate=1 x data\*fsdp=4; use a multiple of 4",
    ),
    "batch that micro-batches do not divide": (
        {"accumulate": 3}, r"batch_size=4 does not divide over accumulate=3 .* multiple of 3",
    ),
    "evaluation batch that the mesh does not divide": (
        {"mesh": (4, 1, 1), "eval_batch_size": 6, "evals": {"perplexity": {}},
         "eval_data": {"name": "synthetic", "split": "test"}},
        r"batch_size=6 does not divide over .*data\*fsdp=4",
    ),
    "more devices than there are": (
        {"mesh": (16, 1, 1), "batch_size": 16}, r"mesh shape \(16, 1, 1\) needs 16 devices, there are 8",
    ),
    "two sizes of a mesh": ({"mesh": (2, 1)}, r"mesh shape \(2, 1\) should be three sizes"),
    "neither weights nor sizes": (
        {"model.sizes": {}}, r"config\.model needs a path to weights, or sizes",
    ),
    "unknown size": (
        {"model.sizes": {"widht": 16}}, r"model\.sizes has no \['widht'\]; it takes \['activation'",
    ),
    "no tokenizer": ({"tokenizer": ""}, r"config\.tokenizer is empty and config\.model\.path names no weights"),
    "rows longer than the context": (
        {"length": 256, "buckets": ()}, r"config\.length=256 is beyond the model's context of 128",
    ),
    "tokenizer larger than the model": (
        {"model.sizes": {**tiny.config().model.sizes.to_dict(), "vocab_size": 200}},
        r"the tokenizer has 2\d\d ids, the model only 200",
    ),
    "unknown remat": ({"model.remat": "blok"}, r"unknown remat 'blok'"),
    "unknown optimiser": ({"optim.name": "adam"}, r"unknown optimiser 'adam'; known: adamw"),
    "unknown schedule": ({"optim.schedule": "cosin"}, r"unknown schedule 'cosin'; known: constant"),
    "a loss without its frozen model": (
        PAIRS | {"loss": {"name": "dpo"}, "lms": {}}, r"loss 'losses\.dpo' needs \['ref_logps'\]: add config\.lms",
    ),
    "a loss without its head": (
        PAIRS | {"loss": {"name": "reward_model"}}, r"loss 'losses\.reward_model' needs config\.model\.value_head=True",
    ),
    "an average that nobody keeps": (
        PAIRS | {"lms": {"ref": "average"}}, r"lms\.ref='average' would be the policy itself: set config\.average",
    ),
    "a frozen model that is not there": (
        PAIRS | {"lms": {"ref": "/no/such/model"}}, r"/no/such/model",
    ),
    "best of nothing": (
        {"best_metric": "eval/ranking_accuracy/accuracy"}, r"best_metric.*ranking_accuracy",
    ),
    "neither max nor min": ({"best_mode": "mx"}, r"best_mode.*'mx'"),
    "patience with nothing": ({"patience": 2}, r"patience.*best_metric"),
    "a ratio that the batch cannot hold": (
        {"data": {}, "mixture": {
            "a": {"name": "synthetic", "split": "train", "kind": "sft", "size": 8, "ratio": 5},
            "b": {"name": "synthetic", "split": "test", "kind": "sft", "size": 8, "ratio": 1}}},
        r"batch_size 4 cannot hold the ratio .*; use a multiple of 6",
    ),
    "a part of a mixture without its ratio": (
        {"data": {}, "mixture": {"a": {"name": "synthetic", "split": "train", "kind": "sft"}}},
        r"mixture\.a.*ratio",
    ),
}  # fmt: skip

NEEDS_FILES = (  # or devices: found where these are read
    "unknown data", "unknown parameter of the data",
    "unknown parameter of the evaluation data", "responses beyond the context",
    "batch that the mesh does not divide", "batch that micro-batches do not divide",
    "evaluation batch that the mesh does not divide", "more devices than there are",
    "two sizes of a mesh", "unknown size", "no tokenizer", "rows longer than the context",
    "tokenizer larger than the model", "unknown remat", "a frozen model that is not there",
    "a ratio that the batch cannot hold",
)  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_config_is_refused(tmp_path, case):
    changes, message = BAD[case]
    changes = dict(changes)
    refuse(tmp_path, message, tiny.config(changes.pop("kind", "sft"), **changes))


def test_missing_weights_are_named(tmp_path):
    path = str(tmp_path / "SmolLM3")
    message = refuse(tmp_path, "SmolLM3", tiny.config(**{"model.path": path}), OSError)
    assert path in message


def test_an_empty_folder_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    config = tiny.config(**{"model.path": str(tmp_path / "empty")})
    refuse(tmp_path, r"empty.*config\.json", config)


@pytest.fixture
def small_vocabulary(tmp_path):
    """A Hugging Face folder whose table is smaller than the byte tokenizer's ids."""
    config = loading.model_config(tiny.config(), 100)
    lm = LM(config, transformer.init(config, jax.random.key(0)))
    save.save(lm, tmp_path / "hf")
    return str(tmp_path / "hf")


def test_ids_beyond_the_vocabulary_of_loaded_weights(tmp_path, small_vocabulary):
    assert load.load(small_vocabulary).config.vocab_size == 100
    config = tiny.config(**{"model.path": small_vocabulary})
    refuse(tmp_path, r"the tokenizer has 2\d\d ids, the model only 100", config)


def test_a_checkpoint_of_another_model_is_refused_by_the_run(tmp_path):
    """The config is the same and the checkpoint is not: somebody copied it there."""
    config = tiny.config(num_steps=1)
    ids = tokenizer.load("bytes").vocab_size
    model = loading.model_config(tiny.config(**{"model.sizes.width": 24}), ids)
    mesh = sharding.make_mesh((1, 1, 1))
    tx = optim.make_tx(1e-3)
    state = loop.init_state(transformer.init(model, jax.random.key(0)), tx, mesh)
    with checkpoint.manager(tmp_path / "checkpoints", asynchronous=False) as manager:
        checkpoint.save(manager, state, model=model, meta={"data": {}})
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint .*/checkpoints/0 is of another model or optimiser: \S+ is \[\["):  # fmt: skip
        loop.train(config, str(tmp_path))


# -- pieces


def test_equal_weights_are_placed_once(tmp_path, monkeypatch):
    placed = []
    put = sharding.placed
    monkeypatch.setattr(
        sharding, "placed", lambda p, mesh: placed.append(p) or put(p, mesh)
    )
    config = tiny.config("pairs", lms={"ref": "init", "anchor": "init"})
    run = build.build(config, str(tmp_path / "run"))
    assert len(placed) == 1
    assert run.lms["anchor"].params["embed"] is run.lms["ref"].params["embed"]


def test_a_loss_may_read_any_number_of_frozen_models(tmp_path):
    """PoFT: the policy against the mean of two aligned models that differ."""
    config = tiny.config(
        loss={"name": "poft"}, lms={"aligned": "init", "aligned_2": "init"}
    )
    run = build.build(config, str(tmp_path / "run"))
    params = run.policy.params
    lms = {
        name: LM(run.policy.config, {**params, "embed": params["embed"] * scale})
        for name, scale in (("aligned", 100.0), ("aligned_2", -60.0))
    }
    assert run.source
    score = parallel.scorer(run.mesh)
    batch = run.source.next(None, 0)
    policy = score(run.policy, batch)
    one, other = (
        score(lm, batch).logps.sum((1, 2)) / batch.mask.sum((1, 2))
        for lm in lms.values()
    )
    assert abs(one - other).min() > 0.1
    batch = annotate(batch, lms, needs=run.loss.needs, score=score)
    _, metrics = run.loss(*jax.tree.map(jnp.asarray, (policy, batch)))
    margin = policy.logps.sum((1, 2)) / batch.mask.sum((1, 2)) - (one + other) / 2
    np.testing.assert_allclose(metrics["margin"], margin, rtol=1e-4, atol=1e-5)


# -- the checks of a config


@pytest.mark.parametrize("case", [c for c in BAD if c not in NEEDS_FILES])
def test_a_config_alone_shows_what_is_wrong_with_it(case):
    """Most mistakes are found without devices, weights or data."""
    changes, message = BAD[case]
    changes = dict(changes)
    with pytest.raises(ValueError, match=message):
        checks.check(tiny.config(changes.pop("kind", "sft"), **changes))


def test_a_test_fraction_of_zero_alone_is_enough_to_have_no_test(tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(8)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "jsonl", "split": "train", "path": str(file), "test_fraction": 0.0}
    config = tiny.config(
        "pairs", data=data, eval_data={**data, "split": "test"},
        evals={"ranking_accuracy": {}},
    )  # fmt: skip
    run = build.build(config, str(tmp_path / "run"))
    assert run.evals == {}
    assert run.eval_data is None
    assert "none at test_fraction=0" in capsys.readouterr().out
    config.best_metric = "eval/ranking_accuracy/accuracy"
    with pytest.raises(ValueError, match="eval_data has no rows at test_fraction=0"):
        build.build(config, str(tmp_path / "other"))
