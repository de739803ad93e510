"""Unpaired AOT on the chosen and rejected responses of HH-RLHF pairs.

Source: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882
Command: python -m alignax.main --config configs/aot_unpaired.py --workdir runs/aot_unpaired
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "aot_unpaired", "beta": 0.01, "label_smoothing": 0.0}
    return c
