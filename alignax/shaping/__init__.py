"""Shapings: `shape(batch, baseline, *, ...) -> f32[B, G, T]`, one file per equation.

A run has some of them, each with a STAGE, and they apply in that order, whatever their
order in the config:

  reward     what a response is worth: calibrated, transformed, punished for its length
  penalty    what a token costs: the KL to the reference
  advantage  how much better than expected it was: exactly one
  scale      in which units

Each reads `masked.token_rewards(batch)`: what the one before it left in
`Batch.advantages`, or the raw feedback, earned by the last scored token; feedback itself
stays raw. `baseline` [B, R] holds rewards of other responses to the same prompt: a module
that declares BASELINE = 'reference' gets those of K samples of the reference, with 'greedy'
that of the policy's greedy response; else it is None. NEEDS names columns to fill before
('ref_logps', 'old_values'); RETURNS = True says that what it gives, plus `old_values`, is
what a critic should learn (`extra['returns']`).
"""

from collections.abc import Iterable

from alignax.plugin import Bound

STAGES = ("reward", "penalty", "advantage", "scale")
BASELINES = ("", "reference", "greedy")


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
