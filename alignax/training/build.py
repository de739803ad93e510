"""From a config to the pieces of a run; nothing compiles before all of it is known."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import optax
from etils import epath
from jax.sharding import Mesh

from alignax import plugin, rewards
from alignax.batch import LM, Example, Params
from alignax.inputs import forms, prompts, reference_cache, row_store, source
from alignax.inputs.rows import Rows
from alignax.models import lora, sharding
from alignax.reports import tables
from alignax.runs import adapter_base, checkpoint, model_paths, workdirs
from alignax.runs.model_paths import ModelPath
from alignax.sampling.automaton import Automaton
from alignax.text import tokenizer
from alignax.training import checks, defaults, loading, on_policy, optim, parallel
from alignax.training.plugins import Plugins, has_rollouts, trains
from alignax.training.step import with_average

REWARDS = ("reward", "scorer", "evaluator")  # of an evaluation: what they judge with


class Pieces(NamedTuple):
    """What an optimiser step is made of: all that training needs besides data."""

    policy: LM  # its parameters are those that are trained
    assemble: Callable[[Params, Mapping[str, LM]], LM]  # from them, the whole policy
    lms: dict[str, LM]  # frozen, on the mesh
    moving: tuple[str, ...]  # names that mean the policy's average
    rate: Callable
    tx: optax.GradientTransformation


class Run(NamedTuple):
    """The pieces of a run."""

    config: Any  # what it was built from, with the number of steps
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
    asked: dict[str, prompts.Usable]  # evaluation -> those whose prompts are usable
    say: Callable[[str], None]
    grammar: Automaton | None  # under which rollouts are scored

    def frozen(self, average: Params | None) -> dict[str, LM]:
        """The frozen LMs, with the policy's average under the names that mean it."""
        return dict(with_average(self.lms, self.moving, self.assemble, average))


def build(config, workdir: str, model: ModelPath | None = None) -> Run:
    """Checks a config, reads its data and weights, and puts the run together.

    Args:
      config: a ConfigDict.
      workdir: of the run.
      model: from `loading.model_path`, where that is known already.

    Raises:
      ValueError, OSError: what is wrong, and where; the workdir is not touched by a
        config that cannot run.
    """
    plugins = checks.check(config)
    workdirs.check_owner(workdir, config, defaults.get_config())
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_hosts(mesh)
    sharding.check_batch_size(config.batch_size, config.accumulate, mesh)
    sharding.check_batch_size(config.eval_batch_size or config.batch_size, 1, mesh)
    model = model or loading.model_path(config)
    text = loading.load_tokenizer(config, loading.tokenizer_path(config, model))
    # Data that the loss or an evaluation cannot read are refused before weights are read.
    examples = training_examples(config, plugins.loss, text)
    config = counted(config, examples, workdir)
    if plugins.reward is not None:
        rewards.check(plugins.reward, examples)
    plugins, eval_data = evaluation_data(config, plugins)
    names = (*checks.frozen_names(config), *checks.moving_names(config))
    check_evaluations(plugins.evals, names, eval_data)
    whole = loading.make_policy(config, text, model, mesh)
    if text.pad_id >= whole.config.vocab_size:  # nothing is ever read from it
        text = dataclasses.replace(text, pad_id=text.eos_id)
    check_context(config, plugins.evals, whole.config.max_length)
    # of the weights as they are read, before they are quantised
    checksum = checkpoint.fingerprint(whole.params) if config.lora.rank else ""
    policy, assemble, lms, moving, rate, tx = pieces(config, whole, mesh, text=text)
    del whole  # with adapters, its weights are on the mesh now
    readers = [policy, *(lm for lm in lms.values() if not lm.config.tokenizer)]
    ids = min(lm.config.vocab_size for lm in readers)
    data = training_source(config, examples, text, ids, mesh)
    if (config.reference_cache or config.reference_data) and data is not None:
        data = cached(config, data, text, lms["ref"], examples, mesh)
    if has_rollouts(config) and examples is not None:
        data = on_policy.rollouts(
            config, examples, text, plugins, lms, assemble, mesh, workdir
        )
    asked = evaluated_prompts(config, plugins.evals, eval_data, text)
    # Last, so that a config that cannot run leaves nothing behind.
    folder = workdirs.prepare(workdir, config)
    if config.lora.rank:
        adapter_base.note(folder, config.model.path, checksum)
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else _quiet
    run = Run(
        config, epath.Path(folder).name, folder, mesh, text, policy, assemble, lms, moving,
        plugins.loss, rate, tx, data, plugins.evals, eval_data, asked, say,
        on_policy.grammar(config, plugins.loss.needs, text),
    )  # fmt: skip
    describe_data(config, run, examples)
    return run


