"""Shapings: `shape(batch, baseline, *, ...) -> f32[B, G, T]`, one file per equation.

A run has some of them, each with a STAGE, and they apply in that order, whatever their
order in the config. A rollout compiles it, its hyper-parameters fixed:

  reward     transforms of a response's reward: calibration, a penalty for its length
  penalty    a cost per token: the KL to the reference
  advantage  the reward less a baseline: exactly one
  scale      normalisation

A module may define `check(**hyper)`, which raises for hyper-parameters that a run must not
have. Each shaping reads `masked.token_rewards(batch)`: the output of the shaping before it
(in `Batch.advantages`), or the raw feedback, which is the reward of the last scored token.
`Batch.feedback` itself is never changed. `baseline` [B, R] holds rewards of other responses
to the same prompt. A module declares:

  STAGE     when it applies
  BASELINE  source of `baseline`: 'reference', K samples of the reference; 'pool', the
            reference samples of all prompts of the run, sorted, [1, R]; 'greedy', the
            policy's one greedy response; 'group', the other responses of the group, which
            has at least two; '' (the default), none. With the last two `baseline` is None.
            'running': numbers that the run keeps from rollout to rollout, [1, S]
  RUNNING   of a module with BASELINE 'running': {name: its value at the start}, in the order
            of these numbers. `update(batch, baseline, *, ...) -> [1, S]`, with the arguments
            of `shape`, gives them after a rollout. They are saved with the run, and are
            metrics, 'rollout/SHAPING/name'. BASELINE and RUNNING may be functions of the
            hyper-parameters
  NEEDS     columns to fill before ('old_logps', 'ref_logps', 'old_values'); 'members' are
            the rewards that an ensemble combines, as extra['reward/LABEL'] [B, G]
  RETURNS   True: the output plus `old_values` is the critic's target (`extra['returns']`)
  COUPLED   True: the output for a prompt depends on the other prompts of the rollout

Reading order: constant, moving_average, rloo and group_norm (baselines), normalise, gdpo
(several rewards), kl and adaptive_kl (the penalty), whiten, gae (a critic), remax, pass_at_k and ctrl (inference-aware).
"""

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch
from alignax.plugin import Bound

STAGES = ("reward", "penalty", "advantage", "scale")
BASELINES = ("", "group", "reference", "pool", "greedy", "running")
OF_REFERENCE = ("reference", "pool")  # computed from rewards of reference samples


def in_order(shapings: Iterable[Bound]) -> list[Bound]:
    """The shapings of a run by stage, within a stage by name.

    Raises:
      ValueError: a module without a known STAGE, with an unknown BASELINE, or whose
        BASELINE is 'running' without RUNNING and `update`.
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
        if s.baseline == "running" and not (s.running and s.update):
            raise ValueError(
                f"{s.name} declares BASELINE = 'running' without RUNNING and `update`"
            )
    return sorted(found, key=lambda s: STAGES.index(s.stage))


def centred(batch: Batch) -> Float[Array, "B G"]:
    """Rewards of responses less the mean of their prompt's; 0 where not valid.

    Exactly 0 in a group of equal rewards, however large: a rounding error of the mean would
    become an advantage of order 1 once it is divided by the standard deviation.
    """
    reward, valid = masked.token_rewards(batch).sum(-1), batch.valid
    top = reward.max(-1, keepdims=True, where=valid, initial=-jnp.inf)
    below = jnp.where(valid, reward - top, 0.0)
    mean = below.sum(-1, keepdims=True) / jnp.maximum(valid.sum(-1, keepdims=True), 1)
    return jnp.where(valid, below - mean, 0.0)
