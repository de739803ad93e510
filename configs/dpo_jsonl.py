"""DPO of SmolLM2-135M-Instruct on pairs of your own, JSONL or Parquet.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290
Command: python -m alignax.main --config configs/dpo_jsonl.py --workdir runs/mine
  --config.data.path=pairs.jsonl
"""

from alignax.configs import common, models


def get_config(arg: str = ""):
    c = common.get_config()
    c.model.path = "models/SmolLM2-135M-Instruct.Q4_1.gguf"  # launch/fetch_smollm2.sh
    c.model.dtype = "bfloat16"
    c.loss = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}
    c.lms = {"ref": "init"}
    c.data = {"name": "jsonl", "split": "train", "path": "", "test_fraction": 0.1}
    c.eval_data = {**c.data, "split": "test"}
    for key in ("path", "test_fraction"):  # the same file, split in two
        c.eval_data[key] = c.data.get_oneway_ref(key)
    c.evals = {"ranking_accuracy": {}}
    c.num_steps, c.batch_size, c.length = 100, 8, 256
    c.optim.lr, c.optim.warmup = 2e-5, 10
    c.checkpoint.every = 50
    if models.is_smoke(arg):
        models.smoke(c, kind="pairs")
    return c
