"""f-DPO on HH-RLHF pairs, under the Jensen-Shannon divergence.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.16240
Command: python -m alignax.main --config configs/f_dpo.py --workdir runs/f_dpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "f_dpo", "beta": 0.1, "divergence": "js"}
    return c
