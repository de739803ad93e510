"""Safety beyond the first tokens: refusals that follow harmful prefixes, too.

Source: Qi et al. 2024, https://arxiv.org/abs/2406.05946
Command: python -m alignax.main --config configs/safety_recovery.py
  --workdir runs/safety_recovery --config.data.source.path=pairs.jsonl.gz
"""

from alignax.configs import sft


def get_config(arg: str = ""):
    c = sft.get_config(arg)
    pairs = {k: v for k, v in c.data.items() if k != "split"} | {"kind": "pairs"}
    c.data = {"name": "recovery", "split": "train", "source": pairs}
    c.data.plain, c.data.longest = 0.5, 100
    if "path" in pairs:
        c.eval_data.path = c.data.source.get_oneway_ref("path")
    return c
