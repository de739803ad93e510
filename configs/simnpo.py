"""SimNPO: unlearning of fictitious authors without a reference.

Source: Fan et al. 2024, https://arxiv.org/abs/2410.07163
Command: python -m alignax.main --config configs/simnpo.py --workdir runs/simnpo
  (after configs/authors.py, which makes runs/authors)
"""

from alignax.configs import npo


def get_config(arg: str = ""):
    c = npo.get_config(arg)
    c.loss = {"name": "simnpo", "beta": 2.5, "gamma": 0.0}
    c.loss.retain_weight = 7.27  # 1 / 0.1375, the coefficient of the forget term there
    c.lms = {}
    return c
