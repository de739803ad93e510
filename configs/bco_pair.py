"""BCO on HH-RLHF pairs, without a shift.

Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656
Command: python -m alignax.main --config configs/bco_pair.py --workdir runs/bco_pair
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "bco_pair", "beta": 0.01, "delta": 0.0}
    return c
