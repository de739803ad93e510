"""A value head (expected reward) on rollouts of SmolLM2-135M-Instruct, for controlled decoding.

Source: Mudgal et al. 2023 (CD-FUDGE), https://arxiv.org/abs/2310.17022
Command: python -m alignax.main --config configs/value_mean.py --workdir runs/value_mean
  --config.data.path=pairs.jsonl.gz
The frozen `base` samples all responses; a value model with the same initial weights is
trained. The reward is a program's, in 0..1; the value is bounded to -0.1..1.1.
configs/generate.py:controlled decodes with it, with the same centre and radius.
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.model.value_head = True
    c.loss = {"name": "value_mean", "centre": 0.5, "radius": 0.6}
    c.lms, c.shaping = {"base": "init"}, {}
    c.rollout.policy = "base"
    c.rollout.batches, c.rollout.epochs = 4, 2
    c.optim.lr = 2e-5
    c.evals, c.eval_data, c.eval_every = {}, {}, 0
    return c
