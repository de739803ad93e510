"""A value head trained by bootstrapping (CD-Q) on rollouts of SmolLM2-135M-Instruct.

Source: Mudgal et al. 2023 (CD-Q), https://arxiv.org/abs/2310.17022
Command: python -m alignax.main --config configs/value_bootstrap.py
  --workdir runs/value_bootstrap --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import value_mean


def get_config(arg: str = ""):
    c = value_mean.get_config(arg)
    c.loss.name = "value_bootstrap"
    return c
