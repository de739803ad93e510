"""D²O of SmolLM2-135M-Instruct on its own samples, each group with one human negative.

Source: Duan et al. 2024, https://arxiv.org/abs/2403.03419 (there 11 samples per prompt)
Command: python -m alignax.main --config configs/d2o.py --workdir runs/d2o
  --config.data.path=groups.jsonl
A row is {"prompt": ..., "responses": [samples..., negative], "scores": [1, ..., 0]}. The
negative is the last response; only the evaluation reads the scores.
"""

from alignax.configs import rrhf


def get_config(arg: str = ""):
    c = rrhf.get_config(arg)
    c.loss = {"name": "d2o", "beta": 0.1, "alpha": 0.1}
    c.lms = {"helpful": "init", "harmful": "init"}
    return c
