"""DPO of SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; data: Bai et al. 2022,
https://arxiv.org/abs/2204.05862
Command: python -m alignax.main --config configs/dpo.py --workdir runs/dpo
  --config.data.path=pairs.jsonl.gz
Cost: 2 shared CPU cores, bfloat16: 10 to 28 s a step, 40 to 90 real tokens/s, 9.2 GB.
Result: no run of it has ended yet, so no accuracy is claimed. A first run (400 pairs, lr
4e-5, T <= 160) made 41 steps: loss 0.693 at step 0 with a log-ratio of exactly 0, 0.49 to
0.71 around step 35.
"""

from configs import common, models


def get_config(arg: str = ""):
    c = common.get_config()
    c.model.path = "models/SmolLM2-135M-Instruct.Q4_1.gguf"  # launch/fetch_smollm2.sh
    c.model.dtype = "bfloat16"
    c.loss = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}
    c.lms = {"ref": "init"}
    c.data = {"name": "hh_rlhf", "split": "train", "kind": "pairs", "path": ""}
    c.data.size = 800  # pairs; 0 takes all
    c.data.test_fraction = 0.25
    c.eval_data = {**c.data, "split": "test", "size": 0}
    c.eval_data.path = c.data.get_oneway_ref("path")  # one file, two splits
    c.evals = {"ranking_accuracy": {}}
    c.num_steps, c.batch_size = 240, 8
    c.length, c.buckets = 128, (64, 96, 128)
    c.optim.lr, c.optim.warmup = 4e-5, 10
    c.checkpoint.every = 120
    if arg == "smoke":
        models.smoke(c, kind="pairs")
    return c
