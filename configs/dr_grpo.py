"""Dr. GRPO of SmolLM2-135M-Instruct: no division by response length or group deviation.

Source: Liu et al. 2025, https://arxiv.org/abs/2503.20783
Command: python -m alignax.main --config configs/dr_grpo.py --workdir runs/dr_grpo
  --config.data.path=pairs.jsonl.gz
The sum over tokens is divided by a constant, the length of a row with its prompt.
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.loss = {"name": "policy_gradient", "clip_low": 0.2, "clip_high": 0.2}
    c.loss.reduction = "constant"
    c.lms = {}
    c.shaping = {"group_norm": {"scale": 0.0}}
    return c
