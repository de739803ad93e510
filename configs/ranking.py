"""ACT's ranking loss for SmolLM2-135M-Instruct on groups of scored responses.

Source: Wang et al. 2024, https://arxiv.org/abs/2403.06326
Command: python -m alignax.main --config configs/ranking.py --workdir runs/ranking
  --config.data.path=groups.jsonl
A row is {"prompt": ..., "responses": [two or more], "scores": [a number for each]}: the share of
its constraints that a response satisfies, as configs/sample_pairs.py writes them.
"""

from alignax.configs import rrhf


def get_config(arg: str = ""):
    c = rrhf.get_config(arg)
    c.loss = {"name": "ranking", "margin": 0.1, "lam": 1.0}
    return c
