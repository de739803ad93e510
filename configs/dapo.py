"""DAPO of SmolLM2-135M-Instruct: more room above than below, and no KL.

Source: Yu et al. 2025, https://arxiv.org/abs/2503.14476
Command: python -m alignax.main --config configs/dapo.py --workdir runs/dapo
  --config.data.path=pairs.jsonl.gz
Sixteen steps a rollout and sixteen responses a prompt, as there; a truncated response
counts for nothing. Differs from the paper: a group without a difference is not drawn
again (its advantages are 0, its tokens count in the mean), and no reward falls with the
length before the limit.
"""

from configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.loss = {"name": "policy_gradient", "clip_low": 0.2, "clip_high": 0.28}
    c.loss.reduction = "token"
    c.lms = {}
    c.rollout.group, c.rollout.batches = 16, 16
    c.rollout.truncated = "drop"
    c.batch_size, c.num_steps, c.optim.warmup = 4, 320, 20
    if arg:  # hardly a random response ends
        c.rollout.batches, c.rollout.truncated = 2, "keep"
        c.num_steps, c.optim.warmup = 2, 0
    return c
