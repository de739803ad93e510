"""DPO for unlearning: refusals are preferred to the answers of NPO's forget set.

Source: a baseline of Zhang et al. 2024, https://arxiv.org/abs/2404.05868
Command: python -m alignax.main --config configs/unlearn_dpo.py
  --workdir runs/unlearn_dpo (after configs/authors.py, which makes runs/authors)
"""

from alignax.configs import npo


def get_config(arg: str = ""):
    c = npo.get_config(arg)
    c.loss = {"name": "unlearn_dpo", "beta": 0.1, "retain_weight": 1.0}
    c.mixture.forget.kind = "pairs"
    c.mixture.retain.labelled = False
    return c
