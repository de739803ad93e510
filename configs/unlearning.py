"""Evaluates an unlearned model beside one that was trained without what is to be forgotten.

Source: Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121; membership and extraction
as in Shi et al. 2024 (MUSE), https://arxiv.org/abs/2407.06460
Command: python -m alignax.main --config configs/unlearning.py --workdir runs/unlearning
  --config.model.path=runs/npo --config.lms.retrained=runs/retrained
  (after configs/npo.py, and configs/authors.py once more with data.part='retain' and
  num_steps=338, which is five epochs of the 90 retained authors)
The authors are made up. A copy of TOFU is read by the data set 'tofu', in eval_data and in
the sets of the evaluations.
"""

from alignax.configs import authors


def get_config(arg: str = ""):
    c = authors.get_config(arg)
    made = {"name": "forget_retain", "split": "train", "kind": "options"}
    c.eval_data = {**made, "part": "forget"}
    c.lms = {"retrained": "init" if arg else "runs/retrained"}
    c.evals = {
        "unlearning": {"retain": {**made, "part": "retain"}, "max_new": 32, "size": 60},
        "memorisation": {
            # the last 10 of 200 authors, of whom the first 100 were trained on
            "nonmembers": {**made, "part": "forget", "authors": 200, "forget": 0.05},
            "questions": {"forget": {**made, "part": "forget", "split": "test"}},
            "max_new": 32, "size": 60,
        },
    }  # fmt: skip
    if arg:
        for evaluation in c.evals.values():
            evaluation.max_new, evaluation.size = 4, 4
    else:
        c.model.path, c.num_steps, c.data = "runs/npo", 0, {}
    return c
