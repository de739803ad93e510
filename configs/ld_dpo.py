"""Length-desensitised DPO of SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs.

Source: Liu et al. 2024, https://arxiv.org/abs/2409.06411
Command: python -m alignax.main --config configs/ld_dpo.py --workdir runs/ld_dpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.reweight = {"length_desensitised": {"alpha": 0.5}}
    return c
