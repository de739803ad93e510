"""CTRL for the standard win rate: RL on the calibrated reward of SmolLM2-135M-Instruct.

Source: Balashankar et al. 2024, https://arxiv.org/abs/2412.19792: without a transform,
calibration is exactly optimal for the standard win rate (one sample per prompt)
Command: python -m alignax.main --config configs/ctrl_identity.py --workdir runs/identity
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import ctrl_bon


def get_config(arg: str = ""):
    c = ctrl_bon.get_config(arg)
    c.shaping.ctrl = {"transform": "identity"}
    return c
