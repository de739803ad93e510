"""PRO of SmolLM2-135M-Instruct on groups of scored responses.

Source: Song et al. 2023, https://arxiv.org/abs/2306.17492
Command: python -m alignax.main --config configs/pro.py --workdir runs/pro
  --config.data.path=groups.jsonl
A row is {"prompt": ..., "responses": [two or more], "scores": [a number for each]}: rewards,
whose gaps are the temperatures.
"""

from alignax.configs import rrhf


def get_config(arg: str = ""):
    c = rrhf.get_config(arg)
    c.loss = {"name": "pro", "lam": 1.0}
    return c
