"""LongPO of SmolLM2-135M-Instruct: pairs of short prompts, trained behind a long context.

Source: Chen et al. 2025, https://arxiv.org/abs/2502.13922
Command: python -m alignax.main --config configs/longpo.py --workdir runs/longpo
  --config.data.source.path=pairs.jsonl
The pairs are responses to the short prompts, as strings; `data.short_long` makes pairs of
the model's own answers to the short and to the long prompt.
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.loss = {"name": "longpo", "beta": 0.01, "lam": 0.01}
    short = {"name": "jsonl", "path": "pairs.jsonl", "kind": "pairs"}
    if arg:
        short = {"name": "synthetic", "kind": "pairs", "size": 64}
        c.length, c.buckets = 192, (192,)
    c.reference_data = {**short, "split": "train"}
    c.data = {"name": "long_context", "split": "train", "source": short, "documents": 4}
    if not arg:  # the same file, split in two, with two contexts
        c.data.source.test_fraction = c.reference_data.test_fraction = 0.25
        c.eval_data = {**c.data.to_dict(), "split": "test"}
        for section in (c.reference_data, c.eval_data.source):
            section.path = c.data.source.get_oneway_ref("path")
        c.length, c.buckets = 1024, (512, 1024)
    c.optim.lr = 5e-7
    return c
