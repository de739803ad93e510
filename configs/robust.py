"""Robust DPO on HH-RLHF pairs: assumes that one label in ten is flipped.

Source: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409
Command: python -m alignax.main --config configs/robust.py --workdir runs/robust
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "robust", "beta": 0.1, "label_smoothing": 0.1}
    return c
