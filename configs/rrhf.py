"""RRHF of SmolLM2-135M-Instruct on groups of scored responses.

Source: Yuan et al. 2023, https://arxiv.org/abs/2304.05302
Command: python -m alignax.main --config configs/rrhf.py --workdir runs/rrhf
  --config.data.path=groups.jsonl
A row is {"prompt": ..., "responses": [two or more], "scores": [a number for each]}, higher
is better; {"prompt": ..., "chosen": ..., "rejected": ...} is a group of two. A tenth of the
prompts is held out; the evaluation data are all ordered pairs of their responses.
"""

from alignax.configs import dpo_jsonl


def get_config(arg: str = ""):
    c = dpo_jsonl.get_config(arg)
    c.loss = {"name": "rrhf", "lam": 1.0}
    c.lms = {}
    c.data.kind = "groups"
    groups = {k: v for k, v in c.data.items() if k != "split"}
    c.eval_data = {"name": "pairing", "split": "test", "source": groups}
    c.eval_data.strategy = "all"
    if arg:
        c.eval_data.source.size = 16
    else:  # the same file, split in two
        for key in ("path", "test_fraction"):
            c.eval_data.source[key] = c.data.get_oneway_ref(key)
    return c
