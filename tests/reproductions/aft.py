"""AFT's boundary keeps negatives where they are; without it they sink for ever.

Wang et al. 2023, https://arxiv.org/abs/2309.02144. Scores s are mean log-probabilities.

1. Free scores of negatives, positives fixed: descent on the alignment loss with the
   boundary constraint ends at B = min_p s_p - slack, for every negative and whatever the
   positives. Without a constraint e^{s_n} falls as 1/t: ln 10 = 2.30 nats a decade of
   steps, for ever. Detached, a negative has no gradient at all.
2. A transformer that learned (a + b + c) mod 7 in two steps on half of the problems;
   8 samples to each of 60 of them, 200 steps of alignment with the likelihood of the
   reference. Predicted: with the boundary the negatives end within .05 of B; without a
   constraint they sink without bound and held-out accuracy drops.

Of the second, only the sinking came out. A law has no room for negatives at B beside
positives above it: they rest half a nat below. And held-out accuracy drops in every run;
most with the boundary, which lifts negatives that were less likely than B.

Controls: the loss without its constraint where the boundary is claimed, and the boundary
where sinking is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import report
import toy

from alignax import decode
from alignax.batch import Scores, from_groups
from alignax.losses import aft
from alignax.theory import aft as theory

SLACK = 0.1
POSITIVE, NEGATIVE = (-0.2, -0.5, -0.9), (-3.0, -0.4, -0.05, -1.5)
MODULUS, EQUALS, SAMPLES, ALIGN_STEPS, ASKED = 7, 7, 8, 200, 60
CONSTRAINTS = ("boundary", "detached", "none")


def free_batch():
    """One prompt, three right and four wrong answers of four tokens each."""
    count = len(POSITIVE) + len(NEGATIVE)
    feedback = [[1.0] * len(POSITIVE) + [0.0] * len(NEGATIVE)]
    batch = from_groups([[1]], [[[2] * 4] * count], length=5, feedback=feedback)
    return jax.tree.map(jnp.asarray, batch)


def free_loss(negative, constraint):
    batch = free_batch()
    score = jnp.concatenate([jnp.asarray(POSITIVE), negative])[None, :, None]
    policy = Scores(jnp.where(batch.mask, score, 0.0))
    return aft.loss(
        policy, batch, constraint=constraint, slack=SLACK, lam=0.0
    )[0].sum()  # fmt: skip


@functools.partial(jax.jit, static_argnames=("constraint",))
def descend(constraint):
    """[marks, 4] negatives after 10, 10², ... 10⁵ steps of rate 1."""
    slope = jax.grad(functools.partial(free_loss, constraint=constraint))
    negative, seen, done = jnp.asarray(NEGATIVE), [], 0
    for mark in (10, 100, 1000, 10_000, 100_000):
        negative = jax.lax.fori_loop(done, mark, lambda _, s: s - slope(s), negative)
        seen.append(negative)
        done = mark
    return jnp.stack(seen)


def answer(problem):
    a, b, c = problem
    return [(a + b) % MODULUS, (a + b + c) % MODULUS]


def problems(seed=0):
    """Training and held-out problems, in an order of their own."""
    every = np.array(np.meshgrid(*[np.arange(MODULUS)] * 3)).reshape(3, -1).T
    every = np.random.default_rng(seed).permutation(every)
    half = len(every) // 2
    return every[:half], every[half:]


def prompts(rows):
    return np.concatenate([rows, np.full((len(rows), 1), EQUALS)], 1)


def accuracy(lm, rows):
    """Share of final answers that are right, decoded greedily."""
    tokens = prompts(rows)
    lengths = np.full(len(rows), tokens.shape[1])
    out = decode.generate(
        lm, jnp.asarray(tokens), jnp.asarray(lengths), jax.random.key(0), max_new=2,
        temperature=0.0,
    )  # fmt: skip
    got = np.asarray(out.batch.tokens)[:, 0, -1]
    return float(np.mean(got == [answer(r)[-1] for r in rows.tolist()]))


def fine_tuned(train_rows, steps=40):
    """A model that was taught the rationale on the training problems."""
    lm = toy.make(MODULUS + 1, width=64, num_layers=2, length=8)
    batch = toy.groups(
        prompts(train_rows), [[answer(r)] for r in train_rows.tolist()], 6
    )
    return toy.train(lm, "sft", lambda _: batch, steps, lr=2e-3, reduction="sequence")[
        0
    ]


def sampled(lm, rows):
    """The reference answer, then SAMPLES of the model's own, labelled by the last token."""
    tokens = prompts(rows)
    out = decode.generate(
        lm, jnp.asarray(tokens), jnp.full(len(rows), tokens.shape[1]), jax.random.key(1),
        max_new=2, group=SAMPLES,
    )  # fmt: skip
    drawn = np.asarray(out.batch.tokens)[:, :, tokens.shape[1] :].tolist()
    wanted = [answer(r) for r in rows.tolist()]
    groups = [[want, *own] for want, own in zip(wanted, drawn, strict=True)]
    feedback = [[float(y[-1] == g[0][-1]) for y in g] for g in groups]
    return toy.groups(tokens, groups, 6, feedback=feedback)


