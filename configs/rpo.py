"""RPO on HH-RLHF pairs: DPO plus the likelihood of the chosen response.

Source: Pang et al. 2024, https://arxiv.org/abs/2404.19733
Command: python -m alignax.main --config configs/rpo.py --workdir runs/rpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "rpo", "beta": 0.1, "alpha": 1.0}
    return c
