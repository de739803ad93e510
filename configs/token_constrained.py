"""Fine-tuning of SmolLM2-135M-Instruct with a constraint on the first response tokens.

Source: Qi et al. 2024, https://arxiv.org/abs/2406.05946
Command: python -m alignax.main --config configs/token_constrained.py
  --workdir runs/token_constrained --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import sft


def get_config(arg: str = ""):
    c = sft.get_config(arg)
    c.loss = {"name": "token_constrained", "early": 5, "reduction": "token"}
    c.loss.beta_first, c.loss.beta_early, c.loss.beta_late = 0.5, 2.0, 0.1
    c.lms = {"ref": "init"}  # the aligned model
    c.optim.b1 = 0.5
    return c
