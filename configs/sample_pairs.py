"""Samples groups of responses and scores them by verifiers; nothing is trained.

Source: on-policy pairs by constraint satisfaction, as in ACT (Wang et al. 2024),
https://arxiv.org/abs/2403.06326
Command: python -m alignax.main --config configs/sample_pairs.py --workdir runs/samples
  --config.data.path=pairs.jsonl.gz
The groups are written to runs/samples/samples.jsonl; configs/dpo_on_policy.py trains on them.
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.num_steps = 2 if arg else 0
    c.eval_data.split = "train"
    c.evals = {"sample": {"group": 4, "max_new": 64, "size": 16 if arg else 256}}
    c.evals.sample.truncated = "drop"
    c.evals.sample.reward = {
        "name": "constraints",
        "max_words": 40,
        "avoid": ("sorry",),
    }
    return c
