"""GRPO of Qwen2.5-1.5B-Instruct on GSM8K, on a pod slice of 16 chips.

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300; settings of Yu et al. 2025,
https://arxiv.org/abs/2503.14476; model: Yang et al. 2024, https://arxiv.org/abs/2412.15115
Command: launch/tpu_pod.sh TPU ZONE configs/grpo_gsm8k_pod.py gs://BUCKET/runs/gsm8k
  --config.model.path=WEIGHTS --config.data.path=gsm8k/{split}.jsonl
Sixteen responses to each of 128 prompts, and two steps a rollout. Groups without a
difference are sampled again. Only the answer is rewarded, which this model marks when asked
to. The whole test file is evaluated. Cost and result: not run yet.
"""

from alignax.configs import grpo_gsm8k, models


def get_config(arg: str = ""):
    c = grpo_gsm8k.get_config(arg)
    c.rollout.dynamic_sampling = True
    if arg:
        return c
    c.model.path = "weights/Qwen2.5-1.5B-Instruct"
    c.model.sizes, c.model.remat = models.qwen2_5_1_5b(), "block"
    c.rollout.group, c.rollout.max_new, c.rollout.batches = 16, 512, 2
    c.rollout.reward.format = 0.0
    c.mesh = (1, 16, 1)
    c.num_steps, c.batch_size, c.length = 500, 64, 768
    c.optim.lr, c.optim.warmup = 1e-6, 10
    c.evals.pass_at_k = {"k": (1, 8), "samples": 8, "max_new": 512, "size": 0}
    c.eval_every = c.checkpoint.every = 50
    return c
