"""From a config to the pieces of a run, and from a finished run to its report.

Everything that can be wrong in a config is found here, before anything compiles.
"""

import contextlib
import dataclasses
import datetime
import fnmatch
import functools
import hashlib
import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignax import (
    adapted,
    checkpoint,
    decode,
    logprob,
    masked,
    optim,
    plots,
    plugin,
    refcache,
    rewards,
    rollout,
    sampler,
    shaping,
    sharding,
    source,
    tokenizer,
)
from alignax.batch import LM, Example, Metrics, Params
from alignax.metrics import flops_per_token, read
from alignax.models import load, lora, transformer
from alignax.models.transformer import ModelConfig

log = logging.getLogger(__name__)
RATE = ("lr", "schedule", "warmup", "final")  # of config.optim: the schedule's own
# What a file of reference rewards holds, and whose folder it is in: for messages.
REWARDS = {"what": "rewards", "setting": "config.rollout.cache"}
# What may differ when a run goes on in its folder: nothing that changes a number.
VOLATILE = ("log_every", "checkpoint", "profile", "wandb", "mesh", "patience")


class Run(NamedTuple):
    """The pieces of a run."""

    name: str
    workdir: str
    mesh: Mesh
    tokenizer: tokenizer.Tokenizer
    policy: LM  # its parameters are those that are trained
    assemble: Callable[[Params, Mapping[str, LM]], LM]  # from them, the whole policy
    lms: dict[str, LM]  # frozen, on the mesh
    moving: tuple[str, ...]  # names that mean the policy's average
    loss: plugin.Bound
    rate: Callable
    tx: optax.GradientTransformation
    source: source.Source | None  # None when there is nothing to train on
    evals: dict[str, plugin.Bound]
    eval_data: Sequence[Example] | None
    say: Callable[[str], None]


