"""On-policy distillation into SmolLM2-135M-Instruct: its own responses, a teacher's exact KL.

Source: Agarwal et al. 2023 (GKD), https://arxiv.org/abs/2306.13649
Command: python -m alignax.main --config configs/distill_on_policy.py --workdir runs/distill
  --config.data.path=pairs.jsonl.gz --config.lms.ref=TEACHER
Every step draws a response to each prompt and brings the student's distribution of each of
its tokens closer to the teacher's, by KL(student || teacher). There is no reward.
"""

from alignax.configs import gkd


def get_config(arg: str = ""):
    c = gkd.get_config(arg)
    c.loss.reverse = 1.0
    c.rollout.source = "policy"
    c.rollout.group, c.rollout.max_new = 1, 8 if arg else 128
    c.data.kind = "prompts"
    return c
