"""SFT of SmolLM2-135M-Instruct on the chosen side of HH-RLHF pairs.

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155; data: Bai et al. 2022,
https://arxiv.org/abs/2204.05862
Command: python -m alignax.main --config configs/sft.py --workdir runs/sft
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import common, models


def get_config(arg: str = ""):
    c = common.get_config()
    c.model.path = "models/SmolLM2-135M-Instruct.Q4_1.gguf"  # launch/fetch_smollm2.sh
    c.model.dtype = "bfloat16"
    c.loss = {"name": "sft", "reduction": "token"}
    c.data = {"name": "hh_rlhf", "split": "train", "kind": "sft", "path": ""}
    c.data.size = 0  # pairs; 0 takes all
    c.data.test_fraction = 0.25
    c.eval_data = {**c.data, "split": "test", "size": 0}
    c.eval_data.path = c.data.get_oneway_ref("path")  # the same file, split in two
    c.evals = {"perplexity": {}}
    c.num_steps, c.batch_size, c.length = 100, 8, 256
    c.optim.lr, c.optim.warmup = 2e-5, 10
    c.checkpoint.every = 50
    if models.is_smoke(arg):
        models.smoke(c, kind="sft")
    return c
