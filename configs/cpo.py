"""CPO on HH-RLHF pairs; no reference.

Source: Xu et al. 2024, https://arxiv.org/abs/2401.08417
Command: python -m alignax.main --config configs/cpo.py --workdir runs/cpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "cpo", "beta": 0.1, "lam": 1.0}
    c.lms = {}  # no reference
    return c
