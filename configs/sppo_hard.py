"""SPPO with hard labels, one iteration on HH-RLHF pairs.

Source: Wu et al. 2024, https://arxiv.org/abs/2405.00675
Command: python -m alignax.main --config configs/sppo_hard.py --workdir runs/sppo_hard
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "sppo_hard", "beta": 0.001}
    return c
