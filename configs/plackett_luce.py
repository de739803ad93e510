"""DPO on rankings (here of two) of SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs.

Source: Rafailov et al. 2023, appendix A.3, https://arxiv.org/abs/2305.18290
Command: python -m alignax.main --config configs/plackett_luce.py
  --workdir runs/plackett_luce --config.data.path=pairs.jsonl.gz
"""

from configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "plackett_luce", "beta": 0.1}
    return c
