"""KTO of SmolLM2-135M-Instruct on the unpaired responses of HH-RLHF pairs.

Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306
Command: python -m alignax.main --config configs/kto.py --workdir runs/kto
  --config.data.source.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "kto", "beta": 0.1}
    c.loss.desirable_weight = c.loss.undesirable_weight = 1.0
    pairs = {k: v for k, v in c.data.items() if k != "split"}
    c.data = {"name": "unpaired", "split": "train", "source": pairs}
    c.data.mismatched = True
    if "path" in pairs:
        c.eval_data.path = c.data.source.get_oneway_ref("path")
    return c
