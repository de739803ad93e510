"""Every plug-in that the run of a config trains and evaluates with, bound once."""

import inspect
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from alignax import plugin, rewards, shaping
from alignax.plugin import Bound


class Plugins(NamedTuple):
    """The plug-ins of a config; their hyper-parameters are bound.

    Attributes:
      loss: under the reweightings of the config.
      evals: by their names in the config.
      shaping: in the order in which they apply, with the KL strength of the run.
      reward: of rollouts; None without one. An evaluation alone makes none.
    """

    loss: Bound
    evals: dict[str, Bound]
    shaping: list[Bound]
    reward: Bound | None


def bind(config) -> Plugins:
    """Imports the plug-ins of a config and binds their hyper-parameters.

    Raises:
      ValueError: an unknown name or hyper-parameter, a value out of its range, or a KL
        strength that is not the run's; the alternatives are listed.
    """
    loss = plugin.load_loss(config)
    evals = {name: evaluation(config, name) for name in config.evals}
    # a run that only evaluates makes no rollouts
    shapings = config.shaping if trains(config) else {}
    steps = shaping.in_order(
        plugin.load_section("shaping", {"name": name, **hyper})
        for name, hyper in shapings.items()
    )
    given = [f"shaping.{name}" for name, h in shapings.items() if "beta" in h]
    reward = plugin.plain_section(config.rollout.reward if trains(config) else {})
    return Plugins(
        loss, evals, with_strength(steps, loss, given),
        rewards.load(reward) if reward else None,
    )  # fmt: skip


def trains(config) -> bool:
    """Whether a config takes optimiser steps; without any it only evaluates."""
    return bool(config.num_steps or config.num_epochs)


def has_rollouts(config) -> bool:
    """Whether a config learns from responses to prompts, and not from those of its data."""
    return bool(config.rollout.source or config.rollout.reward)


def evaluation(config, name: str) -> Bound:
    """An evaluation of a config. Without a reward of its own it has that of the rollouts."""
    spec = {"name": name, **config.evals[name]}
    takes = inspect.signature(plugin.find("evals", spec["name"])).parameters
    if "reward" in takes and "reward" not in spec and config.rollout.reward:
        spec["reward"] = config.rollout.reward
    return plugin.load_section("evals", spec)


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
