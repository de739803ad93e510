"""Cal-DPO on HH-RLHF pairs.

Source: Xiao et al. 2024, https://arxiv.org/abs/2412.14516
Command: python -m alignax.main --config configs/cal_dpo.py --workdir runs/cal_dpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "cal_dpo", "beta": 0.001}
    return c
