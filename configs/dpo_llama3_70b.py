"""DPO of Llama 3 70B on a slice of 32 v5p chips; nothing is downloaded.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; model: Dubey et al. 2024,
https://arxiv.org/abs/2407.21783
Command: launch/tpu_pod.sh TPU ZONE configs/dpo_llama3_70b.py gs://BUCKET/runs/llama3_70b
  --config.model.path=WEIGHTS --config.data.path=PAIRS.jsonl
Cost and result: not run yet. By `python -m alignax.preflight --config
configs/dpo_llama3_70b.py --topology v5p:2x4x4` it fits: 80.28 GiB of 95.74 GiB per chip, at
least 12.6 s per step. 16 chips are too few (101 GiB with four micro-batches).
"""

from alignax.configs import dpo_llama3_8b, models


def get_config(arg: str = ""):
    c = dpo_llama3_8b.get_config(arg)
    if models.is_smoke(arg):
        return c
    c.model.path = "weights/Meta-Llama-3-70B-Instruct"
    c.model.sizes = models.llama3_70b()
    c.mesh, c.layout = (1, 32, 1), "rows"
    return c
