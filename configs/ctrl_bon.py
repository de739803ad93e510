"""CTRL for best-of-4: SmolLM2-135M-Instruct aligned for the best of four of its samples.

Source: Balashankar et al. 2024, https://arxiv.org/abs/2412.19792: calibrated reward,
e^{10u} for best-of-4, KL-regularised RL; the paper has 100 reference samples per prompt
Command: python -m alignax.main --config configs/ctrl_bon.py --workdir runs/ctrl_bon
  --config.data.path=pairs.jsonl.gz
Differs from the paper: leave-one-out baselines instead of a critic. Compare methods at
equal KL, never at equal beta.
"""

from alignax.configs import rloo


def get_config(arg: str = ""):
    c = rloo.get_config(arg)
    c.shaping = {
        "ctrl": {"transform": "exp", "t": 10.0},
        "kl": {"beta": 0.1},
        "rloo": {},
    }
    c.rollout.group = 8
    c.rollout.reference_samples = 8 if arg else 100
    c.evals = {"inference_win_rate": {"n": (4,), "samples": 8 if arg else 32}}
    c.evals.inference_win_rate.max_new = c.rollout.max_new
    c.evals.inference_win_rate.size = 64
    return c