def build(config, workdir: str) -> Run:
    """Reads data and weights and binds every name in the config.

    Raises:
      ValueError, OSError: what is wrong, and where; the workdir is not touched by a
        config that cannot run.
    """
    check(config)
    check_owner(workdir, config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_hosts(mesh)
    sharding.check_batch_size(config.batch_size, config.accumulate, mesh)
    sharding.check_batch_size(config.eval_batch_size or config.batch_size, 1, mesh)
    loss = bind_loss(config)
    evals = {
        name: bind(config, "evals", {"name": name, **e})
        for name, e in config.evals.items()
    }
    now = datetime.datetime.fromisoformat(config.date)
    text = tokenizer.load(tokenizer_path(config), now=now)
    policy = make_policy(config, text)
    own = {"old_logps", "advantages", "returns", "old_values"} & {*loss.needs}
    if own and not config.rollout.reward:
        raise ValueError(
            f"loss {loss.name!r} needs {sorted(own)}, which rollouts bring: set "
            "config.rollout.reward"
        )
    if loss.needs and "values" in loss.needs and not policy.config.value_head:
        raise ValueError(f"loss {loss.name!r} needs config.model.value_head=True")
    for name, e in evals.items():
        longest = config.length + e.hyper.get("max_new", 0)
        if longest > policy.config.max_length:
            raise ValueError(
                f"evals.{name}: config.length + max_new = {longest} is beyond the "
                f"context of the policy, {policy.config.max_length}"
            )
    host = (jax.process_index(), jax.process_count())
    parts = {
        k: (load_examples(d, drop=("ratio",)), d["ratio"])
        for k, d in config.mixture.items()
    }
    data = None
    examples: Any = None
    if config.num_steps:
        examples = parts or load_examples(config.data)
    if config.num_steps and not config.rollout.reward:
        data = source.dataset_source(
            examples, text, batch_size=config.batch_size, length=config.length,
            buckets=config.buckets, seed=config.seed, host=host,
            vocab_size=policy.config.vocab_size,
        )  # fmt: skip
    eval_data = load_examples(config.eval_data) if config.eval_data else None
    if evals and eval_data is None:
        raise ValueError(f"evals {sorted(evals)} need config.eval_data")
    rate = optim.schedule(
        config.optim.lr, config.num_steps, kind=config.optim.schedule,
        warmup=config.optim.warmup, final=config.optim.final,
    )  # fmt: skip
    tx = optim.make_tx(rate, **{k: v for k, v in config.optim.items() if k not in RATE})
    lms, moving = {}, []
    on_mesh = {}  # frozen weights by where they came from
    if adapters := lora_settings(config):
        base = LM(policy.config, sharding.put_params(policy.params, mesh))
        on_mesh["init"] = lms["base"] = base
    for name, path in config.lms.items():
        if path == "average":
            if not config.average:
                raise ValueError(
                    f"lms.{name}='average' needs config.average > 0, its decay"
                )
            moving.append(name)
            continue
        lm = policy if path == "init" else load_lm(path)
        if lm is policy and lm.config.value_head:
            lm = with_value_head(lm, False)
        if lm.config.vocab_size < text.vocab_size:
            raise ValueError(
                f"the tokenizer has {text.vocab_size} ids, lms.{name} only "
                f"{lm.config.vocab_size}"
            )
        if lm.config.max_length < config.length:
            raise ValueError(
                f"config.length={config.length} is beyond the context of lms.{name}, "
                f"{lm.config.max_length}"
            )
        changes = {"dtype": config.model.dtype, "remat": "none"}
        lm = LM(dataclasses.replace(lm.config, **changes), lm.params)
        if path in on_mesh:  # one copy of the same weights is enough
            params = {k: on_mesh[path].params[k] for k in lm.params}
        else:
            params = jax.tree.map(
                lambda x: jnp.asarray(x, config.model.param_dtype), lm.params
            )
            params = sharding.put_params(params, mesh)
        lms[name] = on_mesh[path] = LM(lm.config, params)
    missing = [n for n in loss.needs if frozen(n) not in (None, *lms, *moving)]
    if missing:
        raise ValueError(
            f"loss {loss.name!r} needs {missing}: add config.lms, there are {sorted(lms)}"
        )
    for name, e in evals.items():
        if possible := getattr(inspect.getmodule(e.function), "check", None):
            try:
                possible((*lms, *moving), eval_data, **e.hyper)
            except ValueError as error:
                raise ValueError(f"evals.{name}: {error}") from error
    model = policy.config

    def assemble(params: Params, lms: Mapping[str, LM]) -> LM:
        if adapters is None:
            return LM(model, params)
        return lora.attach(lms["base"], params, adapters)

    if adapters:
        key = jax.random.key(config.seed)
        policy = LM(model, lora.init(policy, adapters, key))
    if (config.reference_cache or config.reference_data) and data is not None:
        if "ref" not in lms or config.mixture:
            raise ValueError(
                "reference_cache and reference_data need a frozen lms.ref and config.data "
                "(no mixture)"
            )
        data = cached(config, data, text, lms["ref"], examples, mesh)
    if config.rollout.reward and examples is not None:
        data = rollouts(
            config, examples, text, loss, lms, moving, policy, assemble, mesh, workdir
        )  # fmt: skip
    # Last, so that a config that cannot run leaves nothing behind.
    folder = prepare(workdir, config)
    if adapters:
        adapted.note(folder, config.model.path, lms["base"].params)
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else _quiet
    if data is not None:
        rolled = f"{len(examples)} prompts" if config.rollout.reward else ""
        say(f"data: {rolled or summary(data.report())}")
    if eval_data is not None:
        size = config.eval_batch_size or config.batch_size
        batches = source.eval_batches(
            eval_data, text, batch_size=size, length=config.length,
            vocab_size=policy.config.vocab_size,
        )  # fmt: skip
        say(f"evaluation data: {summary(batches.report)}")
    return Run(
        epath.Path(folder).name, folder, mesh, text, policy, assemble, lms, tuple(moving),
        loss, rate, tx, data, evals, eval_data, say,
    )  # fmt: skip


def frozen(need: str) -> str | None:
    """The name of the frozen LM that fills a need of a loss; None if none does."""
    if need in logprob.COMPARED:
        return "ref"
    name = need.removesuffix("_logps")
    return None if name in (need, "old") else name


def check(config) -> None:
    """Raises ValueError for sections that contradict each other; the key is named."""
    if config.shaping and not config.rollout.reward:
        raise ValueError("config.shaping needs rollouts: set config.rollout.reward")
    if config.best_mode not in ("max", "min"):
        raise ValueError(f"best_mode is {config.best_mode!r}, expected 'max' or 'min'")
    names = [f"eval/{name}/" for name in config.evals]
    if config.best_metric and not config.best_metric.startswith(tuple(names)):
        raise ValueError(
            f"best_metric {config.best_metric!r} begins with none of {names}"
        )
    if config.patience and not (config.best_metric and config.eval_every):
        raise ValueError("patience needs best_metric and eval_every")
    if config.average_every < 1:
        raise ValueError(
            f"average_every is {config.average_every}, expected at least 1 step"
        )
    if config.average and 0 < config.num_steps < config.average_every:
        raise ValueError(
            f"average_every is {config.average_every}: the average would not move in "
            f"{config.num_steps} steps"
        )
    if config.lora.rank and "base" in config.lms:
        raise ValueError("lms.base is the base of the adapters; take another name")
    if config.num_steps and bool(config.data) == bool(config.mixture):
        raise ValueError("a run that trains needs either config.data or config.mixture")
    for part, spec in config.mixture.items():
        if "ratio" not in spec:
            raise ValueError(f"mixture.{part} has no 'ratio'")
    sections = {"loss": config.loss, "data": config.data, "eval_data": config.eval_data}
    sections["reference_data"] = config.reference_data
    sections |= {f"mixture.{k}": v for k, v in config.mixture.items()}
    for name, spec in sections.items():
        if (spec or name == "loss") and "name" not in spec:
            raise ValueError(f"config.{name} has no 'name'")


def bind(config, folder: str, spec: Any) -> plugin.Bound:
    """Loads the plug-in that a config section names; the other keys are its own."""
    spec = _inner_dicts(spec)
    return plugin.load(folder, spec.pop("name"), spec)


def bind_loss(config) -> plugin.Bound:
    """The loss of a config, under its reweightings; what it needs, from which LMs."""
    weights = [
        bind(config, "reweight", {"name": name, **hyper})
        for name, hyper in config.reweight.items()
    ]
    loss = plugin.compose(bind(config, "losses", config.loss), weights)
    mode = loss.hyper.get("reduction", masked.MODES[0])
    if mode not in masked.MODES:
        raise ValueError(
            f"{loss.name}: reduction={mode!r} is not one of {', '.join(masked.MODES)}"
        )
    return loss._replace(needs=matched(loss.needs, list(config.lms)))


def matched(needs: Sequence[str], lms: Sequence[str]) -> tuple[str, ...]:
    """Needs with one for each LM in the place of a pattern: 'aligned*_logps'.

    A pattern that no LM matches stays, and is missing like any other need.
    """
    columns = [f"{name}_logps" for name in lms]
    out: list[str] = []
    for need in needs:
        out += fnmatch.filter(columns, need) or [need]
    return tuple(dict.fromkeys(out))


def load_examples(spec: Any, drop: tuple[str, ...] = ()) -> Sequence[Example]:
    """The examples that a data section describes."""
    spec = {k: v for k, v in _inner_dicts(spec).items() if k not in drop}
    return plugin.load("data", spec.pop("name"), spec)()


def _inner_dicts(spec) -> dict[str, Any]:
    """A section as plain dicts, also inside: plug-ins know nothing of ConfigDict."""
    return {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in spec.items()}


def tokenizer_path(config) -> str:
    """The tokenizer a config means: its own, or the one that lies with the weights."""
    if config.tokenizer:
        return config.tokenizer
    if not config.model.path:
        raise ValueError(
            "config.tokenizer is empty and config.model.path names no weights"
        )
    path = config.model.path
    if inner := saved_config(path):
        inner["model"]["path"] = adapted.find(run_folder(path), inner["model"]["path"])
        return inner["tokenizer"] or tokenizer_path(_Plain(inner))
    if lora.is_peft(path) and not (epath.Path(path) / "tokenizer.json").exists():
        return lora.peft_base(path)
    return path


class _Plain(dict):
    """Attribute access to a plain dict."""

    def __getattr__(self, name):
        value = self[name]
        return _Plain(value) if isinstance(value, dict) else value


def model_config(config, vocab_size: int) -> ModelConfig:
    """The architecture that config.model.sizes describes (training from scratch)."""
    sizes = {"vocab_size": vocab_size, **config.model.sizes}
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(sizes) - known)
    if unknown:
        raise ValueError(f"model.sizes has no {unknown}; it takes {sorted(known)}")
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    return ModelConfig(**sizes)


