"""SFT of SmolLM2-135M-Instruct on fictitious authors: the model that unlearning starts from.

Source: Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121
Command: python -m alignax.main --config configs/authors.py --workdir runs/authors
"""

from alignax.configs import sft


def get_config(arg: str = ""):
    c = sft.get_config(arg)
    c.data = {"name": "forget_retain", "split": "train", "part": "all"}
    c.data.labelled = False  # all answers are learned
    c.eval_data = {"name": "forget_retain", "split": "test", "part": "all"}
    c.optim.lr, c.optim.weight_decay = 1e-5, 0.01
    if not arg:
        c.num_steps = 375  # five epochs of 100 authors
    return c
