"""WPO on HH-RLHF pairs: DPO weighted by the policy's probability of each pair.

Source: Zhou et al. 2024, https://arxiv.org/abs/2406.11827
Command: python -m alignax.main --config configs/wpo.py --workdir runs/wpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.reweight = {"wpo": {}}
    return c
