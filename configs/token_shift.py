"""Token-distribution shift: how often a base model would pick the instruct model's tokens.

Source: Lin et al. 2023, https://arxiv.org/abs/2312.01552, section 2
Command: python -m alignax.main --config configs/token_shift.py --workdir runs/token_shift
  --config.eval_data.path=prompts.jsonl
"""

from alignax.configs import sft


def get_config(arg: str = ""):
    c = sft.get_config(arg)
    c.lms = {"ref": "init" if arg else "models/SmolLM2-135M"}  # the base
    c.evals = {"token_shift": {"ranks": True, "plain": True, "max_new": 64}}
    if not arg:
        c.num_steps, c.data = 0, {}
        c.eval_data = {"name": "jsonl", "split": "all", "kind": "prompts", "path": ""}
    else:
        c.evals.token_shift.max_new = 8
    return c
