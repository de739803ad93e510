"""BOND of SmolLM2-135M-Instruct: distilling the best of four by both KL divergences.

Source: Sessa et al. 2024, https://arxiv.org/abs/2407.14622: equal weights, quantiles by
reference samples
Command: python -m alignax.main --config configs/bond.py --workdir runs/bond
  --config.data.path=pairs.jsonl.gz
Differs from the paper: the anchor is the frozen reference (BOND, not its iterated J-BOND),
with leave-one-out baselines. The reward's N is rollout.anchor_samples, and its KL strength
is 1: at another strength the optimum is not the best-of-N distribution, and it is refused.
"""

from alignax.configs import ctrl_bon


def get_config(arg: str = ""):
    c = ctrl_bon.get_config(arg)
    c.loss = {"name": "bond", "gamma": 0.5, "clip_low": 0.2, "clip_high": 0.2}
    c.rollout.anchor, c.rollout.anchor_samples = "ref", 4
    c.shaping.ctrl = {"transform": "best_of", "calibration": "laplace", "floor": 0.0}
    c.shaping.ctrl.n = c.rollout.get_oneway_ref("anchor_samples")
    c.shaping.kl.beta = 1.0
    return c
