"""A reward model of rankings (here of two) from SmolLM2-135M-Instruct on HH-RLHF pairs.

Source: Zhu et al. 2023, https://arxiv.org/abs/2301.11270
Command: python -m alignax.main --config configs/reward_plackett_luce.py
  --workdir runs/reward_plackett_luce --config.data.path=pairs.jsonl.gz
"""

from configs import reward_model


def get_config(arg: str = ""):
    c = reward_model.get_config(arg)
    c.loss = {"name": "reward_plackett_luce"}
    return c
