"""EXO on HH-RLHF pairs.

Source: Ji et al. 2024, https://arxiv.org/abs/2402.00856
Command: python -m alignax.main --config configs/exo_pair.py --workdir runs/exo_pair
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "exo_pair", "beta": 0.1, "label_smoothing": 1e-3}
    return c
