"""APO-zero on HH-RLHF pairs.

Source: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266
Command: python -m alignax.main --config configs/apo_zero.py --workdir runs/apo_zero
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "apo_zero", "beta": 0.1}
    return c
