"""TR-DPO: DPO with a reference that is moved towards the policy every few steps.

Source: Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656 (α = 0.6, τ = 512 in long runs: with
average = 0.4 the reference becomes 0.6 policy + 0.4 reference)
Command: python -m alignax.main --config configs/tr_dpo.py --workdir runs/tr_dpo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.lms = {"ref": "average"}
    c.average, c.average_every = 0.4, 1 if arg else 32  # of 150 steps
    return c
