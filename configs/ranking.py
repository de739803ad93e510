"""ACT's ranking loss for SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs, as rankings of two.

Source: Wang et al. 2024, https://arxiv.org/abs/2403.06326
Command: python -m alignax.main --config configs/ranking.py --workdir runs/ranking
  --config.data.path=pairs.jsonl.gz
"""

from configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "ranking", "margin": 0.1, "lam": 1.0}
    c.lms = {}
    return c
