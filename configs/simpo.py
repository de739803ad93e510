"""SimPO on HH-RLHF pairs; no reference.

Source: Meng et al. 2024, https://arxiv.org/abs/2405.14734
Command: python -m alignax.main --config configs/simpo.py --workdir runs/simpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "simpo", "beta": 2.0, "gamma": 1.0}
    c.lms = {}  # no reference
    return c
