"""PoFT of SmolLM2-135M-Instruct on the chosen side of HH-RLHF pairs, against two models.

Source: Fan et al. 2024, https://arxiv.org/abs/2412.12865
Command: python -m alignax.main --config configs/poft.py --workdir runs/poft
  --config.data.path=pairs.jsonl.gz --config.lms.aligned=ONE --config.lms.aligned_2=OTHER
Every LM of c.lms whose name begins with 'aligned' is used: add or remove some. All must
have the policy's tokenizer.
"""

from alignax.configs import sft


def get_config(arg: str = ""):
    c = sft.get_config(arg)
    c.loss = {"name": "poft", "beta": 1.0, "gamma": 0.0}
    c.lms.aligned = "init" if arg else "models/SmolLM2-360M-Instruct"
    c.lms.aligned_2 = "init" if arg else "models/SmolLM2-1.7B-Instruct"
    c.optim.lr = 1e-6
    return c
