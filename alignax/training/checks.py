"""What can be wrong in a config, found before any file is read: a function per section.

Where weights and data have to be known (a prompt longer than the context, an id beyond the
vocabulary) the check stands where they are read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from alignax import plugin, shaping
from alignax.batch import OF_BEHAVIOUR
from alignax.models.load import DTYPES
from alignax.plugin import Bound
from alignax.records import files
from alignax.reports import trackers
from alignax.rollouts import rollout, source
from alignax.rollouts.sampler import Sampler
from alignax.sampling import grammars
from alignax.text.dialogues import SPECIALS
from alignax.training import loading, on_policy, optim, ranges
from alignax.training.plugins import Plugins, bind, evaluation, has_rollouts, trains

# What only the policy's own responses bring: a loss that needs one of these needs rollouts.
# Why a loss has a requirement, by its key.
REASONS = {
    "rollout.policy": "it learns from samples of one frozen LM, and the trained policy "
    "moves (lms.base='init' and rollout.policy='base' samples the initial one)"
}
OF_ROLLOUTS = (*OF_BEHAVIOUR, "advantages", "returns", "old_values")


def check(config) -> Plugins:
    """Binds the plug-ins of a config and checks every section of it.

    Raises:
      ValueError: what is wrong; the key and what it may be are named.
    """
    check_sections(config)
    plugins = bind(config)
    check_run(config)
    check_trackers(config)
    check_optim(config)
    check_model(config, plugins)
    check_lms(config, plugins.loss)
    check_data(config)
    check_evals(config, plugins)
    check_rollout(config, plugins)
    return plugins


def frozen_names(config) -> list[str]:
    """Names of the LMs that are frozen; beside adapters the policy's base is one."""
    names = ["base"] if config.lora.rank else []
    return names + [name for name, path in config.lms.items() if path != "average"]


def moving_names(config) -> list[str]:
    """Names of the LMs that are the average of the policy's parameters."""
    return [name for name, path in config.lms.items() if path == "average"]


def keeps_average(config) -> bool:
    """Whether a run keeps a second set of parameters: their average, or a copy of them."""
    return config.average > 0 or bool(moving_names(config))


def check_sections(config) -> None:
    """Numbers are in their ranges, sections are sections, and those of a plug-in name it."""
    ranges.check(config)
    held = {
        f"{of}.{name}": spec
        for of in ("reweight", "shaping", "evals", "mixture")
        for name, spec in config[of].items()
    }
    for name, spec in held.items():
        if not isinstance(spec, Mapping | ConfigDict):
            raise ValueError(f"config.{name} is {spec!r}, expected a section")
    sections = {"loss": config.loss, "data": config.data, "eval_data": config.eval_data}
    sections |= {"reference_data": config.reference_data, "prompts": config.prompts}
    sections |= {k: v for k, v in held.items() if k.startswith("mixture.")}
    sections |= {f"{of}.reward": config[of].reward for of in ("rollout", "generate")}
    for name, spec in sections.items():
        if (spec or name == "loss") and "name" not in spec:
            raise ValueError(f"config.{name} has no 'name'")
        if not isinstance(given := spec.get("name", ""), str):
            raise ValueError(f"config.{name}.name is {given!r}, expected a name")
    if not config.decoder.name and len(config.decoder) > 1:
        others = sorted({*config.decoder} - {"name"})
        raise ValueError(f"config.decoder has no name, but {others}")
    for name, path in config.lms.items():
        if not isinstance(path, str):
            raise ValueError(
                f"lms.{name} is {path!r}, expected 'init', 'average' or a path"
            )


def check_run(config) -> None:
    """The best metric, patience, and the average of the parameters."""
    if config.best_mode not in ("max", "min"):
        raise ValueError(f"best_mode is {config.best_mode!r}, expected 'max' or 'min'")
    names = [f"eval/{name}/" for name in config.evals]
    if config.best_metric and not config.best_metric.startswith(tuple(names)):
        raise ValueError(
            f"best_metric {config.best_metric!r} begins with none of {names}"
        )
    if config.patience and not (config.best_metric and config.eval_every):
        raise ValueError("patience needs best_metric and eval_every")
    if keeps_average(config) and 0 < config.num_steps < config.average_every:
        raise ValueError(
            f"average_every is {config.average_every}: the average would not move in "
            f"{config.num_steps} steps"
        )


def check_trackers(config) -> None:
    """Every tracker is there."""
    for name in config.trackers:
        if not isinstance(name, str):
            raise ValueError(f"config.trackers has {name!r}, expected names")
        trackers.find(name)


