"""BCO of SmolLM2-135M-Instruct on the unpaired responses of HH-RLHF pairs.

Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656
Command: python -m alignax.main --config configs/bco.py --workdir runs/bco
  --config.data.source.path=pairs.jsonl.gz
"""

from alignax.configs import kto


def get_config(arg: str = ""):
    c = kto.get_config(arg)
    c.loss = {"name": "bco", "beta": 0.1}
    c.data.mismatched = False
    return c
