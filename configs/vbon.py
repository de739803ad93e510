"""Variational best-of-N: RL whose optimal policy is the best-of-4 distribution.

Source: Amini et al. 2024, https://arxiv.org/abs/2407.06057: the reward (N-1) log u at a
KL strength of 1
Command: python -m alignax.main --config configs/vbon.py --workdir runs/vbon
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import ctrl_bon


def get_config(arg: str = ""):
    c = ctrl_bon.get_config(arg)
    c.shaping.ctrl = {"transform": "best_of", "n": 4, "calibration": "laplace"}
    c.shaping.ctrl.floor = 0.0  # the smallest of 100 samples is at .005
    c.shaping.kl.beta = 1.0
    return c
