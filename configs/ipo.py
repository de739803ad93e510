"""IPO on HH-RLHF pairs.

Source: Azar et al. 2023, https://arxiv.org/abs/2310.12036
Command: python -m alignax.main --config configs/ipo.py --workdir runs/ipo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "ipo", "beta": 0.1, "average": True}
    return c
