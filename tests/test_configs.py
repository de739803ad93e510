"""Every config is a lab note that loads, locks, binds and traces; no key is for nobody."""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from ml_collections import ConfigDict

from alignax import plugin, rewards, shaping
from alignax.batch import LM, Batch
from alignax.configs import common
from alignax.models import lora, sharding, transformer
from alignax.text import tokenizer
from alignax.training import build, checks, loading, loop, optim, plugins, step

TK = tokenizer.load("bytes")

FILES = sorted(
    path
    for path in (tiny.ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "common", "models")
)
names = pytest.mark.parametrize("name", [path.stem for path in FILES])
variants = pytest.mark.parametrize("arg", ["", "smoke"])


def load(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def stages(config):
    """The runs that a config describes."""
    return list(config.stages.values()) if config.get("stages") else [config]


def test_there_are_configs():
    assert {"quickstart", "sft", "reward_model", "dpo", "dpo_llama3_8b"} <= {
        path.stem for path in FILES
    }


@names
def test_docstring_names_its_source_and_its_command(name):
    text = ast.get_docstring(ast.parse((tiny.ROOT / f"configs/{name}.py").read_text()))
    assert re.search(r"https://\S+", text)
    command = re.search(r"^Command:(.*)", text, re.M | re.S)
    assert command, "the docstring has no line 'Command: ...'"
    assert f"configs/{name}.py" in command.group(1)
    (script,) = re.findall(r"(launch/\w+\.sh)", command.group(1))[:1] or ["Makefile"]
    assert (tiny.ROOT / script).exists()


@names
def test_is_flat_and_short_and_imports_no_jax(name):
    source = (tiny.ROOT / f"configs/{name}.py").read_text()
    # The quickstart describes three runs.
    assert len(source.splitlines()) <= (90 if name == "quickstart" else 60)
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported <= {"alignax.configs", "ml_collections"}


@names
@variants
def test_names_and_hyper_parameters_bind(name, arg):
    for config in stages(load(name, arg)):
        loss = plugin.load_loss(config)
        for evaluation, hyper in config.evals.items():
            bound = plugins.evaluation(config, evaluation)
            assert {*hyper} <= {*bound.hyper}
            if "reward" in bound.hyper:
                rewards.load(bound.hyper["reward"])
        assert not config.evals or config.eval_data, "evaluations without data"
        sections = (config.data, config.eval_data, config.reference_data)
        for section in (*sections, *config.mixture.values()):
            if section:
                spec = {k: v for k, v in section.items() if k != "ratio"}
                plugin.load_section("data", spec)
        for need in loss.needs:
            assert plugin.frozen_lm(need) in (None, *config.lms)
        shapings = shaping.in_order(
            plugin.load_section("shaping", {"name": k, **v})
            for k, v in config.shaping.items()
        )
        needs = {n for bound in (loss, *shapings) for n in bound.needs}
        assert config.rollout.reward or not {"old_logps", "advantages"} & needs
        if config.rollout.reward:
            rewards.load(dict(config.rollout.reward))
            stages_of = [bound.stage for bound in shapings]
            assert stages_of.count("advantage") == ("advantages" in needs)
            assert {plugin.frozen_lm(n) for n in needs} <= {None, *config.lms}
            assert config.rollout.max_new < config.length
        if {"values", "state_values", "old_values"} & needs:
            assert config.model.value_head
        optim.from_config(config)
        assert arg or not config.num_steps or config.num_steps > config.optim.warmup


@names
@variants
def test_has_only_the_keys_of_common(name, arg):
    """Sections that a method fills (loss, data, ...) have their own keys."""
    want = common.get_config()
    for config in stages(load(name, arg)):
        assert set(config) - {"stages"} == set(want)
        for section in ("model", "optim", "checkpoint"):
            assert set(config[section]) == set(want[section])


@names
def test_a_variant_that_does_not_exist_is_an_error(name):
    with pytest.raises(ValueError, match="no variant 'smok' of this config"):
        load(name, "smok")


@names
@variants
def test_survives_json_and_overrides(name, arg):
    config = load(name, arg)
    assert json.loads(json.dumps(config.to_dict()))
    config.lock()
    with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
        stages(config)[0].batch_sise = 8


@names
def test_a_typo_in_python_is_answered_with_the_nearest_name(name):
    """A notebook has no flags that would lock the config."""
    config = stages(load(name))[0]
    with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
        config.batch_sise = 8
    with pytest.raises(AttributeError, match='Did you mean "warmup"'):
        config.optim.warm_up = 8


MADE_HERE = {"synthetic", "forget_retain"}


def innermost(section):
    """The data set that reads something: others wrap it as their `source`."""
    return innermost(section.source) if "source" in section else section


@names
def test_smoke_is_two_steps_that_need_no_file_and_no_network(name):
    for config in stages(load(name, "smoke")):
        assert config.num_steps == (0 if config.prompts else 2)
        assert config.model.path == "" or config.model.path.startswith("stage:")
        assert config.tokenizer == "bytes"
        sections = [config.data, config.eval_data, config.prompts]
        sections = [innermost(section) for section in sections]
        sections += [innermost(s) for s in config.mixture.values()]
        assert {s.name for s in sections if s} <= MADE_HERE
        assert math.prod(config.mesh) == 1


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with a small file of every kind."""
    folder = tmp_path_factory.mktemp("rows")
    turns = [f"\n\nHuman: Q{i}\n\nAssistant: " for i in range(40)]
    hh = [{"chosen": t + "good", "rejected": t + "bad"} for t in turns]
    groups = [
        {"prompt": f"Q{i}", "responses": ["a", "b"], "scores": [1, 2]}
        for i in range(40)
    ]
    pairs = [
        {"prompt": f"Q{i}", "chosen": "good", "rejected": "bad"} for i in range(40)
    ]
    gsm8k = [{"question": f"Q{i}", "answer": f"So.\n#### {i}"} for i in range(40)]
    named = {"hh": hh, "groups": groups, "pairs": pairs, "gsm8k": gsm8k}
    for file, lines in named.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{file}.jsonl").write_text(text)
    return folder


@names
def test_the_rows_of_its_data_are_those_that_it_reads(name, rows, monkeypatch):
    monkeypatch.setenv("ALIGNAX_CACHE", str(rows / "cache"))
    for arg in ("", "smoke"):
        for config in stages(load(name, arg)):
            if not config.num_steps:
                continue
            sections = (config.data, config.eval_data, *config.mixture.values())
            scored = "groups.jsonl" in (
                importlib.import_module(f"configs.{name}").__doc__
            )
            for section in (innermost(s) for s in sections if s):
                file = {"hh_rlhf": "hh", "gsm8k": "gsm8k"}.get(
                    section.name, "groups" if scored else "pairs"
                )
                if "path" in section:
                    section.path = str(rows / f"{file}.jsonl")
                elif "size" in section:
                    section.size = min(section.size, 40)
            plugins = checks.check(config)
            assert build.training_examples(config, plugins.loss, TK)
            if plugins.evals:
                names = (*checks.frozen_names(config), *checks.moving_names(config))
                found = plugin.load_examples(config.eval_data)
                build.check_evaluations(plugins.evals, names, found)


def described(name):
    """A full config under the flags that its own docstring gives, as {flag: text}."""
    text = ast.get_docstring(ast.parse((tiny.ROOT / f"configs/{name}.py").read_text()))
    flags = dict(re.findall(r"--config\.(\S+?)=(\S+)", text))
    config = load(name).lock()
    for key, value in flags.items():
        *sections, leaf = key.split(".")
        section = functools.reduce(lambda c, k: c[k], sections, config)
        section[leaf] = type(section[leaf])(value)
    return config, flags


def unset(config):
    """Keys 'path' that are empty; weights need none where there are sizes."""
    found = [k for k in keys(config) if k.split(".")[-1] == "path"]
    found = [
        k
        for k in found
        if not functools.reduce(lambda c, x: c[x], k.split("."), config)
    ]
    return [k for k in found if not (k == "model.path" and config.model.sizes)]


@names
def test_the_flags_of_its_docstring_leave_no_path_empty(name):
    config, _ = described(name)
    for stage in stages(config):
        assert unset(stage) == []


def test_a_path_that_no_flag_fills_is_noticed():
    config = load("dpo_jsonl")
    assert unset(config) == ["data.path", "eval_data.path"]
    config, flags = described("dpo_jsonl")
    assert flags == {"data.path": "pairs.jsonl"}
    assert config.eval_data.path == "pairs.jsonl"
    config.mixture = {"part": {"source": {"path": ""}}}
    assert unset(config) == ["mixture.part.source.path"]


LISTS = [
    path.stem
    for path in (tiny.ROOT / "alignax/losses").glob("*.py")
    if "lists.check" in path.read_text()
]


@pytest.mark.parametrize("name", LISTS)
def test_a_loss_on_lists_trains_on_groups(name):
    """And is evaluated on pairs whose first side is the better one."""
    full, smoke = load(name), load(name, "smoke")
    assert full.data.name == "jsonl"
    assert full.data.kind == "groups"
    assert full.eval_data.source.kind == "groups"
    full.data.test_fraction = 0.5
    assert full.eval_data.source.test_fraction == 0.5
    assert {len(x.responses) for x in plugin.load_examples(smoke.data)} == {4}
    pairs = plugin.load_examples(smoke.eval_data)
    assert len(pairs) == 16 * 6
    assert all(len(x.responses) == 2 for x in pairs)
    assert all(x.feedback[0] > x.feedback[1] for x in pairs)


def test_there_are_losses_on_lists():
    assert {"rrhf", "pro", "plackett_luce", "aft", "d2o"} <= set(LISTS)


def work(config):
    """What a step is compiled from, but for the equation of the loss."""
    loss = plugin.load_loss(config)
    return repr(
        (
            config.model.to_dict(), config.mesh, config.accumulate, config.batch_size,
            config.length, config.optim.name, config.optim.clip, [*config.lms],
            loss.needs, [*loss.ema], loss.coupled, bool(config.rollout.reward),
            config.loss.name == "sft", config.reweight.to_dict(), config.tokenizer,
        )
    )  # fmt: skip


def traced():
    """A config for each kind of work; the contract of losses has compiled all equations."""
    found = {}
    for path in FILES:
        for arg in ("", "smoke"):
            for i, config in enumerate(stages(load(path.stem, arg))):
                if config.model.sizes:
                    found.setdefault(work(config), (path.stem, arg, i))
    return list(found.values())


@names
def test_smoke_has_sizes(name):
    assert all(config.model.sizes for config in stages(load(name, "smoke")))


@pytest.mark.parametrize("name, arg, stage", traced())
def test_step_traces(name, arg, stage):
    """Shapes of a whole step at the config's own sizes; nothing is compiled or held."""
    config = stages(load(name, arg))[stage]
    shape = config.mesh if math.prod(config.mesh) <= 8 else (1, 8, 1)
    mesh = sharding.make_mesh(shape)
    ids = tokenizer.load(config.tokenizer).vocab_size if config.tokenizer else 0
    model = loading.model_config(config, ids)
    changes = dict(
        dtype=config.model.dtype, remat=config.model.remat,
        value_head=config.model.value_head,
    )  # fmt: skip
    model = type(model)(**{**model.__dict__, **changes})
    loss = plugin.load_loss(config)
    tx = optim.make_tx(1e-3, name=config.optim.name, clip=config.optim.clip)
    run = step.make_train_step(model, tx, loss, mesh, accumulate=config.accumulate)

    def place(tree):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree, sharding.shardings(tree, mesh),
        )  # fmt: skip

    params = jax.eval_shape(
        functools.partial(transformer.init, model), jax.random.key(0)
    )
    number = jax.ShapeDtypeStruct((), jnp.int32)
    ema = {k: jax.ShapeDtypeStruct((), jnp.float32) for k in loss.ema}
    state = place(loop.TrainState(number, params, jax.eval_shape(tx.init, params), ema))
    group = 1 if config.loss.name == "sft" else 2
    row = (config.batch_size, group)

    def array(shape, dtype):
        spec = jax.NamedSharding(mesh, sharding.BATCH)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=spec)

    batch = Batch(
        array((*row, config.length), jnp.int32), array((*row, config.length), bool),
        array(row, jnp.int32), array(row, jnp.float32), array(row, bool),
    )  # fmt: skip
    if config.rollout.reward:
        tokens = array((*row, config.length), jnp.float32)
        brought = {k: tokens for k in ("old_values", "returns") if k in loss.needs}
        batch = batch._replace(
            old_logps=tokens, advantages=tokens, extra=brought or None
        )
    lms = {k: LM(model, state.params) for k in config.lms}
    batch = jax.eval_shape(run.fill, state.average, lms, batch)
    after, metrics = jax.eval_shape(run.program(state), state, lms, batch, run.hyper)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == ()


