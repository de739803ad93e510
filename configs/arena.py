"""Arena: best-of-{1, 2, 4, 8, 16} of SmolLM2-135M-Instruct, ranked by a tournament.

Source: Son et al. 2024, https://arxiv.org/abs/2411.01281
Command: python -m alignax.main --config configs/arena.py --workdir runs/arena
  --config.eval_data.path=prompts.jsonl
The judge is a rule that rewards relevant responses without repetition; best-of-N is selected
by repetition alone. If the judge selected, ratings would be 400 log10 N for any model. To rank
models, name them in c.lms, and give each contestant a 'model'; a language model as the judge
is 'reward': {'name': 'judge'} with 'pairwise': True.
"""

from alignax.configs import dpo, models


def get_config(arg: str = ""):
    smoke = models.is_smoke(arg)
    c = dpo.get_config(arg)
    sizes = (1, 2, 4) if smoke else (1, 2, 4, 8, 16)
    file = {"name": "jsonl", "split": "all", "path": "", "kind": "prompts"}
    made = {"name": "synthetic", "split": "test", "kind": "prompts", "size": 4}
    c.evals = {
        "arena": {
            "contestants": {f"best_of_{n}": {"best_of": n} for n in sizes},
            "reward": {"name": "relevance", "factors": ("relevance", "repetition")},
            "selector": {"name": "relevance", "factors": ("repetition",)},
            "pairing": "bracket",
            "max_new": 4 if smoke else 64,
        }
    }
    c.eval_data, c.lms = made if smoke else file, {}
    c.num_steps = 2 if smoke else 0
    c.loss, c.data = {"name": "sft"}, {**made, "kind": "sft", "split": "train"}
    return c