def make_policy(config, text: tokenizer.Tokenizer) -> LM:
    """The policy a run starts from, on the host.

    Raises:
      ValueError: neither path nor sizes; a tokenizer with more ids than the model; rows
        longer than the model's context.
    """
    m = config.model
    if m.path:
        lm = load_lm(m.path)
    elif m.sizes:
        lm_config = model_config(config, text.vocab_size)
        lm = LM(lm_config, transformer.init(lm_config, jax.random.key(config.seed)))
    else:
        raise ValueError(
            "config.model needs a path to weights, or sizes to start from scratch"
        )
    if text.vocab_size > lm.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {text.vocab_size} ids, the model only {lm.config.vocab_size}"
        )
    if config.length > lm.config.max_length:
        raise ValueError(
            f"config.length={config.length} is beyond the model's context of {lm.config.max_length}"
        )
    lm = with_value_head(lm, m.value_head)
    params = jax.tree.map(lambda x: jnp.asarray(x, m.param_dtype), lm.params)
    return LM(dataclasses.replace(lm.config, dtype=m.dtype, remat=m.remat), params)


def cached(config, data, text, ref: LM, examples, mesh: Mesh) -> source.Source:
    """The source with reference log-probs computed once, or read from the cache."""

    def whole(examples):
        return source.eval_batches(
            examples, text, batch_size=config.batch_size, length=config.length,
            buckets=config.buckets,
        )  # fmt: skip

    rows = read = whole(examples)
    if config.reference_data:
        read = whole(load_examples(config.reference_data))
    key = refcache.describe(ref, read, tokenizer=text.fingerprint, length=config.length)
    folder = checkpoint.absolute(config.reference_cache or ".")
    path = folder / "reference.npz"
    if config.reference_cache and everywhere(path.exists(), f"{path} is there"):
        table = refcache.load(path, key)
    else:
        table = refcache.compute(read, lambda batch: scorer(mesh)(ref, batch).logps)
        if config.reference_cache and jax.process_index() == 0:
            refcache.save(path, table, key)
    if config.reference_data:
        table = refcache.transfer(rows, read, table)
    return refcache.attach(data, table)


