"""A soft value head on rollouts of SmolLM2-135M-Instruct: β log E[e^{reward/β}].

Source: Garg et al. 2023, https://arxiv.org/abs/2301.02328; its use: Zhao et al. 2024,
https://arxiv.org/abs/2404.17546
Command: python -m alignax.main --config configs/value_soft.py --workdir runs/value_soft
  --config.data.path=pairs.jsonl.gz
The guide has the same beta: decoders/controlled with beta=0.25.
"""

from alignax.configs import value_mean


def get_config(arg: str = ""):
    c = value_mean.get_config(arg)
    c.loss.update(name="value_soft", beta=0.25)
    return c
