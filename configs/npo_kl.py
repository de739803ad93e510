"""NPO whose retain term is the KL to the model before unlearning.

Source: Zhang et al. 2024, https://arxiv.org/abs/2404.05868
Command: python -m alignax.main --config configs/npo_kl.py --workdir runs/npo_kl
  (after configs/authors.py, which makes runs/authors)
"""

from alignax.configs import npo


def get_config(arg: str = ""):
    c = npo.get_config(arg)
    c.loss = {"name": "npo_kl", "beta": 0.1, "retain_weight": 1.0}
    return c
