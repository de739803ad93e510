"""AOT on HH-RLHF pairs: quantiles over all pairs of a step.

Source: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882
Command: python -m alignax.main --config configs/aot.py --workdir runs/aot
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "aot", "beta": 0.01, "label_smoothing": 0.0}
    return c
