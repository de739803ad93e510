"""CISPO of SmolLM2-135M-Instruct: clipped ratios without clipped gradients; else as DAPO.

Source: MiniMax 2025, https://arxiv.org/abs/2506.13585 (which does not give its bound)
Command: python -m alignax.main --config configs/cispo.py --workdir runs/cispo
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dapo


def get_config(arg: str = ""):
    c = dapo.get_config(arg)
    c.loss = {"name": "cispo", "clip_low": 1.0, "clip_high": 2.0, "reduction": "token"}
    return c
