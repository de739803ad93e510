"""Shapings: `shape(batch, baseline, *, ...) -> f32[B, G, T]`, one file per equation.

A run has some of them, each with a STAGE, and they apply in that order, whatever their
order in the config. A rollout compiles it, its hyper-parameters fixed:

  reward     what a response is worth: calibrated, transformed, punished for its length
  penalty    what a token costs: the KL to the reference
  advantage  how much better than expected it was: exactly one
  scale      in which units

A module may define `check(**hyper)`, which refuses hyper-parameters in a run. Each reads
`masked.token_rewards(batch)`: what the one before it left in
`Batch.advantages`, or the raw feedback, earned by the last scored token; feedback itself
stays raw. `baseline` [B, R] holds rewards of other responses to the same prompt. What a
module declares:

  STAGE     when it applies
  BASELINE  whose rewards: 'reference', K samples of it; 'pool', those of all prompts that
            the run may meet, [1, R] in order; 'greedy', the policy's one greedy response;
            'group', the others of its group, which has two responses or more; '' (the
            default), nobody's. With the last two `baseline` is None. A function gives it
            from the hyper-parameters
  NEEDS     columns to fill before ('old_logps', 'ref_logps', 'old_values')
  RETURNS   True: what it gives, plus `old_values`, is what a critic should learn
            (`extra['returns']`)
  COUPLED   True: what a prompt gets depends on the others of the rollout
"""

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch
from alignax.plugin import Bound

STAGES = ("reward", "penalty", "advantage", "scale")
BASELINES = ("", "group", "reference", "pool", "greedy")
OF_REFERENCE = ("reference", "pool")  # made of rewards of reference samples


def in_order(shapings: Iterable[Bound]) -> list[Bound]:
    """The shapings of a run by stage, within a stage by name.

    Raises:
      ValueError: a module without a known STAGE, or with an unknown BASELINE.
    """
    found = sorted(shapings, key=lambda s: s.name)
    for s in found:
        if s.stage not in STAGES:
            raise ValueError(
                f"{s.name} declares STAGE = {s.stage!r}, expected one of {STAGES}"
            )
        if s.baseline not in BASELINES:
            raise ValueError(
                f"{s.name} declares BASELINE = {s.baseline!r}, expected one of {BASELINES}"
            )
    return sorted(found, key=lambda s: STAGES.index(s.stage))


def centred(batch: Batch) -> Float[Array, "B G"]:
    """Rewards of responses less the mean of their prompt's; 0 where not valid.

    Exactly 0 in a group without a difference, however large its rewards: what rounding
    leaves of a mean would count fully once it is divided by its own deviation.
    """
    reward, valid = masked.token_rewards(batch).sum(-1), batch.valid
    top = reward.max(-1, keepdims=True, where=valid, initial=-jnp.inf)
    below = jnp.where(valid, reward - top, 0.0)
    mean = below.sum(-1, keepdims=True) / jnp.maximum(valid.sum(-1, keepdims=True), 1)
    return jnp.where(valid, below - mean, 0.0)