def check_optim(config) -> None:
    """The optimiser and its schedule exist and take their settings."""
    optim.from_config(config)
    if config.optim.critic_lr and not config.model.value_head:
        raise ValueError(
            "optim.critic_lr is the rate of the value head: config.model.value_head=True"
        )


def check_model(config, plugins: Plugins) -> None:
    """Where the weights come from, the adapters, and the heads that are needed."""
    m = config.model
    if not m.path and not m.sizes:
        raise ValueError(
            "config.model needs a path to weights, or sizes to start from scratch"
        )
    for key in ("dtype", "param_dtype"):
        if m[key] not in DTYPES:
            raise ValueError(
                f"config.model.{key} is {m[key]!r}, expected one of {', '.join(DTYPES)}"
            )
    if m.frozen_dtype not in (known := ("", *loading.FROZEN_DTYPES)):
        raise ValueError(
            f"config.model.frozen_dtype is {m.frozen_dtype!r}, expected one of {known}"
        )
    loading.lora_settings(config)
    unused = [
        k for k in ("dora", "layers", "ranks", "alphas", "saved") if config.lora.get(k)
    ]
    if config.lora.get("bias", "none") != "none":
        unused.append("bias")
    if unused and not config.lora.rank:
        raise ValueError(
            f"lora.{unused[0]} is set, but lora.rank is 0, which trains all weights"
        )
    needs = {n for s in (plugins.loss, *plugins.shaping) for n in s.needs}
    if "values" in plugins.loss.needs and not m.value_head:
        raise ValueError(
            f"loss {plugins.loss.name!r} needs config.model.value_head=True"
        )
    critic = {"state_values", "old_values"} & needs
    if has_rollouts(config) and trains(config) and critic and not m.value_head:
        raise ValueError("a critic needs config.model.value_head=True")


def check_lms(config, loss: Bound) -> None:
    """The frozen LMs are those that the loss needs."""
    if config.lora.rank and "base" in config.lms:
        raise ValueError("lms.base is the base of the adapters; take another name")
    if empty := [name for name, path in config.lms.items() if not path]:
        raise ValueError(f"lms.{empty[0]} is empty, expected 'init' or a path")
    frozen, moving = frozen_names(config), moving_names(config)
    if moving and not config.average and config.average_every == 1:
        raise ValueError(
            f"lms.{moving[0]}='average' would be the policy itself: set config.average, the "
            "decay of the average, or config.average_every, the steps between two copies"
        )
    own = {*OF_ROLLOUTS} & {*loss.needs}
    if own and not has_rollouts(config):
        raise ValueError(
            f"loss {loss.name!r} needs {sorted(own)}, which rollouts bring: set "
            "config.rollout.reward"
        )
    there = (None, *frozen, *moving)
    missing = [n for n in loss.needs if plugin.frozen_lm(n) not in there]
    if missing:
        raise ValueError(
            f"loss {loss.name!r} needs {missing}: add config.lms, there are "
            f"{sorted(frozen)}"
        )


def readers_of_ids(config) -> dict[str, str]:
    """{name of an LM: what reads the run's ids with it}; another tokenizer cannot.

    A reward model is not among them: it may read text.
    """
    loss = plugin.load_loss(config)
    readers = {
        "rollout.policy": [config.rollout.policy],
        "rollout.anchor": [config.rollout.anchor],
        "generate.draft": [config.generate.draft],
        f"loss {loss.name}": [plugin.frozen_lm(n) for n in loss.needs],
    }
    for name, hyper in config.shaping.items():
        shape = plugin.load_section("shaping", {"name": name, **hyper})
        readers[f"shaping.{name}"] = [plugin.frozen_lm(n) for n in shape.needs]
    for name in config.evals:
        bound = evaluation(config, name).hyper
        named = [v for k, v in bound.items() if isinstance(v, str) and k != "reward"]
        readers[f"evals.{name}"] = named
    return {lm: reader for reader, lms in readers.items() for lm in lms if lm}


def check_data(config) -> None:
    """Data or a mixture, and what a reference that is read once needs."""
    if trains(config) and bool(config.data) == bool(config.mixture):
        raise ValueError("a run that trains needs either config.data or config.mixture")
    sections = {"data": config.data, "eval_data": config.eval_data}
    sections |= {f"mixture.{part}": spec for part, spec in config.mixture.items()}
    for name, spec in sections.items():
        if (specials := spec.get("specials", SPECIALS[0])) not in SPECIALS:
            raise ValueError(
                f"config.{name}.specials is {specials!r}, expected {' or '.join(SPECIALS)}"
            )
        if not isinstance(raw := spec.get("raw", False), bool):
            raise ValueError(f"config.{name}.raw is {raw!r}, expected True or False")
    loading.date(config)
    loading.reading(config)
    for part, spec in config.mixture.items():
        if "ratio" not in spec:
            raise ValueError(f"mixture.{part} has no 'ratio'")
    if config.num_epochs and config.mixture:
        raise ValueError(
            "num_epochs counts passes over config.data; a mixture is drawn by ratios: set "
            "num_steps"
        )
    once = config.reference_cache or config.reference_data
    if not trains(config) or not once:
        return
    if has_rollouts(config):
        raise ValueError(
            "rollouts take config.data, without reference_cache or reference_data"
        )
    if "ref" not in frozen_names(config) or config.mixture:
        raise ValueError(
            "reference_cache and reference_data need a frozen lms.ref and config.data "
            "(no mixture)"
        )


