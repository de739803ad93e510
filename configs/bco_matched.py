"""BCO whose undesirable responses are weighted by how desirable their prompts are.

Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656, underlying distribution matching
Command: python -m alignax.main --config configs/bco_matched.py --workdir runs/bco_matched
  --config.data.source.source.path=pairs.jsonl.gz
"""

from alignax.configs import bco


def get_config(arg: str = ""):
    c = bco.get_config(arg)
    rows = {k: v for k, v in c.data.to_dict().items() if k != "split"}
    path = c.data.source.get("path")
    c.data = {"name": "density_ratio", "split": "train", "source": rows}
    if path is not None and c.eval_data.get("path") is not None:
        c.eval_data.path = c.data.source.source.get_oneway_ref("path")
    return c
