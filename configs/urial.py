"""URIAL: a base model answers prompts after three in-context examples; nothing is trained.

Source: Lin et al. 2023, https://arxiv.org/abs/2312.01552
Command: python -m alignax.main --config configs/urial.py --workdir runs/urial
  --config.prompts.source.path=prompts.txt --config.model.path=models/SmolLM2-135M
The tokenizer is that of a base model, without a chat template.
"""

from alignax.configs import generate


def get_config(arg: str = ""):
    c = generate.get_config(arg)
    source = c.prompts.to_dict()
    c.prompts = {"name": "urial", "split": source.get("split", "all"), "shots": 3}
    c.prompts.source = source
    c.length = 2048
    c.generate.temperature = 0.0
    c.generate.stops = ("\n```\n\n# Query", "\n```\n# Query", "\n# Query:")
    if arg == "smoke":  # in bytes the instructions are longer than the model's context
        c.prompts.shots = 0
        c.length = c.model.sizes.max_length = 1024
    return c
