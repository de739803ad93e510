"""DPO of SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; data: Bai et al. 2022,
https://arxiv.org/abs/2204.05862
Command: python -m alignax.main --config configs/dpo.py --workdir runs/dpo
  --config.data.path=pairs.jsonl.gz --config.eval_data.path=pairs.jsonl.gz
"""

from configs import common, models


def get_config(arg: str = ""):
    c = common.get_config()
    c.model.path = "weights/SmolLM2-135M-Instruct.Q4_1.gguf"  # launch/fetch_smollm2.sh
    c.model.dtype = "bfloat16"
    c.loss = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}
    c.lms = {"ref": "init"}
    c.data = {"name": "hh_rlhf", "split": "train", "kind": "pairs", "path": ""}
    c.data.size = 400  # pairs, about 2.4 epochs; 0 takes all
    c.eval_data = {"name": "hh_rlhf", "split": "test", "kind": "pairs", "path": ""}
    c.evals = {"ranking_accuracy": {}}
    c.num_steps, c.batch_size = 120, 8
    c.length, c.buckets = 160, (96, 160)
    c.optim.lr, c.optim.warmup = 4e-5, 10
    c.checkpoint.every = 40
    if arg == "smoke":
        models.smoke(c, kind="pairs")
    return c
