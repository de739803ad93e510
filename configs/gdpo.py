"""GDPO of SmolLM2-135M-Instruct on GSM8K: two rewards, each normalised by itself.

Source: Liu et al. 2026, https://arxiv.org/abs/2601.05242
Command: python -m alignax.main --config configs/gdpo.py --workdir runs/gdpo
  --config.data.path=gsm8k/train.jsonl
One reward is the right answer, the other a marked one. A group in which all are marked and
one is right has advantages as large as one where none is marked.
"""

from alignax.configs import grpo_gsm8k, models


def get_config(arg: str = ""):
    c = grpo_gsm8k.get_config(arg)
    right = {"name": "final_answer"}
    marked = {"name": "final_answer", "correct": 0.0, "format": 1.0}
    if models.is_smoke(arg):
        right, marked = (
            {"name": "constraints", "pattern": p} for p in ("[a-m]", "[n-z]")
        )
    reward = {"name": "ensemble", "members": {"right": right, "marked": marked}}
    c.rollout.reward = reward
    c.evals.pass_at_k.reward = right
    c.shaping = {"gdpo": {}, "constant": {}, "whiten": {}}
    return c
