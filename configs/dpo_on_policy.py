"""DPO on the policy's own samples: best against worst of each group, ties dropped.

Source: Tajwar et al. 2024, https://arxiv.org/abs/2404.14367
Command: python -m alignax.main --config configs/dpo_on_policy.py --workdir runs/on_policy
  --config.data.source.path=runs/samples/samples.jsonl
The samples are those of configs/sample_pairs.py.
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    if arg:  # the pairs that the smoke makes itself have scores 1 and 0
        groups = {"name": "synthetic", "kind": "pairs", "size": 64}
    else:
        groups = {"name": "jsonl", "path": "runs/samples/samples.jsonl"}
        groups["test_fraction"] = 0.25
    c.data = {"name": "pairing", "split": "train", "source": groups, "margin": 0.0}
    c.eval_data = {**c.data.to_dict(), "split": "test"}
    if not arg:  # the same file, split in two
        c.eval_data.source.path = c.data.source.get_oneway_ref("path")
    return c
