"""Best-of-N jailbreaking of SmolLM2-135M-Instruct: repeated attempts until one succeeds.

Source: Hughes et al. 2024, https://arxiv.org/abs/2412.03556
Command: python -m alignax.main --config configs/bon_jailbreak.py --workdir runs/bon
  --config.eval_data.path=harmful.jsonl --config.evals.bon_jailbreak.control.path=harmless.jsonl
The evaluator is a keyword rule in place of a trained judge. To use your own, a function of
the text: --config.evals.bon_jailbreak.evaluator.name=my_project.judge
"""

from alignax.configs import dpo, exploitation, models


def get_config(arg: str = ""):
    smoke = models.is_smoke(arg)
    attack = {**exploitation.ATTACK, "tries": 64, "sigma": 0.4, "size": 100}
    if smoke:
        attack |= {"max_new": 4, "tries": 4}
    return exploitation.attacked(dpo.get_config(arg), "bon_jailbreak", attack, smoke)
