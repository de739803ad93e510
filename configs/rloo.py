"""RLOO of SmolLM2-135M-Instruct: each response's baseline is the mean of the others.

Source: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740
Command: python -m alignax.main --config configs/rloo.py --workdir runs/rloo
  --config.data.path=pairs.jsonl.gz
One step per rollout: the ratio is 1 and nothing is clipped. A response is one action: the
gradient is that of log π(y|x), a sum over tokens, so the reduction divides by a constant.
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.loss = {"name": "policy_gradient", "reduction": "constant"}
    c.shaping = {"kl": {"beta": 0.05}, "rloo": {}}
    c.rollout.group = 4
    return c
