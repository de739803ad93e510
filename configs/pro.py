"""PRO of SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs, as rankings of two.

Source: Song et al. 2023, https://arxiv.org/abs/2306.17492
Command: python -m alignax.main --config configs/pro.py --workdir runs/pro
  --config.data.path=pairs.jsonl.gz
"""

from configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "pro", "lam": 1.0}
    c.lms = {}
    return c
