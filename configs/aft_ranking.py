"""AFT on rankings of SmolLM2-135M-Instruct on groups of scored responses.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.02144
Command: python -m alignax.main --config configs/aft_ranking.py
  --workdir runs/aft_ranking --config.data.path=groups.jsonl
A row is {"prompt": ..., "responses": [two or more], "scores": [a number for each]}, higher
is better; only the order of the scores counts.
"""

from alignax.configs import rrhf


def get_config(arg: str = ""):
    c = rrhf.get_config(arg)
    c.loss = {"name": "aft_ranking", "constraint": "boundary", "slack": 0.1, "lam": 1.0}
    return c
