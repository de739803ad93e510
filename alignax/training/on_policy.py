"""From a config to batches of the policy's own responses; what rollouts ask of a config.

The sections `rollout` and `shaping` become the arguments of `rollout.rollout_source`.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from alignax import plugin, rewards, shaping
from alignax.batch import LM, Params
from alignax.inputs import reference_cache, source
from alignax.models import sharding
from alignax.rollouts import sampler, selection
from alignax.rollouts import source as rollouts_source
from alignax.runs import checkpoint, workdirs
from alignax.training import parallel

# What a file of reference rewards holds, and whose folder it is in: for messages.
REWARDS: Any = {"what": "rewards", "setting": "config.rollout.cache"}


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
        plugin.load_section("shaping", {"name": name, **hyper})
        for name, hyper in config.shaping.items()
    )
    given = [f"shaping.{name}" for name, h in config.shaping.items() if "beta" in h]
    check(config, loss, steps, lms, moving, policy)
    behaviour, shown = config.rollout.policy, config.rollout.anchor  # names

    def anchor(average: Params | None) -> LM:
        return lms[shown] if shown in lms else assemble(average, lms)

    reward = rewards.load(plugin.plain_section(config.rollout.reward))
    grid = sharding.grid(config.layout, config.accumulate, mesh)
    score = parallel.scorer(mesh, packed=grid is not None)
    judged = sampler.Sampler(
        parallel.generator(text, mesh), reward, lms, text,
        max_new=config.rollout.max_new, temperature=config.rollout.temperature,
        truncated=config.rollout.truncated, punishment=config.rollout.punishment,
        overlong_buffer=config.rollout.overlong_buffer,
        overlong_penalty=config.rollout.overlong_penalty, score=score,
    )  # fmt: skip
    baseline = None
    if any(s.baseline in shaping.OF_REFERENCE for s in steps):
        if "ref" not in lms:
            raise ValueError("rewards of reference samples need a frozen lms.ref")
        baseline = reference_rewards(config, examples, judged, workdir)
    return rollouts_source.rollout_source(
        examples, judged, policy=lambda params: assemble(params, lms), score=score,
        shaping=with_strength(steps, loss, given), batch_size=config.batch_size,
        length=config.length, seed=config.seed, group=config.rollout.group,
        batches=config.rollout.batches, epochs=config.rollout.epochs,
        keep=config.rollout.keep, needs=loss.needs, baseline=baseline,
        behaviour=lms[behaviour] if behaviour else None,
        dynamic_sampling=config.rollout.dynamic_sampling,
        max_draws=config.rollout.max_draws, anchor=anchor if shown else None,
        anchor_samples=config.rollout.anchor_samples,
        host=(jax.process_index(), jax.process_count()), grid=grid,
    )  # fmt: skip


def check(
    config, loss: plugin.Bound, steps: Sequence[plugin.Bound],
    lms: Collection[str], moving: Collection[str], policy: LM,
) -> None:  # fmt: skip
    """Raises ValueError for a loss, shapings and rollouts that do not go together."""
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
    missing = [
        n for s in steps for n in s.needs if plugin.frozen_lm(n) not in (None, *lms)
    ]
    behaviour, shown = config.rollout.policy, config.rollout.anchor
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
    some = selection.visited(examples, config.batch_size, config.seed, places)
    settings = {
        "samples": config.rollout.reference_samples, "length": config.length,
        "rows": config.batch_size * config.rollout.group, "seed": config.seed,
    }  # fmt: skip
    ref = judged.lms["ref"]
    prompts = hashlib.sha256(rollouts_source.contents(some).encode())
    others = {  # a reward may be one of them
        f"lms.{name}": f"{int(checkpoint.checksum(lm.params)):08x}"
        for name, lm in judged.lms.items()
        if name not in ("ref", "base")
    }
    key = reference_cache.describe_lm(
        ref, data=prompts.hexdigest()[:16], **settings, **judged.identity(), **others
    )
    folder = checkpoint.absolute(config.rollout.cache or workdir)
    path = folder / "reference_rewards.npz"
    kept: sampler.Baseline | None = None
    if workdirs.everywhere(path.exists(), f"{path} is there"):
        also = {k: str(v) for k, v in judged.identity(earlier=True).items()}
        table = reference_cache.load(path, key, **REWARDS, also=also)
        kept = sampler.untable(table, [e.id for e in some])

    def baseline() -> sampler.Baseline:
        if kept is not None:
            return kept
        found = sampler.reference_rewards(some, judged, ref, **settings)
        if jax.process_index() == 0:
            reference_cache.save(path, sampler.table(found), key)
        return found

    return baseline
