"""D²O of SmolLM2-135M-Instruct; chosen sides of HH-RLHF pairs stand in for own samples.

Source: Duan et al. 2024, https://arxiv.org/abs/2403.03419 (11 samples a prompt there)
Command: python -m alignax.main --config configs/d2o.py --workdir runs/d2o
  --config.data.path=pairs.jsonl.gz
"""

from configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "d2o", "beta": 0.1, "alpha": 0.1}
    c.lms = {"helpful": "init", "harmful": "init"}
    return c
