"""DPO of SmolLM2-135M-Instruct on HH-RLHF harmless-base pairs.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; data: Bai et al. 2022,
https://arxiv.org/abs/2204.05862
Command: python -m alignax.main --config configs/dpo.py --workdir runs/dpo
  --config.data.path=pairs.jsonl.gz
Cost: 44 minutes on 2 CPU cores, with evaluation: 100 to 120 real tokens/s, 15 s per step
in bfloat16, 9.6 GB of memory, with config.layout = 'rows'.
Result: ranking accuracy of the implicit reward on 459 unseen pairs .608 [.563, .651]
(chance: .5), on 400 of its training pairs .985 [.968, .993]. During the first epoch, on
pairs before their first update, it was .65; during the second epoch 1.
"""

from alignax.configs import common, models


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
    for key in ("path", "test_fraction"):  # the same file, split in two
        c.eval_data[key] = c.data.get_oneway_ref(key)
    c.evals = {"ranking_accuracy": {}}
    c.num_steps, c.batch_size = 150, 8
    c.length, c.buckets = 128, (64, 96, 128)
    c.optim.lr, c.optim.warmup = 4e-5, 10
    c.checkpoint.every = 75
    if models.is_smoke(arg):
        models.smoke(c, kind="pairs")
    return c
