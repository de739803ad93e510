"""A Q head on rollouts of SmolLM2-135M-Instruct: values of all next tokens in one call.

Source: Mudgal et al. 2023, https://arxiv.org/abs/2310.17022; Rafailov et al. 2024,
https://arxiv.org/abs/2404.12358
Command: python -m alignax.main --config configs/value_q.py --workdir runs/value_q
  --config.data.path=pairs.jsonl.gz
The guide is decoders/controlled with head="q" and the same scale.
"""

from alignax.configs import value_mean


def get_config(arg: str = ""):
    c = value_mean.get_config(arg)
    c.loss = {"name": "value_q", "scale": 1.0, "penalty": 0.1}
    c.lms = {"ref": "init"}
    c.rollout.policy = "ref"
    return c
