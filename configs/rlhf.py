"""RLHF on the raw reward, the baseline of ctrl_bon: SmolLM2-135M-Instruct.

Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; as a baseline: Balashankar
et al. 2024, https://arxiv.org/abs/2412.19792
Command: python -m alignax.main --config configs/rlhf.py --workdir runs/rlhf
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import ctrl_bon


def get_config(arg: str = ""):
    c = ctrl_bon.get_config(arg)
    del c.shaping["ctrl"]
    return c
