"""Responses of SmolLM2-135M-Instruct to a file of prompts; one variant per decoder.

Source: see the decoder's file in alignax/decoders/; for one, https://arxiv.org/abs/2402.06147
Command: python -m alignax.main --config configs/generate.py --workdir runs/generate
  --config.prompts.path=prompts.jsonl
configs/generate.py:args is the decoder `args`, configs/generate.py:args,smoke its smoke run.
c.lms has the paths of its models; `value` is from configs/value_mean.py. Change JUDGE.
"""

from alignax.configs import common, models

JUDGE = {"name": "constraints", "keywords": ("thank",), "max_words": 60}
METHODS = {  # decoder: (its hyper-parameters, models that it reads, reward)
    "args": ({"reward": "reward", "weight": 1.0}, {"reward": ""}, {}),
    "best_of_n": ({"n": 16, "select": "best"}, {}, JUDGE),
    "chain": ({"guides": ({"name": "proxy"}, {"name": "contrastive", "amateur": "ref"})}, {"policy": "init", "ref": "init"}, {}),
    "conditional_beam": ({"beams": 5, "top_k": 10}, {}, JUDGE),
    "contrastive": ({"weight": 0.5, "plausible": 0.1}, {"amateur": "init"}, {}),
    "controlled": ({"values": "value", "centre": 0.5, "radius": 0.6}, {"value": ""}, {}),
    "controlled_blocks": ({"n": 16, "block": 32}, {}, JUDGE),
    "deal": ({"top_k": 10, "lookahead": 16, "lam": 1.0, "prune": True}, {}, JUDGE),
    "gsi": ({"n": 16, "step": 64, "beta": 0.05}, {"draft": "init"}, JUDGE),
    "nudging": ({"gamma": 0.4}, {"nudge": "init"}, {}),
    "nudging_words": ({"gamma": 0.4, "chunk": 16}, {"nudge": "init"}, {}),
    "pine": ({"separator": "<|document|>"}, {}, {}),
    "proxy": ({"weight": 1.0}, {"policy": "init", "ref": "init"}, {}),
    "rain": ({"simulations": 50, "rollout": 32}, {"judge": "init"}, {"name": "self_evaluation"}),
    "rsd": ({"step": 64, "delta": 0.7}, {"draft": "init"}, JUDGE),
    "safe_decoding": ({"alpha": 3.0, "first": 2}, {"expert": "init"}, {}),
    "steering": ({"vectors": "random", "strength": 1.0}, {}, {}),
    "speculative_rejection": ({"n": 32, "every": 32, "reject": 0.5}, {}, JUDGE),
    "transfer_q": ({"variant": "direct", "candidates": 10}, {"ref": "init"}, JUDGE),
}  # fmt: skip


def get_config(arg: str = ""):
    method, _, rest = arg.partition(",")
    if method not in METHODS:
        method, rest = "", arg
    if rest not in ("", "smoke"):
        known = ", ".join(("'smoke'", *METHODS))
        raise ValueError(f"there is no variant {arg!r} of this config, only {known}")
    c = common.get_config()
    c.model.path = "models/SmolLM2-135M-Instruct.Q4_1.gguf"  # launch/fetch_smollm2.sh
    c.prompts = {"name": "prompts", "path": "", "size": 0}
    c.batch_size, c.length = 8, 1024
    c.loss = {"name": "sft"}  # a config needs one; nothing is trained
    hyper, lms, reward = METHODS.get(method, ({}, {}, {}))
    c.decoder, c.generate.reward, c.lms = {"name": method, **hyper}, reward, lms
    if models.is_smoke(rest):
        models.smoke(c, kind="prompts")
        c.num_steps, c.prompts, c.data, c.eval_data = 0, {**c.eval_data}, {}, {}
        c.generate.max_new = 8
        c.decoder.update({"pine": {"separator": "e"}, "rain": {"simulations": 3}}.get(method, {}))  # fmt: skip
        # the model's own value head, which is 0, in place of a trained one
        c.lms = {name: path for name, path in lms.items() if path}
        c.model.value_head = len(c.lms) < len(lms)
        for key in (k for k, v in hyper.items() if lms.get(str(v)) == ""):
            c.decoder[key] = "target"
    return c
