"""DPO-Positive on HH-RLHF pairs.

Source: Pal et al. 2024, https://arxiv.org/abs/2402.13228
Command: python -m alignax.main --config configs/dpop.py --workdir runs/dpop
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "dpop", "beta": 0.3, "lam": 50.0}
    return c