def check_evals(config, plugins: Plugins) -> None:
    """Evaluations have data."""
    if plugins.evals and not config.eval_data:
        raise ValueError(f"evals {sorted(plugins.evals)} need config.eval_data")


def check_rollout(config, plugins: Plugins) -> None:
    """Rollouts, shapings and the loss go together."""
    loss, steps = plugins.loss, plugins.shaping
    if on_policy.from_file(config) and not config.rollout.source.endswith(files.TYPES):
        raise ValueError(
            f"rollout.source is {config.rollout.source!r}, expected '', 'policy' or a file "
            f"({', '.join(files.TYPES)})"
        )
    if not has_rollouts(config):
        if config.shaping:
            raise ValueError("config.shaping needs rollouts: set config.rollout.reward")
        return
    if not trains(config):
        return
    if config.mixture:
        raise ValueError("rollouts take config.data, not a mixture")
    if not config.rollout.reward:
        check_without_reward(config, plugins)
    if config.rollout.grammar:
        grammars.load(config.rollout.grammar, "rollout.grammar")
    check_recorded(config, steps)
    check_turns(config)
    if "advantages" in loss.needs and not steps:
        raise ValueError(f"loss {loss.name!r} needs advantages: set config.shaping")
    if steps and sum(s.stage == "advantage" for s in steps) != 1:
        names = [s.name for s in steps]
        raise ValueError(f"config.shaping has {names}: one of them makes advantages")
    if any("members" in s.needs for s in steps) and not config.rollout.reward.get("members"):  # fmt: skip
        raise ValueError(
            f"config.shaping has {[s.name for s in steps if 'members' in s.needs]}, which "
            "need several rewards: set rollout.reward to an ensemble with members"
        )
    if steps and "advantages" not in loss.needs:
        raise ValueError(
            f"loss {loss.name!r} reads no advantages: empty config.shaping"
        )
    slots = config.rollout.group + bool(config.rollout.anchor)
    of_pairs = config.rollout.keep == "all" and slots == 2 and not steps
    if of_pairs and config.rollout.reward:
        raise ValueError(
            f"loss {loss.name!r} takes two responses for (chosen, rejected): "
            "config.rollout.keep='best_worst' puts them in that order"
        )
    if "returns" in loss.needs and not any(s.returns for s in steps):
        raise ValueError(f"loss {loss.name!r} needs returns: config.shaping.gae = {{}}")
    check_rollout_form(config, loss)
    check_required(config, loss, steps)
    check_rollout_lms(config, steps)
    of_reference = any(s.baseline in shaping.OF_REFERENCE for s in steps)
    unused: Any = None  # the settings alone are checked
    source.check(
        Sampler(unused, plugins.reward, {}, unused, **on_policy.sampling(config)),
        rollout.Settings(**on_policy.settings(config)), steps, loss.needs,
        on_policy=on_policy.own_samples(config, loss.needs),
        reference=of_reference, anchor=bool(config.rollout.anchor),
    )  # fmt: skip


def check_turns(config) -> None:
    """Somebody replies, and there is a turn after a reply."""
    reply, turns = config.rollout.reply, config.rollout.turns
    if bool(reply) != (turns > 1):
        raise ValueError(
            f"rollout.turns is {turns} and rollout.reply {reply!r}: several turns need "
            "the name of a function (rows, texts) -> replies, and a reply turns >= 2"
        )
    if reply:
        plugin.function(reply, "rollout.reply")


def check_recorded(config, steps: Sequence[Bound]) -> None:
    """Nothing else is to sample where responses come from a file."""
    rollout = config.rollout
    asked = {
        "rollout.policy": rollout.policy, "rollout.anchor": rollout.anchor,
        "rollout.grammar": rollout.grammar, "rollout.stops": rollout.stops,
        "rollout.dynamic_sampling": rollout.dynamic_sampling, "rollout.reply": rollout.reply,
        "a shaping that samples lms.ref": any(
            s.baseline in shaping.OF_REFERENCE for s in steps
        ),
    }  # fmt: skip
    if on_policy.from_file(config) and (wrong := [k for k, v in asked.items() if v]):
        raise ValueError(
            f"rollout.source is a file of responses, which leaves no room for {wrong[0]}"
        )


