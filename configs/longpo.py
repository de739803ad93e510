"""LongPO of SmolLM2-135M-Instruct: prompts behind other prompts, answered as without them.

Source: Chen et al. 2025, https://arxiv.org/abs/2502.13922
Command: python -m alignax.main --config configs/longpo.py --workdir runs/longpo
  --config.data.source.path=pairs.jsonl
The pairs are those of the short prompts, as strings; `data.short_long` makes pairs of the
model's own answers under the two.
"""

from configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "longpo", "beta": 0.01, "lam": 0.01}
    short = {"name": "jsonl", "path": "pairs.jsonl", "kind": "pairs"}
    if arg:
        short = {"name": "synthetic", "kind": "pairs", "size": 64}
        c.length, c.buckets = 192, (192,)
    c.reference_data = {**short, "split": "train"}
    c.data = {"name": "long_context", "split": "train", "source": short, "documents": 4}
    if not arg:  # one file, two splits and two contexts
        c.data.source.test_fraction = c.reference_data.test_fraction = 0.25
        c.eval_data = {**c.data.to_dict(), "split": "test"}
        for section in (c.reference_data, c.eval_data.source):
            section.path = c.data.source.get_oneway_ref("path")
        c.length, c.buckets = 1024, (512, 1024)
    c.optim.lr = 5e-7
    return c
