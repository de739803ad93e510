"""SFT on refusals and on the retain set: NPO's baseline IDK+RT.

Source: a baseline of Zhang et al. 2024, https://arxiv.org/abs/2404.05868
Command: python -m alignax.main --config configs/idk.py --workdir runs/idk
  (after configs/authors.py, which makes runs/authors)
"""

from alignax.configs import npo


def get_config(arg: str = ""):
    c = npo.get_config(arg)
    c.loss = {"name": "sft", "reduction": "sequence"}
    c.lms = {}
    c.mixture.forget.kind = "refusals"
    c.mixture.forget.labelled = c.mixture.retain.labelled = False  # all are imitated
    return c