def evaluation_data(
    config, plugins: Plugins
) -> tuple[Plugins, Sequence[Example] | None]:
    """The plug-ins and the examples of the evaluations, or no evaluations and None.

    Raises:
      ValueError: the split of the evaluations is to have no rows (test_fraction=0), but
        the best checkpoint is chosen by it.
    """
    examples = plugin.load_examples(config.eval_data) if config.eval_data else None
    if examples is None or len(examples):
        return plugins, examples
    if config.best_metric.startswith("eval/"):
        raise ValueError(
            f"best_metric is {config.best_metric!r}, but eval_data has no rows at "
            "test_fraction=0: set another fraction, or best_metric=''"
        )
    return plugins._replace(evals={}), None


def check_context(config, evals: Mapping[str, plugin.Bound], context: int) -> None:
    """Raises ValueError for evaluations whose responses are beyond the context."""
    for name, e in evals.items():
        longest = config.length + e.hyper.get("max_new", 0)
        if longest > context:
            raise ValueError(
                f"evals.{name}: config.length + max_new = {longest} is beyond the "
                f"context of the policy, {context}"
            )


def evaluated_prompts(
    config, evals: Mapping[str, plugin.Bound], data: Sequence[Example] | None,
    text: tokenizer.Tokenizer,
) -> dict[str, prompts.Usable]:  # fmt: skip
    """The examples that each sampling evaluation can ask for a response to.

    Raises:
      ValueError: an evaluation without a usable prompt.
    """
    found: dict[int, prompts.Usable] = {}
    out: dict[str, prompts.Usable] = {}
    for name, e in evals.items():
        if not e.hyper.get("max_new") or data is None:
            continue
        room = sampled_length(config, e)
        try:
            if room not in found:
                found[room] = prompts.usable(data, text, length=room)
        except ValueError as error:
            raise ValueError(f"evals.{name}: {error}") from error
        out[name] = found[room]
    return out


def sampled_length(config, evaluation: plugin.Bound) -> int:
    """Tokens that an evaluation may read: of a prompt, where it samples responses itself.

    In a run with rollouts prompts are cut there as they are cut in these.
    """
    samples = "max_new" in evaluation.hyper and has_rollouts(config)
    return config.length - config.rollout.max_new * bool(samples)


def check_evaluations(
    evals: Mapping[str, plugin.Bound], lms: Sequence[str],
    data: Sequence[Example] | None,
) -> None:  # fmt: skip
    """Raises ValueError for evaluations that refuse the data or the LMs of a run."""
    for name, e in evals.items():
        for spec in (e.hyper.get(key) for key in REWARDS):
            if spec and data is not None:
                try:
                    rewards.check(rewards.load(spec), data)
                except ValueError as error:
                    raise ValueError(f"evals.{name}: {error}") from error
        if possible := getattr(inspect.getmodule(e.function), "check", None):
            try:
                possible(lms, data, **e.hyper)
            except ValueError as error:
                raise ValueError(f"evals.{name}: {error}") from error


def training_examples(config, loss: plugin.Bound, text: tokenizer.Tokenizer) -> Any:
    """What a run trains on: rows, or {part: (rows, ratio)}; examples where it rolls out.

    Returns:
      None without steps to train.

    Raises:
      ValueError: rows of a form that the loss does not read; rollouts read prompts alone,
        which all rows have.
    """
    if not trains(config):
        return None
    if has_rollouts(config):
        room = config.length - config.rollout.max_new
        return prompts.usable(plugin.load_examples(config.data), text, length=room)

    def rows(where: str, section: Any) -> Rows:
        spec = plugin.plain_section(section)

        def check(counts: dict[str, Any]) -> None:
            forms.check(counts["forms"], loss.forms, f"loss {loss.name!r}", where, spec)

        return row_store.read(
            spec, text, length=config.length, folder=config.row_cache, check=check
        )

    if not config.mixture:
        return rows("config.data", config.data)
    return {
        k: (rows(f"config.mixture.{k}", spec), spec["ratio"])
        for k, spec in config.mixture.items()
    }


