"""BoNBoN of SmolLM2-135M-Instruct: the best and the worst of eight of its own samples.

Source: Gui et al. 2024, https://arxiv.org/abs/2406.00832 (n = 8, alpha = 0.005)
Command: python -m alignax.main --config configs/bonbon.py --workdir runs/bonbon
  --config.data.path=pairs.jsonl.gz
The frozen reference is sampled, not the policy. The loss has the n of the rollouts: setting
rollout.group sets it too.
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.rollout.group, c.rollout.keep, c.rollout.policy = 8, "best_worst", "ref"
    c.loss = {"name": "bonbon", "alpha": 0.005}
    c.loss.n = c.rollout.get_oneway_ref("group")
    c.shaping = {}
    return c