def rollouts(
    config, examples, text, loss: plugin.Bound, lms: dict[str, LM],
    moving: Sequence[str], policy: LM, assemble: Callable, mesh: Mesh, workdir: str,
) -> source.Source:  # fmt: skip
    """The source of a run that learns from the policy's own responses."""
    if config.mixture or config.reference_cache or config.reference_data:
        raise ValueError(
            "rollouts take config.data, without reference_cache or reference_data"
        )
    steps = shaping.in_order(
        bind(config, "shaping", {"name": name, **hyper})
        for name, hyper in config.shaping.items()
    )
    given = [f"shaping.{name}" for name, h in config.shaping.items() if "beta" in h]
    needs = {n for s in (loss, *steps) for n in s.needs}
    if {"state_values", "old_values"} & needs and not policy.config.value_head:
        raise ValueError("a critic needs config.model.value_head=True")
    if "advantages" in loss.needs and not steps:
        raise ValueError(f"loss {loss.name!r} needs advantages: set config.shaping")
    if steps and sum(s.stage == "advantage" for s in steps) != 1:
        names = [s.name for s in steps]
        raise ValueError(f"config.shaping has {names}: one of them makes advantages")
    if steps and "advantages" not in loss.needs:
        raise ValueError(
            f"loss {loss.name!r} reads no advantages: empty config.shaping"
        )
    slots = config.rollout.group + bool(config.rollout.anchor)
    if config.rollout.keep == "all" and slots == 2 and not steps:
        raise ValueError(
            f"loss {loss.name!r} takes two responses for (chosen, rejected): "
            "config.rollout.keep='best_worst' puts them in that order"
        )
    if "returns" in loss.needs and not any(s.returns for s in steps):
        raise ValueError(f"loss {loss.name!r} needs returns: config.shaping.gae = {{}}")
    check_required(config, loss, steps)
    missing = [n for s in steps for n in s.needs if frozen(n) not in (None, *lms)]
    behaviour, shown = config.rollout.policy, config.rollout.anchor  # names
    missing += [behaviour] if behaviour not in ("", *lms) else []
    missing += [shown] if shown not in ("", *lms, *moving) else []
    if missing:
        raise ValueError(
            f"rollouts need {missing}: add config.lms, there are {sorted((*lms, *moving))}"
        )

    if shown in moving and any(s.baseline in shaping.OF_REFERENCE for s in steps):
        raise ValueError(
            f"rollout.anchor={shown!r} moves, but the shaping compares with rewards of "
            "lms.ref, which does not: rollout.anchor='ref'"
        )

    def anchor(average: Params | None) -> LM:
        return lms[shown] if shown in lms else assemble(average, lms)

    judged = sampler.Sampler(
        generator(text, mesh), rewards.load(_inner_dicts(config.rollout.reward)), lms, text,
        max_new=config.rollout.max_new, temperature=config.rollout.temperature,
        truncated=config.rollout.truncated, punishment=config.rollout.punishment,
        overlong_buffer=config.rollout.overlong_buffer,
        overlong_penalty=config.rollout.overlong_penalty, score=scorer(mesh),
    )  # fmt: skip
    baseline = None
    if any(s.baseline in shaping.OF_REFERENCE for s in steps):
        if "ref" not in lms:
            raise ValueError("rewards of reference samples need a frozen lms.ref")
        baseline = reference_rewards(config, examples, judged, workdir)
    return rollout.rollout_source(
        examples, judged, policy=lambda params: assemble(params, lms), score=scorer(mesh),
        shaping=with_strength(steps, loss, given), batch_size=config.batch_size,
        length=config.length, seed=config.seed, group=config.rollout.group,
        batches=config.rollout.batches, epochs=config.rollout.epochs,
        keep=config.rollout.keep, needs=loss.needs, baseline=baseline,
        behaviour=lms[behaviour] if behaviour else None,
        dynamic_sampling=config.rollout.dynamic_sampling,
        max_draws=config.rollout.max_draws, anchor=anchor if shown else None,
        anchor_samples=config.rollout.anchor_samples,
        host=(jax.process_index(), jax.process_count()),
    )  # fmt: skip


