"""ORPO on HH-RLHF pairs; no reference.

Source: Hong et al. 2024, https://arxiv.org/abs/2403.07691
Command: python -m alignax.main --config configs/orpo.py --workdir runs/orpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "orpo", "lam": 0.1}
    c.lms = {}  # no reference
    return c
