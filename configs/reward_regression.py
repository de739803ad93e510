"""A reward model that regresses on labels, from SmolLM2-135M-Instruct on HH-RLHF pairs.

Source: Wang et al. 2024, https://arxiv.org/abs/2406.08673
Command: python -m alignax.main --config configs/reward_regression.py
  --workdir runs/reward_regression --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import reward_model


def get_config(arg: str = ""):
    c = reward_model.get_config(arg)
    c.loss = {"name": "reward_regression"}
    return c
