"""DiscoPOP on HH-RLHF pairs.

Source: Lu et al. 2024, https://arxiv.org/abs/2406.08414
Command: python -m alignax.main --config configs/discopop.py --workdir runs/discopop
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "discopop", "beta": 0.05, "tau": 0.05}
    return c
