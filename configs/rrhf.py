"""RRHF of SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs, as rankings of two.

Source: Yuan et al. 2023, https://arxiv.org/abs/2304.05302
Command: python -m alignax.main --config configs/rrhf.py --workdir runs/rrhf
  --config.data.path=pairs.jsonl.gz
"""

from configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "rrhf", "lam": 1.0}
    c.lms = {}
    return c
