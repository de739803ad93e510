"""AFT of SmolLM2-135M-Instruct on groups of right and wrong answers.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.02144
Command: python -m alignax.main --config configs/aft.py --workdir runs/aft
  --config.data.path=groups.jsonl
A row is {"prompt": ..., "responses": [two or more], "scores": [1 for a right answer, 0 for
a wrong one]}; what is above 0.5 is right.
"""

from alignax.configs import rrhf


def get_config(arg: str = ""):
    c = rrhf.get_config(arg)
    c.loss = {"name": "aft", "constraint": "boundary", "slack": 0.1, "lam": 1.0}
    return c
