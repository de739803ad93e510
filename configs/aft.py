"""AFT of SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs: chosen is right, rejected wrong.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.02144
Command: python -m alignax.main --config configs/aft.py --workdir runs/aft
  --config.data.path=pairs.jsonl.gz
"""

from configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "aft", "constraint": "boundary", "slack": 0.1, "lam": 1.0}
    c.lms = {}
    return c
