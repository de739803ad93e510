"""MPO of SmolLM2-135M-Instruct: DPO, a classifier of single responses, and imitation at once.

Source: Wang et al. 2024, https://arxiv.org/abs/2411.10442 (weights .8, .2 and 1)
Command: python -m alignax.main --config configs/mpo.py --workdir runs/mpo
  --config.data.path=pairs.jsonl.gz
A sum of losses: every part has a weight and its own hyper-parameters, and metrics of its own.
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {
        "name": "sum",
        "parts": {
            "dpo": {"weight": 0.8, "beta": 0.1, "label_smoothing": 0.0},
            "bco_pair": {"weight": 0.2, "beta": 0.1},
            "nll_chosen": {"weight": 1.0},
        },
    }
    return c