def counted(config, examples: Any, workdir: str):
    """A config whose num_steps are those of its num_epochs, if it has any.

    Args:
      config: a ConfigDict.
      examples: from `training_examples`.
      workdir: of the run.

    Raises:
      ValueError: the average of the parameters would not move in so few steps; the run in
        the workdir has another number of them, and other learning rates.
    """
    if not config.num_epochs:
        return config
    passes = config.rollout.epochs if has_rollouts(config) else 1
    rows = Fraction(str(config.num_epochs)) * len(examples) * passes  # 1.1 is 11 / 10
    steps = math.ceil(rows / config.batch_size)
    config = config.copy_and_resolve_references()
    config.num_steps = steps
    checks.check_run(config)
    workdirs.check_owner(workdir, config, defaults.get_config(), counted=True)
    return config


def training_source(
    config, examples: Any, text: tokenizer.Tokenizer, vocab_size: int, mesh: Mesh
) -> source.Source | None:
    """Batches of `training_examples`; None without any. on_policy makes those of rollouts."""
    if examples is None or has_rollouts(config):
        return None
    return source.dataset_source(
        examples, text, batch_size=config.batch_size, length=config.length,
        buckets=config.buckets, seed=config.seed,
        host=(jax.process_index(), jax.process_count()), vocab_size=vocab_size,
        grid=sharding.grid(config.layout, config.accumulate, mesh),
        balanced=config.layout == "packed",
    )  # fmt: skip


def describe_data(config, run: Run, examples: Any) -> None:
    """Says how many examples were read, used, cut, dropped and malformed."""
    if config.num_epochs:
        run.say(f"num_epochs={config.num_epochs:g}: {config.num_steps} steps")
    if run.source is not None:
        rolled = has_rollouts(config)
        counts = examples.counts if rolled else run.source.report()
        run.say(f"{'prompts' if rolled else 'data'}: {tables.summary(counts)}")
    if run.eval_data is None and config.eval_data:
        run.say("evaluation data: none at test_fraction=0, so there are no evaluations")
    # prompts alone are no rows to score; an evaluation that reads responses refuses them
    sampled = set(run.evals) <= set(run.asked)
    if run.eval_data is not None and not (sampled and not run.eval_data[0].responses):
        batches = source.eval_batches(
            run.eval_data, run.tokenizer, length=config.length,
            batch_size=config.eval_batch_size or config.batch_size,
            vocab_size=run.policy.config.vocab_size,
        )  # fmt: skip
        run.say(f"evaluation data: {tables.summary(batches.report)}")
    for name, data in run.asked.items():
        run.say(f"prompts of evals.{name}: {tables.summary(data.counts)}")


def pieces(
    config, policy: LM, mesh: Mesh, *, text: tokenizer.Tokenizer | None = None,
    load: Callable[..., LM] = loading.load_lm,
) -> Pieces:  # fmt: skip
    """What the step of a config is made of; `preflight` traces it, no array is held.

    Args:
      config: a ConfigDict.
      policy: with all its parameters; adapters are drawn here.
      mesh: devices that hold the frozen LMs.
      text: the tokenizer; None leaves out the check whether the frozen LMs have it too.
      load: what reads the frozen LMs that the config gives a path for.

    Raises:
      ValueError: an unknown optimiser or schedule; an LM that a loss needs and that is
        not there, or that cannot read the rows.
    """
    rate, tx = optim.from_config(config)
    adapters = loading.lora_settings(config)
    lms, moving = place_lms(config, policy, mesh, text=text, load=load)
    model = policy.config

    def assemble(params: Params, lms: Mapping[str, LM]) -> LM:
        if adapters is None:
            return LM(model, params)
        return lora.attach(lms["base"], params, adapters)

    if adapters:
        key = jax.random.key(config.seed)
        # the base of int8 is other weights, whose norms and tables adapters begin with
        start = lms["base"] if config.model.frozen_dtype else policy
        policy = LM(model, lora.init(start, adapters, key))
    return Pieces(policy, assemble, lms, tuple(moving), rate, tx)


