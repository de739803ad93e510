"""SFT of SmolLM2-135M-Instruct on honest answers, made of its own samples.

Source: Yang et al. 2023, https://arxiv.org/abs/2312.07000
Command: python -m alignax.main --config configs/honesty.py --workdir runs/honesty
  --config.data.source.path=runs/samples/samples.jsonl
  --config.eval_data.path=gsm8k/test.jsonl
The samples are those of configs/sample_pairs.py on the training split of GSM8K, with the
reward final_answer and truncated='keep'; 'groups.jsonl' is their form.
"""

from alignax.configs import models, sft


def get_config(arg: str = ""):
    c = sft.get_config(arg)
    smoke = models.is_smoke(arg)
    source = {"name": "jsonl", "split": "all", "path": ""}
    if smoke:
        source = {"name": "synthetic", "split": "train", "kind": "groups", "size": 16}
    c.data = {"name": "honesty", "split": "train", "recipe": "multisample"}
    c.data.source = source
    c.lms = {"ref": "init"}  # the model before
    reward = {"name": "final_answer"}
    if smoke:
        c.eval_data.kind = "prompts"
        reward = {"name": "constraints", "keywords": ("a",)}
    else:
        c.eval_data = {"name": "gsm8k", "split": "all", "path": ""}
    c.evals = {"honesty": {"reward": reward, "max_new": 8 if smoke else 256}}
    return c
