"""RAFT of SmolLM2-135M-Instruct: repeated fine-tuning on the best sample of each group.

Source: Dong et al. 2023, https://arxiv.org/abs/2304.06767 (K up to 32)
Command: python -m alignax.main --config configs/raft.py --workdir runs/raft
  --config.data.path=pairs.jsonl.gz
Two passes over rollouts of eight batches.
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.loss = {"name": "sft", "reduction": "token"}
    c.lms, c.shaping = {}, {}
    c.rollout.group, c.rollout.keep = 32, "best"
    c.rollout.batches, c.rollout.epochs = 8, 2
    c.optim.lr = 2e-5
    return c