def negatives(lm, batch):
    """Scores of all wrong samples, and the boundary of each one's prompt."""
    score = toy.logps(lm, batch).sum(-1) / np.asarray(batch.mask).sum(-1)
    right = np.asarray(batch.feedback) > 0.5
    bound = np.where(right, score, np.inf).min(-1, keepdims=True) - SLACK
    return score[~right], np.broadcast_to(bound, score.shape)[~right]


def aligned(lm, batch, held_out, constraint):
    """(last scores, last boundaries, mean score along the way, held-out accuracy)."""
    new, seen = toy.train(
        lm, "aft", lambda _: batch, ALIGN_STEPS, lr=1e-3, every=10,
        watch=lambda now: negatives(now, batch)[0].mean(), constraint=constraint,
        slack=SLACK,
    )  # fmt: skip
    return *negatives(new, batch), seen, accuracy(new, held_out)


def main() -> list[report.Row]:
    bound = theory.boundary(POSITIVE, SLACK)
    paths = {c: np.asarray(descend(c)) for c in CONSTRAINTS}
    off = {c: abs(p[-1] - bound).max() for c, p in paths.items()}
    decade = {c: (p[-2] - p[-1]).mean() for c, p in paths.items()}
    slope = {
        c: abs(jax.grad(free_loss)(jnp.asarray(NEGATIVE), c)).max() for c in CONSTRAINTS
    }

    train_rows, held_out = problems()
    lm = fine_tuned(train_rows)
    batch = sampled(lm, train_rows[:ASKED])
    before = accuracy(lm, held_out)
    runs = {c: aligned(lm, batch, held_out, c) for c in CONSTRAINTS}
    apart = {c: np.median(abs(s - b)) for c, (s, b, *_) in runs.items()}
    last = {c: r[0].mean() for c, r in runs.items()}
    right = {c: r[3] for c, r in runs.items()}
    check = report.check
    rows = [
        check("free negatives, furthest from B; control: no constraint", "0 (1e-3)",
              lambda x: x < 1e-3, off["boundary"], off["none"]),
        check("no constraint: nats lost from 10⁴ to 10⁵ steps; control: boundary",
              "ln 10 = 2.30 (2 %)", lambda x: abs(x / np.log(10) - 1) < 0.02,
              decade["none"], decade["boundary"]),
        check("detached: largest gradient of a negative; control: no constraint", "0",
              lambda x: x == 0, slope["detached"], slope["none"]),
        check("transformer: mean score of negatives; control: no constraint",
              "bounded, > -3", lambda x: x > -3, last["boundary"], last["none"]),
        check("transformer: median distance of negatives from B; control: no constraint",
              "stays", lambda x: x < 1, apart["boundary"], apart["none"]),
        report.false("that distance; beside it: no constraint", "<= .05",
                     lambda x: x <= 0.05, apart["boundary"], apart["none"]),
        report.false("held-out accuracy after less before, boundary and no constraint",
                     "drops without", lambda x, y: x > y + 0.05,
                     (right["boundary"] - before, right["none"] - before)),
    ]  # fmt: skip

    drawing, (a, b) = report.figure(
        ["Free scores", "Transformer"], title="AFT: where negatives come to rest"
    )
    marks = [10, 100, 1000, 10_000, 100_000]
    for i, c in enumerate(CONSTRAINTS):
        for j, path in enumerate(paths[c].T):
            a.semilogx(marks, path, color=report.COLORS[i], label=c if j == 0 else None)
        at = np.linspace(0, ALIGN_STEPS, len(runs[c][2]))
        b.plot(at, runs[c][2], color=report.COLORS[i], label=c)
    for axis, level in ((a, bound), (b, runs["boundary"][1].mean())):
        axis.axhline(
            level, color=report.COLORS[4], linewidth=0.9, linestyle=(0, (4, 3))
        )
    report.label(a, "step", "score of a negative, nats a token")
    report.label(b, "step", "mean score of negatives, nats a token")
    return report.finish("aft", rows, drawing)


if __name__ == "__main__":
    main()
