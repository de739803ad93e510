"""REINFORCE of SmolLM2-135M-Instruct with a constant baseline and a bonus for entropy.

Source: Williams 1992, https://doi.org/10.1007/BF00992696; the bonus: Mnih et al. 2016,
https://arxiv.org/abs/1602.01783
Command: python -m alignax.main --config configs/reinforce.py --workdir runs/reinforce
  --config.data.path=pairs.jsonl.gz
One step per rollout, no ratios and no clipping. The baseline is a constant of the reward's
range; configs/rloo.py has one of the group.
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.loss = {"name": "sum", "reduction": "constant"}
    c.loss.parts = {"reinforce": {}, "entropy": {"weight": 0.001}}
    c.lms = {}
    c.shaping = {"constant": {"value": 0.5}}
    return c
