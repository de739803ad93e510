"""CTRL for worst-of-4: SmolLM2-135M-Instruct aligned for the worst of four samples.

An attacker who samples until a response is bad gets the worst of them.

Source: Balashankar et al. 2024, https://arxiv.org/abs/2412.19792: -e^{-10u} for
worst-of-4
Command: python -m alignax.main --config configs/ctrl_won.py --workdir runs/ctrl_won
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import ctrl_bon


def get_config(arg: str = ""):
    c = ctrl_bon.get_config(arg)
    c.shaping.ctrl.t = -10.0
    return c
