"""REINFORCE++ with a group's mean as baseline, of SmolLM2-135M-Instruct.

Source: Hu et al. 2025, https://arxiv.org/abs/2501.03262
Command: python -m alignax.main --config configs/reinforce_plus_plus.py
  --workdir runs/reinforce_plus_plus --config.data.path=pairs.jsonl.gz
The group's mean is subtracted, the result is divided by the standard deviation over the
rollout, and the KL (estimator k2) is a term of the loss.
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.loss.update(beta=0.01, estimator="k2", reduction="token")
    c.shaping = {"group_norm": {"scale": 0.0}, "whiten": {}}
    return c
