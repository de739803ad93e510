"""A reward model of rankings from SmolLM2-135M-Instruct on groups of scored responses.

Source: Zhu et al. 2023, https://arxiv.org/abs/2301.11270
Command: python -m alignax.main --config configs/reward_plackett_luce.py
  --workdir runs/reward_plackett_luce --config.data.path=groups.jsonl
A row is {"prompt": ..., "responses": [two or more], "scores": [a number for each]}, higher
is better; only the order of the scores counts.
"""

from alignax.configs import rrhf


def get_config(arg: str = ""):
    c = rrhf.get_config(arg)
    c.model.value_head = True
    c.loss = {"name": "reward_plackett_luce"}
    return c