def check_without_reward(config, plugins: Plugins) -> None:
    """Rollouts without a reward (rollout.source) ask for nothing that only one gives."""
    loss, rollout = plugins.loss, config.rollout
    asked = {
        f"loss {loss.name!r}": {*OF_ROLLOUTS[1:]} & {*loss.needs},
        "config.shaping": config.shaping,
        f"rollout.keep={rollout.keep!r}": rollout.keep != "all",
        "rollout.anchor": rollout.anchor,
        "rollout.dynamic_sampling": rollout.dynamic_sampling,
        "rollout.truncated='punish'": rollout.truncated == "punish",
        "rollout.overlong_buffer": rollout.overlong_buffer,
    }
    if needing := [name for name, needs in asked.items() if needs]:
        raise ValueError(f"{needing[0]} needs rewards: set config.rollout.reward")


def check_rollout_form(config, loss: Bound) -> None:
    """The responses that rollouts keep are rows that the loss reads."""
    if not loss.forms or "prompts" in loss.forms:
        return  # says nothing, or is made for rollouts
    several = config.rollout.group + bool(config.rollout.anchor) > 1
    made = {"best_worst": "pairs", "best": "demonstrations"}.get(
        config.rollout.keep, "groups" if several else "labelled"
    )
    if not config.rollout.reward:
        made = "unscored" if several else "demonstrations"
    if made not in loss.forms and not config.rollout.reward:
        raise ValueError(
            f"loss {loss.name!r} reads {' or '.join(loss.forms)}, but responses without "
            f"rewards are {made}: set config.rollout.reward"
        )
    if made not in loss.forms:
        raise ValueError(
            f"loss {loss.name!r} reads {' or '.join(loss.forms)}, but rollouts with "
            f"rollout.keep={config.rollout.keep!r} make {made}: keep='best_worst' makes "
            "pairs, 'best' demonstrations, 'all' groups"
        )


def check_rollout_lms(config, steps: Sequence[Bound]) -> None:
    """The LMs that sample, that are compared with, and that the shapings read."""
    frozen, moving = frozen_names(config), moving_names(config)
    behaviour, anchor = config.rollout.policy, config.rollout.anchor
    missing = [
        n for s in steps for n in s.needs if plugin.frozen_lm(n) not in (None, *frozen)
    ]
    missing += [behaviour] if behaviour not in ("", *frozen) else []
    missing += [anchor] if anchor not in ("", *frozen, *moving) else []
    if missing:
        raise ValueError(
            f"rollouts need {missing}: add config.lms, there are "
            f"{sorted((*frozen, *moving))}"
        )
    if not any(s.baseline in shaping.OF_REFERENCE for s in steps):
        return
    if anchor in moving:
        raise ValueError(
            f"rollout.anchor={anchor!r} moves, but the shaping compares with rewards of "
            "lms.ref, which does not: rollout.anchor='ref'"
        )
    if "ref" not in frozen:
        raise ValueError("rewards of reference samples need a frozen lms.ref")


def check_required(config, loss: plugin.Bound, steps: Sequence[plugin.Bound]) -> None:
    """The rollouts are those that the loss was derived for, as its REQUIRES says.

    REQUIRES maps a key of the config to its value, to a tuple of possible values, to
    `...` for any but an empty one, or, if the value has a dot, to the name of
    another key that has the same value.
    """
    values = {f"loss.{k}": v for k, v in loss.hyper.items()}
    values |= {f"rollout.{k}": v for k, v in config.rollout.items()}
    values |= {f"{s.name}.{k}": v for s in steps for k, v in s.hyper.items()}
    for key, what in loss.requires.items():
        if what is ...:
            if not values.get(key):
                raise ValueError(
                    f"loss {loss.name!r}: {key} is empty, expected the name of one of "
                    f"config.lms: {REASONS.get(key, 'the loss needs it')}"
                )
            continue
        other = isinstance(what, str) and "." in what
        want = values[what] if other else what
        allowed = want if isinstance(want, tuple) else (want,)
        if values.get(key) not in allowed:
            expected = " or ".join(
                f"{x:g}" if isinstance(x, float) else str(x) for x in allowed
            )
            raise ValueError(
                f"loss {loss.name!r}: {key} is {values.get(key, 'absent')}, expected {expected}"
                + f", which is {what}" * other
            )
