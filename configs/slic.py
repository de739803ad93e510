"""SLiC-HF on HH-RLHF pairs; no reference.

Source: Zhao et al. 2023, https://arxiv.org/abs/2305.10425
Command: python -m alignax.main --config configs/slic.py --workdir runs/slic
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "slic", "delta": 1.0, "lam": 0.5}
    c.lms = {}  # no reference
    return c
