"""DAPO of SmolLM2-135M-Instruct: a larger upper clipping range, and no KL.

Source: Yu et al. 2025, https://arxiv.org/abs/2503.14476
Command: python -m alignax.main --config configs/dapo.py --workdir runs/dapo
  --config.data.path=pairs.jsonl.gz
As in the paper: sixteen steps per rollout and sixteen responses per prompt; groups with
equal rewards are sampled again; truncated responses are masked; and the reward falls by 1
over the last fifth of the length limit.
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.loss = {"name": "policy_gradient", "clip_low": 0.2, "clip_high": 0.28}
    c.loss.reduction = "token"
    c.lms = {}
    c.rollout.group, c.rollout.batches = 16, 16
    c.rollout.dynamic_sampling, c.rollout.overlong_buffer = True, 13
    c.rollout.truncated = "drop"
    c.batch_size, c.num_steps, c.optim.warmup = 4, 320, 20
    if arg:  # hardly a random response ends
        c.rollout.batches, c.rollout.truncated = 2, "keep"
        c.rollout.overlong_buffer = 4
        c.num_steps, c.optim.warmup = 2, 0
    return c
