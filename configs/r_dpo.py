"""R-DPO on HH-RLHF pairs: with a penalty on length.

Source: Park et al. 2024, https://arxiv.org/abs/2403.19159
Command: python -m alignax.main --config configs/r_dpo.py --workdir runs/r_dpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "r_dpo", "beta": 0.1, "alpha": 0.01}
    return c