def is_own(run: Run) -> bool:
    """Whether the policy's first parameters are placed on the mesh for nothing else."""
    held = {id(x) for lm in run.lms.values() for x in jax.tree.leaves(lm.params)}
    params = run.policy.params
    own = not any(id(x) in held for x in jax.tree.leaves(params))
    return own and sharding.is_placed(params, run.mesh)


def settings(config, pieces: Pieces | Run, loss: plugin.Bound) -> dict[str, Any]:
    """The keywords of `make_train_step` that a config and its loss decide."""
    return dict(
        accumulate=config.accumulate, average=config.average,
        average_every=config.average_every, moving=pieces.moving,
        assemble=pieces.assemble, length=config.length,
        temperature=on_policy.temperature(config, loss.needs),
    )  # fmt: skip


def place_lms(
    config, policy: LM, mesh: Mesh, *, text: tokenizer.Tokenizer | None = None,
    load: Callable[..., LM] = loading.load_lm,
) -> tuple[dict[str, LM], list[str]]:  # fmt: skip
    """The frozen LMs of a config on the mesh, and the names that mean the average.

    Beside adapters the policy's base is one of them, as 'base'. The config of an LM of
    another tokenizer has the path of that tokenizer.

    Raises:
      ValueError: an LM that cannot read the rows: another tokenizer where ids are read,
        or a context that is too short.
    """
    lms: dict[str, LM] = {}
    moving: list[str] = []
    on_mesh = {}  # frozen weights by where they came from

    @functools.cache  # two names may have one path
    def read(path: str) -> tuple[LM, tuple[str, str]]:
        if text is None:
            return load(path), ("", "")
        where = model_paths.resolve(path)
        lm = load(where, dtype=config.model.param_dtype, mesh=mesh)
        return lm, loading.other_tokenizer(where, text)

    readers = checks.readers_of_ids(config)
    if loading.lora_settings(config):
        base = LM(policy.config, loading.frozen(config, policy.params, mesh))
        on_mesh["init"] = lms["base"] = base
    for name, path in config.lms.items():
        if path == "average":
            moving.append(name)
            continue
        lm, (own, found) = (policy, ("", "")) if path == "init" else read(path)
        if lm is policy and lm.config.value_head:
            lm = loading.with_value_head(lm, False)
        if own and name in readers:
            raise ValueError(
                f"lms.{name}: {path} has another tokenizer than the run ({found}), and "
                f"{readers[name]} reads ids: take a model of the run's tokenizer"
            )
        if lm.config.max_length < config.length and not own:
            raise ValueError(
                f"config.length={config.length} is beyond the context of lms.{name}, "
                f"{lm.config.max_length}"
            )
        changes = {**loading.computed(config), "remat": "none", "tokenizer": own}
        lm = LM(dataclasses.replace(lm.config, **changes), lm.params)
        if path in on_mesh:  # one copy of the same weights is enough
            head = "value_head" in lm.params
            there = on_mesh[path].params.items()
            params = {k: v for k, v in there if head or k != "value_head"}
        else:
            params = loading.frozen(config, lm.params, mesh)
        lms[name] = on_mesh[path] = LM(lm.config, params)
    return lms, moving


def cached(config, data, text, ref: LM, examples, mesh: Mesh) -> source.Source:
    """The source with reference log-probs computed once, or read from the cache."""

    packed = config.layout != "rows"  # then T costs nothing, but is a program each

    def whole(examples):
        return source.eval_batches(
            examples, text, batch_size=config.batch_size, length=config.length,
            buckets=(config.length,) if packed else config.buckets,
        )  # fmt: skip

    rows = read = whole(examples)
    if config.reference_data:
        read = whole(plugin.load_examples(config.reference_data))
    key = reference_cache.describe(
        ref, read, tokenizer=text.fingerprint, length=config.length
    )
    folder = checkpoint.absolute(config.reference_cache or ".")
    path = folder / "reference.npz"
    if config.reference_cache and workdirs.everywhere(
        path.exists(), f"{path} is there"
    ):
        table = reference_cache.load(path, key)
    else:
        scorer = parallel.scorer(mesh, packed=packed)
        table = reference_cache.compute(read, lambda batch: scorer(ref, batch).logps)
        if config.reference_cache and jax.process_index() == 0:
            reference_cache.save(path, table, key)
    if config.reference_data:
        table = reference_cache.transfer(rows, read, table)
    return reference_cache.attach(data, table)


def _quiet(_: str) -> None:
    """What processes other than the first say."""
