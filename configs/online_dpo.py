"""Online DPO of SmolLM2-135M-Instruct: two new samples per prompt, the better one is chosen.

Source: Guo et al. 2024, https://arxiv.org/abs/2402.04792
Command: python -m alignax.main --config configs/online_dpo.py --workdir runs/online_dpo
  --config.data.path=pairs.jsonl.gz
Differs from the paper: a program scores, not a language model; ties are dropped.
"""

from alignax.configs import grpo


def get_config(arg: str = ""):
    c = grpo.get_config(arg)
    c.loss = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}
    c.shaping = {}
    c.rollout.group, c.rollout.keep = 2, "best_worst"
    return c
