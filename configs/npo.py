"""NPO: unlearning of ten out of a hundred fictitious authors.

Source: Zhang et al. 2024, https://arxiv.org/abs/2404.05868; data in the way of TOFU,
https://arxiv.org/abs/2401.06121
Command: python -m alignax.main --config configs/npo.py --workdir runs/npo
  (after configs/authors.py, which makes runs/authors)
"""

from alignax.configs import authors


def get_config(arg: str = ""):
    c = authors.get_config(arg)
    c.loss = {"name": "npo", "beta": 0.1, "retain_weight": 1.0}
    c.lms = {"ref": "init"}
    part = {"name": "forget_retain", "split": "train", "kind": "answers", "ratio": 1}
    c.data = {}
    c.mixture = {"forget": {**part, "part": "forget"}}
    c.mixture.retain = {**part, "part": "retain"}
    c.eval_data.part = "retain"
    if not arg:
        c.model.path = "runs/authors"
        c.num_steps = 150  # ten epochs of the forget set
    return c