# -- the defaults


def keys(config, prefix=""):
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{key}.")


@functools.cache
def read_somewhere():
    """Attributes and subscripts that alignax reads, as the last one or two names."""
    found = set()
    for path in (tiny.ROOT / "alignax").rglob("*.py"):
        if path.stem == "defaults":  # it names every key and reads none
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
                if isinstance(node.value, ast.Attribute | ast.Name):
                    before = node.value
                    owner = (
                        before.attr if isinstance(before, ast.Attribute) else before.id
                    )
                    found.add(f"{owner}.{node.attr}")
    # `**config.optim.items()` reads what the two functions take.
    for function in (optim.make_tx, optim.schedule):
        found |= {f"optim.{p}" for p in inspect.signature(function).parameters}
    # `loading.as_lora` hands the whole section on
    return found | {f"lora.{field.name}" for field in dataclasses.fields(lora.Lora)}


SHORT = {
    "model": "m",
    "checkpoint": "ckpt",
}  # what loading.py and loop.py call a section


@pytest.mark.parametrize("key", list(keys(common.get_config())))
def test_every_key_is_read(key):
    section, _, leaf = key.rpartition(".")
    found = read_somewhere()
    if not section:
        assert f"config.{leaf}" in found
    else:
        assert {f"{section}.{leaf}", f"{SHORT.get(section, section)}.{leaf}"} & found


def test_a_key_that_nobody_reads_is_noticed():
    assert "config.no_such_key" not in read_somewhere()
    assert "optim.no_such_key" not in read_somewhere()


@pytest.mark.training
def test_quickstart_smoke_runs_from_end_to_end(tmp_path):
    result = tiny.main("--config", "configs/quickstart.py:smoke", "--workdir", tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("sft", "reward_model", "dpo"):
        assert f"== {name} ==" in result.stdout
        assert list((tmp_path / name / "checkpoints" / "2").iterdir())
    assert "step 0: policy = reference: largest log-ratio 0, loss 0.693147" in result.stdout  # fmt: skip
    table = result.stdout.split("== results ==")[1]
    for metric in (
        "sft/perplexity/nll", "reward_model/ranking_accuracy/accuracy",
        "dpo/ranking_accuracy/accuracy", "dpo/win_rate/win_rate", "dpo/win_rate/kl",
    ):  # fmt: skip
        assert re.search(rf"{metric} +\S+", table), metric
    assert (tmp_path / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "# dpo" in (tmp_path / "samples.md").read_text()
    assert pathlib.Path(tmp_path, "dpo", "metrics.jsonl").exists()
