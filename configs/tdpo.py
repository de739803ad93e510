"""Token-level DPO (TDPO₂) of SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs.

Source: Zeng et al. 2024, https://arxiv.org/abs/2404.11999
Command: python -m alignax.main --config configs/tdpo.py --workdir runs/tdpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "tdpo", "beta": 0.1, "alpha": 0.5, "detach_chosen": True}
    return c
