"""PPO of SmolLM2-135M-Instruct: critic as a value head of the policy, KL in the reward.

Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347; with language models:
Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
Command: python -m alignax.main --config configs/ppo.py --workdir runs/ppo
  --config.data.path=pairs.jsonl.gz
Four passes over a rollout of four batches. The critic's head starts at zero and has a rate
of its own: at the policy's it would stay there (train/rollout/explained_variance shows it).
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.model.value_head = True
    c.loss = {"name": "ppo", "clip": 0.2, "value_clip": 0.2, "value_weight": 0.1}
    c.shaping = {"kl": {"beta": 0.05}, "gae": {"gamma": 1.0, "lam": 0.95}, "whiten": {}}
    c.optim.critic_lr = 1e-4
    c.rollout.group, c.rollout.batches, c.rollout.epochs = 1, 4, 4
    if not arg:
        c.batch_size, c.num_steps = 16, 320
    return c
