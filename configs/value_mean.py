"""A mean value head on rollouts of SmolLM2-135M-Instruct: what controlled decoding tilts by.

Source: Mudgal et al. 2023 (CD-FUDGE), https://arxiv.org/abs/2310.17022
Command: python -m alignax.main --config configs/value_mean.py --workdir runs/value_mean
  --config.data.path=pairs.jsonl.gz
The frozen `base` draws all responses; what is trained is a value model from the same
weights. The reward, of a program, is in 0..1: the value stays in -0.1..1.1.
configs/generate.py:controlled reads it, with the same centre and radius.
"""

from configs import grpo


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
