"""DPO of Llama 3 8B on a pod slice of 64 chips; nothing is downloaded.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; model: Dubey et al. 2024,
https://arxiv.org/abs/2407.21783
Command: launch/tpu_pod.sh TPU ZONE configs/dpo_llama3_8b.py gs://BUCKET/runs/llama3
  --config.model.path=WEIGHTS --config.data.path=PAIRS.jsonl
The sizes are in the config so that --explain and preflight need no weights. Cost and
result: not run yet. By `python -m alignax.preflight --config configs/dpo_llama3_8b.py
--topology v5e:8x8` it fits: 10.99 GiB of 15.75 GiB per chip, at least 1.67 s per step.
"""

from alignax.configs import common, models


def get_config(arg: str = ""):
    c = common.get_config()
    c.model.path = "weights/Meta-Llama-3-8B-Instruct"
    c.model.sizes = models.llama3_8b()
    c.model.dtype, c.model.remat = "bfloat16", "block"
    c.loss = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}
    c.lms = {"ref": "init"}
    c.data = {"name": "jsonl", "split": "train", "path": "", "test_fraction": 0.05}
    c.eval_data = {**c.data, "split": "test"}
    c.eval_data.path = c.data.get_oneway_ref("path")  # the same file, split in two
    c.evals = {"ranking_accuracy": {}}
    c.mesh = (1, 64, 1)
    c.layout = "grouped"  # one pair per chip: no other pair to pack into its row
    c.num_steps, c.batch_size, c.length = 1000, 64, 2048
    c.optim.lr, c.optim.warmup = 5e-7, 100
    c.eval_every = c.checkpoint.every = 200
    if models.is_smoke(arg):
        models.smoke(c, kind="pairs")
    return c
