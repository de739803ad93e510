"""Length-normalised DPO on HH-RLHF pairs.

Source: Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124
Command: python -m alignax.main --config configs/dpo_norm.py --workdir runs/dpo_norm
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "dpo_norm", "beta": 5.0}
    return c
