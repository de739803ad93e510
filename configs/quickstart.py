"""SFT, then a reward model, then DPO, from scratch, on synthetic data.

Source: the pipeline of Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, with DPO
(Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) as the last step.
Command: make quickstart
  (python -m alignax.main --config configs/quickstart.py --workdir runs/quickstart)
"""

from ml_collections import ConfigDict

from alignax.configs import common, models


def get_config(arg: str = ""):
    smoke = models.is_smoke(arg)
    steps = (2, 2, 2) if smoke else (400, 60, 160)
    base = common.get_config()
    base.length = 72
    base.buckets = (72,)
    base.layout = "rows"  # a model this small is slower on long, packed rows
    base.tokenizer = "bytes"
    base.model.sizes = models.tiny() if smoke else models.small()
    base.eval_batch_size = 64
    base.optim.b2 = 0.98
    base.optim.warmup = 10

    sft = base.copy_and_resolve_references()
    sft.num_steps, sft.batch_size = steps[0], 16
    sft.loss = {"name": "sft", "reduction": "token"}
    sft.data = {
        "name": "synthetic",
        "split": "train",
        "kind": "sft",
        "size": 8192,
        "swapped": False,
    }
    sft.optim.lr, sft.optim.final = 6e-3, 0.0
    sft.eval_data = {"name": "synthetic", "split": "test", "kind": "sft", "size": 256}
    sft.evals = {"perplexity": {}}

    pairs = base.copy_and_resolve_references()
    pairs.batch_size = 16
    pairs.data = {
        "name": "synthetic",
        "split": "train",
        "kind": "pairs",
        "size": 4096,
        "swapped": False,
    }
    pairs.eval_data = {
        "name": "synthetic",
        "split": "test",
        "kind": "pairs",
        "size": 256,
    }
    pairs.evals = {"ranking_accuracy": {}}
    pairs.model.path = "stage:sft"

    reward_model = pairs.copy_and_resolve_references()
    reward_model.num_steps = steps[1]
    reward_model.model.value_head = True
    reward_model.loss = {"name": "reward_model", "margin": 0.0, "centring": 0.01}
    reward_model.optim.lr = 5e-4

    dpo = pairs.copy_and_resolve_references()
    dpo.num_steps = steps[2]
    dpo.loss = {"name": "dpo", "beta": 2.0, "label_smoothing": 0.0}
    dpo.lms = {"ref": "init"}
    dpo.optim.lr = 2e-4
    dpo.evals.win_rate = {
        "reward": "alignax.data.synthetic.judge",
        "max_new": 44,
        "size": 256,
    }

    stages = {"sft": sft, "reward_model": reward_model, "dpo": dpo}
    return ConfigDict({"stages": ConfigDict(stages, sort_keys=False)})