def check_required(config, loss: plugin.Bound, steps: Sequence[plugin.Bound]) -> None:
    """Raises ValueError for rollouts that are not those a loss is made for.

    The loss's REQUIRES says what a key of the config has to be: a number or a name, one of
    several, or, where that has a dot, what another key is.
    """
    said = {f"loss.{k}": v for k, v in loss.hyper.items()}
    said |= {f"rollout.{k}": v for k, v in config.rollout.items()}
    said |= {f"{s.name}.{k}": v for s in steps for k, v in s.hyper.items()}
    for key, what in loss.requires.items():
        other = isinstance(what, str) and "." in what
        want = said[what] if other else what
        allowed = want if isinstance(want, tuple) else (want,)
        if said.get(key) not in allowed:
            expected = " or ".join(
                f"{x:g}" if isinstance(x, float) else str(x) for x in allowed
            )
            raise ValueError(
                f"loss {loss.name!r}: {key} is {said.get(key, 'absent')}, expected {expected}"
                + f", which is {what}" * other
            )


def with_strength(
    steps: Sequence[plugin.Bound], loss: plugin.Bound, given: Collection[str] = ()
) -> list[plugin.Bound]:
    """The shapings, with the run's KL strength as 'beta' of each reward that takes one.

    That is the sum of what penalties call 'beta'. Beside a loss on advantages with a KL of
    its own it is 0, for none: that loss's gradient is not of the KL of whole responses
    (see `ratios.kl`), to which no strength would be right. A reward that is made for a
    strength (a tabulated optimum) is wrong at any other.

    Args:
      steps: the shapings.
      loss: the loss.
      given: names of the shapings whose beta the config states itself.

    Raises:
      ValueError: it states another than the run has; a reward that needs a strength, and
        there is none.
    """
    penalties = [s for s in steps if s.stage == "penalty"]
    in_loss = {"advantages", "ref_logps"} <= {*loss.needs} and "beta" in loss.hyper
    strength = (
        0.0 if in_loss else float(sum(b.hyper.get("beta", 0.0) for b in penalties))
    )
    penalties += [loss] * in_loss
    out = []
    for s in steps:
        if s.stage == "reward" and "beta" in s.hyper:
            own = s.hyper["beta"]
            if s.name in given and not math.isclose(own, strength, rel_tol=1e-6):
                raise ValueError(
                    f"{s.name} is made for a KL strength of {own}, the run has {strength:g} "
                    f"({', '.join(b.name for b in penalties) or 'no penalty'}): leave its "
                    "beta out"
                )
            s = s._replace(hyper={**s.hyper, "beta": strength})
        if possible := getattr(inspect.getmodule(s.function), "check", None):
            try:
                possible(**s.hyper)
            except ValueError as error:
                raise ValueError(f"{s.name}: {error}") from error
        out.append(s)
    return out


