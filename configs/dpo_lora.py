"""DPO of adapters (LoRA, rank 16) on SmolLM2-135M-Instruct; the frozen base is the reference.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290
Command: python -m alignax.main --config configs/dpo_lora.py --workdir runs/dpo_lora
  --config.data.path=pairs.jsonl.gz
"""

from alignax.configs import dpo


def get_config(arg: str = ""):
    c = dpo.get_config(arg)
    c.lora.rank, c.lora.alpha = 16, 32.0
    c.optim.lr = 5e-4  # adapters take about ten times the rate of all weights
    return c
