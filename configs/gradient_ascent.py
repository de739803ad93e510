"""Gradient ascent with a retain term: NPO's baseline on the same fictitious authors.

Source: Maini et al. 2024 (gradient difference), https://arxiv.org/abs/2401.06121
Command: python -m alignax.main --config configs/gradient_ascent.py
  --workdir runs/gradient_ascent (after configs/authors.py, which makes runs/authors)
"""

from alignax.configs import npo


def get_config(arg: str = ""):
    c = npo.get_config(arg)
    c.loss = {"name": "gradient_ascent", "retain_weight": 1.0}  # 0 is ascent alone
    c.lms = {}
    return c
