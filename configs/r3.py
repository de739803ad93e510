"""R³: PPO of SmolLM2-135M-Instruct on relevance, length and repetition, no preferences.

Source: Kim et al. 2024, https://arxiv.org/abs/2402.03469 (Alpaca prompts, 512 tokens there)
Command: python -m alignax.main --config configs/r3.py --workdir runs/r3
  --config.data.path=pairs.jsonl.gz
--config.rollout.reward.factors="('relevance',)" takes relevance alone, which the paper shows
to lead to short copies of the query.
"""

from alignax.configs import ppo


def get_config(arg: str = ""):
    c = ppo.get_config(arg)
    reward = {"name": "relevance", "words": 100.0}
    reward["factors"] = ("relevance", "length", "repetition")
    if not arg:
        c.rollout.max_new, c.length = 128, 256
    c.rollout.reward = reward
    c.evals = {"inference_win_rate": {"max_new": c.rollout.max_new}}
    c.evals.inference_win_rate.update(n=(4,), samples=8 if arg else 16, size=64)
    return c