def reference_rewards(
    config, examples, judged: sampler.Sampler, workdir: str
) -> Callable[[], sampler.Baseline]:
    """What gives rewards of reference samples of every prompt the run may meet.

    They are drawn when they are first asked for, and kept for whoever asks again: another
    run with the same folder, or this one when it goes on.

    Raises:
      ValueError: what is kept there is of something else.
    """
    batches = config.rollout.batches
    places = -(-config.num_steps // (batches * config.rollout.epochs)) * batches
    places *= config.rollout.max_draws if config.rollout.dynamic_sampling else 1
    some = rollout.visited(examples, config.batch_size, config.seed, places)
    settings = {
        "samples": config.rollout.reference_samples, "length": config.length,
        "rows": config.batch_size * config.rollout.group, "seed": config.seed,
    }  # fmt: skip
    ref = judged.lms["ref"]
    prompts = hashlib.sha256(rollout.contents(some).encode())
    others = {  # a reward may be one of them
        f"lms.{name}": f"{int(checkpoint.checksum(lm.params)):08x}"
        for name, lm in judged.lms.items()
        if name not in ("ref", "base")
    }
    key = refcache.describe_lm(
        ref, data=prompts.hexdigest()[:16], **settings, **judged.identity(), **others
    )
    folder = checkpoint.absolute(config.rollout.cache or workdir)
    path = folder / "reference_rewards.npz"
    kept: sampler.Baseline | None = None
    if everywhere(path.exists(), f"{path} is there"):
        kept = sampler.untable(
            refcache.load(path, key, **REWARDS), [e.id for e in some]
        )

    def baseline() -> sampler.Baseline:
        if kept is not None:
            return kept
        found = sampler.reference_rewards(some, judged, ref, **settings)
        if jax.process_index() == 0:
            refcache.save(path, sampler.table(found), key)
        return found

    return baseline


def lora_settings(config) -> lora.Lora | None:
    """The adapters that a config asks for; None for a rank of 0."""
    if not config.lora.rank:
        return None
    return lora.Lora(**{**config.lora, "targets": tuple(config.lora.targets)})


def load_lm(path: str) -> LM:
    """Weights from a run's folder, a Hugging Face or PEFT directory, or a .gguf file.

    Adapters are merged into their base, cast as they were trained on it.

    Raises:
      ValueError: adapters that do not know their base, or whose base is another now.
      FileNotFoundError: no model there, or no base of the adapters.
    """
    if lora.is_peft(path):
        base = load_lm(lora.peft_base(path))
        return lora.merge(base, *lora.load(path, base))
    if not checkpoint.holds(path):
        return load.load(path)
    lm = checkpoint.load_lm(path)
    if not lora.is_adapters(lm.params):
        return lm
    config, folder = _Plain(saved_config(path) or {}), run_folder(path)
    if not config or not (folder / adapted.NAME).exists():
        raise ValueError(
            f"{path} holds adapters, and no config.json and {adapted.NAME} beside it "
            "that say on which base"
        )
    if there := adapted.find(folder, config.model.path):
        base = load_lm(there)
    else:
        plain = dataclasses.replace(lm.config, value_head=False)
        base = LM(plain, transformer.init(plain, jax.random.key(config.seed)))
    params = with_value_head(base, lm.config.value_head).params
    params = jax.tree.map(lambda x: jnp.asarray(x, config.model.param_dtype), params)
    adapted.check(folder, there, params)
    base = LM(lm.config, params)
    return lora.merge(base, lm.params, cast(lora.Lora, lora_settings(config)))


def run_folder(path: str) -> epath.Path:
    """The folder of the run that a path belongs to: also of its 'best'."""
    folder = epath.Path(path)
    return folder.parent if folder.name in ("best", "checkpoints") else folder


def saved_config(path: str) -> dict[str, Any] | None:
    """The config of the run that a folder belongs to (also its 'best'); None of no run."""
    file = run_folder(path) / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    return config if "batch_size" in config else None


def with_value_head(lm: LM, wanted: bool) -> LM:
    """The same LM with (at zero) or without a scalar head."""
    if wanted == lm.config.value_head:
        return lm
    params = {k: v for k, v in lm.params.items() if k != "value_head"}
    if wanted:
        params["value_head"] = {"kernel": jnp.zeros(lm.config.width)}
    return LM(dataclasses.replace(lm.config, value_head=wanted), params)


def everywhere(here: bool, what: str) -> bool:
    """Whether it holds on every host.

    Raises:
      ValueError: it holds on some hosts only; they would part ways.
    """
    if jax.process_count() == 1:
        return here
    hosts = multihost_utils.process_allgather(np.array(here))
    if hosts.any() != hosts.all():
        names = np.flatnonzero(hosts).tolist()
        raise ValueError(f"{what} only on hosts {names}: name a folder that all share")
    return bool(hosts.all())


def check_owner(workdir: str, config) -> None:
    """Raises ValueError if the workdir holds a run of another config; keys are listed."""
    folder = checkpoint.absolute(workdir)
    path = folder / "config.json"
    if not path.exists():
        return
    a, b = _flat(json.loads(path.read_text())), _flat(plain(config))
    differ = [
        f"{k} ({a.get(k, 'absent')} there, {b.get(k, 'absent')} here)"
        for k in sorted({*a, *b})
        if a.get(k) != b.get(k) and not k.startswith(VOLATILE)
    ]
    if differ:
        raise ValueError(
            f"{folder} holds a run of another config; take another workdir or undo: "
            + "; ".join(differ)
        )


def prepare(workdir: str, config) -> str:
    """Makes the workdir and writes the config there.

    Raises:
      OSError: it cannot be written.
    """
    folder = checkpoint.absolute(workdir)
    path, now = folder / "config.json", plain(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to workdir {folder}: {error.strerror}") from error
    if jax.process_index() == 0:
        fresh = folder / ".config.json"  # a kill must not leave half of it
        fresh.write_text(json.dumps(now, indent=1))
        fresh.replace(path)
    return str(folder)


def plain(config) -> dict[str, Any]:
    """A config as JSON holds it."""
    return json.loads(json.dumps(config.to_dict()))


def _flat(tree, prefix="") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


def summary(report: dict[str, Any]) -> str:
    """How many examples were read, used, cut, dropped and malformed, and which."""
    names = ("read", "used", "cut", "dropped", "malformed")
    text = (
        ", ".join(f"{report[n]} {n}" for n in names)
        + f", {report['padding']:.1%} padding"
    )
    for name in ("dropped_ids", "malformed_ids"):
        text += "".join(
            f"\n  {name.removesuffix('_ids')}: {line}" for line in report[name]
        )
    return text


@functools.cache
def compiled_score(mesh: Mesh, needs: tuple[str, ...]) -> Callable:
    """score(lm, batch) of batches that are spread over the mesh, for every host."""
    whole = NamedSharding(mesh, P())  # every host reads the result
    score = functools.partial(logprob.score, mesh=mesh, needs=needs)
    return jax.jit(score, out_shardings=whole)


def scorer(mesh: Mesh) -> Callable:
    """score(lm, batch, needs, ...) -> Scores on the host; every host holds the batch."""
    rows = NamedSharding(mesh, sharding.BATCH)

    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def score(lm, batch, needs=(), **more):
        many = len(batch.tokens)
        # copies of the first row fill up what does not divide; they are cut off again
        at = np.r_[:many, np.zeros(-many % shards, int)]
        batch = jax.device_put(jax.tree.map(lambda x: np.asarray(x)[at], batch), rows)
        out = jax.device_get(compiled_score(mesh, tuple(needs))(lm, batch, **more))
        return jax.tree.map(lambda x: x[:many], out)

    return score


def generator(text: tokenizer.Tokenizer, mesh: Mesh) -> Callable:
    """decode.generate that ends at the tokenizer's EOS, prompts spread over the mesh."""
    eos_ids = sorted(text.eos_ids)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def generate(lm, prompts, lengths, key, **settings):
        spec = P() if len(prompts) % shards else sharding.BATCH
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
        prompts, lengths = place(np.asarray(prompts)), place(np.asarray(lengths))
        out = decode.generate(lm, prompts, lengths, key, eos_ids=eos_ids, **settings)
        if jax.process_count() > 1:
            out = multihost_utils.process_allgather(out, tiled=True)
        return out

    return generate


def evaluate(run: Run, lm: LM, lms: dict[str, LM], step: int, config) -> Metrics:
    """Runs the config's evaluations; names are 'eval/<evaluation>/<metric>'."""
    generate = generator(run.tokenizer, run.mesh)
    out: Metrics = {}
    for name, evaluation in run.evals.items():
        got = evaluation(
            lm, lms, run.eval_data, key=jax.random.key(config.seed), tokenizer=run.tokenizer,
            generate=generate, score=scorer(run.mesh), batch_size=config.eval_batch_size or config.batch_size,
            length=sampled_length(config, evaluation),
        )  # fmt: skip
        out["samples"] = out.get("samples", []) + got.pop("samples", [])
        out |= {f"eval/{name}/{k}": v for k, v in got.items()}
    if out and jax.process_index() == 0:
        run.say(f"evaluation at step {step}\n{table(out)}")
    return out


def sampled_length(config, evaluation: plugin.Bound) -> int:
    """Tokens that an evaluation may read: of a prompt, where it samples responses itself.

    In a run with rollouts prompts are cut there as they are cut in these.
    """
    samples = "max_new" in evaluation.hyper and config.rollout.reward
    return config.length - config.rollout.max_new * bool(samples)


def table(metrics: Metrics) -> str:
    """Metrics as aligned lines, an interval beside its value."""
    names = [k for k in metrics if not k.endswith(("/lo", "/hi")) and k != "samples"]
    width = max(map(len, names), default=0)
    lines = []
    for k in names:
        line = f"  {k:<{width}}  {metrics[k]:.4g}"
        if f"{k}/lo" in metrics:
            line += f"  [{metrics[f'{k}/lo']:.4g}, {metrics[f'{k}/hi']:.4g}]"
        lines.append(line)
    return "\n".join(lines)


def finish(config, run: Run, metrics: Metrics, record) -> None:
    """Says where the best checkpoint is, and draws the curves."""
    if record["value"] is not None:
        run.say(
            f"best {config.best_metric} {record['value']:.4g} at step {record['step']}"
        )
    if jax.process_index() == 0 and config.plots and read(run.workdir):
        for path in plots.plot(run.workdir):
            run.say(f"drew {path}")


def run_stages(config, workdir: str, train):
    """Trains the stages of a config in order; 'stage:NAME' is the folder of one.

    A stage is a whole config: nothing beside `stages` is read.

    Returns:
      The last stage's TrainState.
    """
    state, folder = None, checkpoint.absolute(workdir)
    for name, stage in config.stages.items():
        stage = stage.copy_and_resolve_references()
        stage.model.path = _stage_path(stage.model.path, folder)
        for lm, path in stage.lms.items():
            stage.lms[lm] = _stage_path(path, folder)
        print(f"\n== {name} ==", flush=True)
        state = train(stage, str(folder / name))
    results: Metrics = {}
    samples = []
    for name in config.stages:
        merged: Metrics = {}
        for row in read(folder / name):
            merged |= {k: v for k, v in row.items() if k.startswith("eval/")}
        results |= {f"{name}/{k.removeprefix('eval/')}": v for k, v in merged.items()}
        with contextlib.suppress(FileNotFoundError):
            samples.append(f"# {name}\n\n" + (folder / name / "samples.md").read_text())
    print(f"\n== results ==\n{table(results)}", flush=True)
    (folder / "samples.md").write_text(
        "\n".join(s for s in samples if s.count("\n") > 2)
    )
    for path in plots.plot(folder):
        print(f"drew {path}", flush=True)
    return state


def _stage_path(path: str, folder: epath.Path) -> str:
    return (
        str(folder / path.removeprefix("stage:")) if path.startswith("stage:") else path
    )


def explain(config) -> str:
    """Parameters, shapes, specs and bytes per device, without reading any weights."""
    if config.get("stages"):
        parts = (f"== {name} ==\n{explain(c)}" for name, c in config.stages.items())
        return "\n".join(parts)
    mesh = sharding.make_mesh(config.mesh)
    if config.model.sizes:
        vocab_size = (
            config.model.sizes.get("vocab_size")
            or tokenizer.load(config.tokenizer).vocab_size
        )
        model = model_config(config, vocab_size)
        shapes = jax.eval_shape(
            functools.partial(transformer.init, model), jax.random.key(0)
        )
    else:
        lm = load_lm(config.model.path)
        model, shapes = lm.config, lm.params
    if adapters := lora_settings(config):
        draw = functools.partial(lora.init, LM(model, shapes), adapters)
        trained = jax.eval_shape(draw, jax.random.key(0))
    else:
        trained = _cast(shapes, config.model.param_dtype)
    lines = []
    for tree in (shapes, trained) if adapters else (shapes,):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = sharding.path_string(path)
            spec = sharding.spec(name, leaf.shape, mesh)
            lines.append(f"  {name:<32} {tuple(leaf.shape)!s:<28} {spec}")
    total = transformer.num_params(shapes)
    lines.append(
        f"{total:,} parameters, {model.num_layers} layers, mesh {dict(mesh.shape)}"
    )
    others = {v for v in config.lms.values() if v != "average"}
    kept = ""
    if adapters:
        others -= {"init"}  # that is the base
        count = transformer.num_params(trained)
        flops = flops_per_token(count, "train", frozen=total)
        lines.append(
            f"{count:,} of adapters are trained ({count / total:.2%}), "
            f"{flops / (6 * total):.0%} of the FLOPs of training all"
        )
        kept = f"{_size(trained, mesh)} of adapters, "
    tx = optim.make_tx(0.0, **{k: v for k, v in config.optim.items() if k not in RATE})
    state = jax.eval_shape(tx.init, trained)
    lines.append(
        f"per device: {_size(_cast(shapes, config.model.param_dtype), mesh)} a copy; "
        f"{1 + len(others)} copies ({'base' if adapters else 'policy'}, frozen LMs), "
        f"{kept}{_size(trained, mesh)} of gradient, {_size(state, mesh)} of "
        f"{config.optim.name} state"
    )
    return "\n".join(lines)


def _cast(tree, dtype: str):
    """The shapes of a tree of parameters in another dtype."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), tree)


def _size(tree, mesh: Mesh) -> str:
    """What a tree takes on one device."""

    def one(x, place):
        return math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize

    sizes = jax.tree.map(one, tree, sharding.shardings(tree, mesh))
    size = sum(jax.tree.leaves(sizes))
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def _quiet(_: str) -> None:
    """What processes other than the first say."""
