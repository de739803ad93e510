"""NCA on HH-RLHF pairs.

Source: Chen et al. 2024, https://arxiv.org/abs/2402.05369
Command: python -m alignax.main --config configs/nca_pair.py --workdir runs/nca_pair
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "nca_pair", "beta": 0.01}
    return c
