"""A student that is taught on its own samples comes closer to its teacher there.

Agarwal et al. 2023, https://arxiv.org/abs/2306.13649 (GKD). A teacher of two layers of width
64 over 6 tokens, fresh weights times 6, so that its next tokens are far from uniform; a
student of one layer of width 16. All methods see the same number of response tokens, 16
responses a step. Distances are KL(π ‖ π_teacher) of whole responses of 4 tokens to 4
prompts, exact: all 1296 responses are enumerated.

Predicted: taught by KL(π ‖ π_teacher) on its own samples, the student ends at less than
half of the distance of SFT on the teacher's samples. And it is on-policy data that matter:
it ends below word-level distillation, which has the teacher's whole distributions too, but
on the teacher's samples. The latter proves false at this size.

Control: SFT on the student's own samples, which has on-policy data and no teacher.
"""

import functools
import itertools

import jax
import numpy as np
import report
import toy

from alignax.batch import LM, Batch
from alignax.sampling import decode

VOCAB, NEW, PROMPTS, GROUP = 6, 4, 4, 4
STEPS, EVERY, RATE = 1500, 150, 3e-3
ASKED = np.array([[0, 1], [0, 2], [1, 3], [2, 4]])
SHARPER = 6.0  # factor of the teacher's weights
METHODS = {  # loss, on the student's own samples, hyper-parameters
    "on policy": ("gkd", True, {"reverse": 1.0}),
    "SFT": ("sft", False, {}),
    "word level": ("gkd", False, {"reverse": 0.0}),
    "own SFT": ("sft", True, {}),
}


def models(seed: int) -> tuple[LM, LM]:
    """A teacher and a smaller student."""
    teacher = toy.make(VOCAB, length=8, seed=1000 + seed)
    sharp = jax.tree.map(lambda x: SHARPER * x if x.ndim > 1 else x, teacher.params)
    student = toy.make(VOCAB, width=16, num_layers=1, num_heads=2, length=8, seed=seed)
    return LM(teacher.config, sharp), student


@functools.cache
def everything() -> Batch:
    """All responses to every prompt."""
    found = [list(y) for y in itertools.product(range(VOCAB), repeat=NEW)]
    return toy.groups(ASKED.tolist(), [found] * PROMPTS, 2 + NEW)


def logps(lm: LM) -> np.ndarray:
    """Of all responses to every prompt, [PROMPTS, VOCAB ** NEW] nats."""
    return toy.logps(lm, everything()).astype(np.float64).sum(-1)


def distance(lm: LM, theirs: np.ndarray) -> float:
    """Mean over prompts of KL(π ‖ π_teacher) of a response, nats."""
    ours = logps(lm)
    return float((np.exp(ours) * (ours - theirs)).sum(1).mean())


@jax.jit
def draw(lm: LM, seed: int, step: int) -> Batch:
    """GROUP samples for every prompt."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    lengths = np.full(PROMPTS, 2)
    out = decode.generate(lm, ASKED, lengths, key, max_new=NEW, group=GROUP)
    return out.batch._replace(old_logps=None)


def learn(seed: int, num_steps: int = STEPS) -> dict[str, np.ndarray]:
    """{method: distances on the way} of one seed."""
    teacher, student = models(seed)
    watch = functools.partial(distance, theirs=logps(teacher))
    curves = {}
    for name, (loss, own, hyper) in METHODS.items():

        def samples(step: int, lm: LM, own: bool = own) -> Batch:
            return draw(lm if own else teacher, seed, step)

        lms = {"ref": teacher} if loss == "gkd" else {}
        _, seen = toy.train(
            student, loss, samples, num_steps, lr=RATE, lms=lms, watch=watch,
            every=EVERY, on_policy=True, reduction="token", **hyper,
        )  # fmt: skip
        curves[name] = np.array(seen)
    return curves


def main() -> list[report.Row]:
    curves = toy.over_seeds(learn)
    ends = {k: v[:, -1] for k, v in curves.items()}
    table = [
        report.check(
            "KL to the teacher, over that of SFT on its samples; control: SFT on own "
            "samples", "< .5", lambda x: x < 0.5, ends["on policy"] / ends["SFT"],
            ends["own SFT"] / ends["SFT"],
        ),
        report.false(
            "KL to the teacher, over that of word-level distillation on its samples",
            "< 1", lambda x: x < 1, ends["on policy"] / ends["word level"],
            cause="the gain over SFT is that of whole distributions instead of samples: "
            "responses of 4 tokens leave no room for errors that add up",
        ),
    ]  # fmt: skip
    drawing, (a,) = report.figure(["All responses"], title="On-policy distillation")
    tokens = np.arange(0, STEPS + 1, EVERY) * PROMPTS * GROUP * NEW
    for (name, seen), color in zip(curves.items(), report.COLORS, strict=False):
        report.curve(a, tokens, seen, color=color, label=name)
    a.set_yscale("log")
    report.label(a, "response tokens", "KL(student, teacher), nats")
    return report.finish("distill", table, drawing)


if __name__ == "__main__":
    main()
