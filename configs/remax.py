"""ReMax of SmolLM2-135M-Instruct: the greedy response's reward is the baseline.

Source: Li et al. 2023, https://arxiv.org/abs/2310.10505
Command: python -m alignax.main --config configs/remax.py --workdir runs/remax
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import rloo


def get_config(arg: str = ""):
    c = rloo.get_config(arg)
    c.shaping = {"kl": {"beta": 0.05}, "remax": {}}
    c.rollout.group = 1
    return c
