"""Hinge loss (RSO's) on HH-RLHF pairs.

Source: Liu et al. 2023, https://arxiv.org/abs/2309.06657
Command: python -m alignax.main --config configs/hinge.py --workdir runs/hinge
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "hinge", "beta": 0.05}
    return c
