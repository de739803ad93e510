"""DPO on rankings of SmolLM2-135M-Instruct on groups of scored responses.

Source: Rafailov et al. 2023, appendix A.3, https://arxiv.org/abs/2305.18290
Command: python -m alignax.main --config configs/plackett_luce.py
  --workdir runs/plackett_luce --config.data.path=groups.jsonl
A row is {"prompt": ..., "responses": [two or more], "scores": [a number for each]}, higher
is better; only the order of the scores counts.
"""

from alignax.configs import rrhf


def get_config(arg: str = ""):
    c = rrhf.get_config(arg)
    c.loss = {"name": "plackett_luce", "beta": 0.1}
    c.lms = {"ref": "init"}
    return c
