"""Distillation into SmolLM2-135M-Instruct from a frozen teacher with the same tokenizer.

Source: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649
Command: python -m alignax.main --config configs/gkd.py --workdir runs/gkd
  --config.data.path=pairs.jsonl.gz --config.lms.ref=TEACHER
"""

from alignax.configs import sft


def get_config(arg: str = ""):
    c = sft.get_config(arg)
    c.loss = {"name": "gkd", "reverse": 0.5, "reduction": "token"}
    c.lms = {"ref": "init" if arg else "models/SmolLM2-360M-Instruct"}
    return c
