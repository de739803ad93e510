"""GRPO of SmolLM2-135M-Instruct on HH-RLHF prompts; a program checks the responses.

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300 (there 64 responses per prompt)
Command: python -m alignax.main --config configs/grpo.py --workdir runs/grpo
  --config.data.path=pairs.jsonl.gz
The reward is the share of constraints that a response satisfies: 15 to 40 words, no "sorry",
the end of a sentence. The other configs of on-policy methods change this one.
"""

from alignax.configs import common, models


def get_config(arg: str = ""):
    c = common.get_config()
    c.model.path = "models/SmolLM2-135M-Instruct.Q4_1.gguf"  # launch/fetch_smollm2.sh
    c.model.dtype = "bfloat16"
    c.loss = {"name": "policy_gradient_kl", "beta": 0.04, "estimator": "k3"}
    c.loss.update(clip_low=0.2, clip_high=0.2, reduction="sequence")
    c.lms = {"ref": "init"}
    c.data = {"name": "hh_rlhf", "split": "train", "kind": "prompts", "path": ""}
    c.data.test_fraction = 0.25
    c.eval_data = {**c.data, "split": "test", "kind": "sft"}
    for key in ("path", "test_fraction"):  # the same file, split in two
        c.eval_data[key] = c.data.get_oneway_ref(key)
    reward = {"name": "constraints", "min_words": 15, "max_words": 40}
    reward |= {"avoid": ("sorry",), "pattern": r"[.!?]\s*$"}
    c.rollout.group, c.rollout.max_new = 8, 64
    c.shaping = {"group_norm": {"scale": 1.0}}
    c.num_steps, c.batch_size, c.length = 200, 8, 192
    c.optim.lr, c.optim.schedule = 1e-6, "constant"
    c.evals = {"sample": {"group": 4, "max_new": 64, "size": 128}}
    c.eval_every, c.checkpoint.every = 100, 100
    if models.is_smoke(arg):
        models.smoke(c, kind="sft")
        c.data.kind = "prompts"
        # random bytes differ in this constraint
        reward = {"name": "constraints", "pattern": "[a-z]"}
        c.rollout.max_new = c.evals.sample.max_new = 8
    c.rollout.reward = reward  # evaluations judge with it too
    return c
