"""GSPO of SmolLM2-135M-Instruct: one ratio per response, four steps per rollout.

Source: Zheng et al. 2025, https://arxiv.org/abs/2507.18071
Command: python -m alignax.main --config configs/gspo.py --workdir runs/gspo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.loss = {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
    c.lms = {}
    c.rollout.batches = 4
    return c
