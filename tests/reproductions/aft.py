"""AFT's boundary keeps negatives where they are; without it they sink for ever.

Wang et al. 2023, https://arxiv.org/abs/2309.02144. Scores s are mean log-probabilities.

1. Free scores of negatives, positives fixed: descent on the alignment loss with the
   boundary constraint ends at B = min_p s_p - slack, for every negative and whatever the
   positives. Without a constraint e^{s_n} falls as 1/t: ln 10 = 2.30 nats a decade of
   steps, for ever. Detached, a negative has no gradient at all.
2. A transformer that learned (a + b + c) mod 7 in two steps on half of the problems;
   8 samples to each of 30 of them, 200 steps of alignment with the likelihood of the
   reference. Predicted: with the boundary the negatives end within .05 of B; without a
   constraint they sink without bound and held-out accuracy drops.

Of the second, the sinking came out. With a slack of .1 a distribution has no room for negatives at B
beside positives above it: they rest half a nat below (with one of 2 nats, .05; with one of
3 it has room). Held-out accuracy drops, further than by the likelihood alone, but with the
boundary of .1 too, in most seeds.

Controls: the loss without its constraint where the boundary is claimed, the boundary where
sinking is, the likelihood alone where accuracy is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import report
import toy

from alignax.batch import Scores, from_groups
from alignax.losses import aft
from alignax.sampling import decode
from alignax.theory import aft as theory

SLACK, WIDE = 0.1, 3.0
POSITIVE, NEGATIVE = (-0.2, -0.5, -0.9), (-3.0, -0.4, -0.05, -1.5)
MODULUS, EQUALS, SAMPLES, ALIGN_STEPS, EVERY, ASKED = 7, 7, 8, 200, 10, 30
CONSTRAINTS = ("boundary", "detached", "none")
RUNS = {  # of the transformer: loss, and its hyper-parameters
    "boundary": ("aft", {"constraint": "boundary", "slack": SLACK}),
    "wide": ("aft", {"constraint": "boundary", "slack": WIDE}),
    "none": ("aft", {"constraint": "none"}),
    "likelihood": ("sft", {"reduction": "sequence"}),
}


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


def problems(seed):
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


def fine_tuned(train_rows, seed, steps=40):
    """A model that was taught the rationale on the training problems."""
    lm = toy.make(MODULUS + 1, width=64, num_layers=2, length=8, seed=seed)
    batch = toy.groups(
        prompts(train_rows), [[answer(r)] for r in train_rows.tolist()], 6
    )
    out, _ = toy.train(lm, "sft", lambda _: batch, steps, lr=2e-3, reduction="sequence")
    return out


def sampled(lm, rows, seed):
    """The reference answer, then SAMPLES of the model's own, labelled by the last token."""
    tokens = prompts(rows)
    out = decode.generate(
        lm, jnp.asarray(tokens), jnp.full(len(rows), tokens.shape[1]), jax.random.key(seed),
        max_new=2, group=SAMPLES,
    )  # fmt: skip
    drawn = np.asarray(out.batch.tokens)[:, :, tokens.shape[1] :].tolist()
    wanted = [answer(r) for r in rows.tolist()]
    groups = [[want, *own] for want, own in zip(wanted, drawn, strict=True)]
    feedback = [[float(y[-1] == g[0][-1]) for y in g] for g in groups]
    return toy.groups(tokens, groups, 6, feedback=feedback)


def negatives(lm, batch, slack=SLACK):
    """Scores of all wrong samples, and the boundary of each one's prompt."""
    score = toy.logps(lm, batch).sum(-1) / np.asarray(batch.mask).sum(-1)
    right = np.asarray(batch.feedback) > 0.5
    bound = np.where(right, score, np.inf).min(-1, keepdims=True) - slack
    return score[~right], np.broadcast_to(bound, score.shape)[~right]


def transformer(seed):
    """Of each run: the scores' way and end, their distance from B, the accuracy's gain."""
    train_rows, held_out = problems(seed)
    lm = fine_tuned(train_rows, seed)
    batch = sampled(lm, train_rows[:ASKED], seed)
    reference = jax.tree.map(lambda x: x[:, :1], batch)
    before, out = accuracy(lm, held_out), {}
    for name, (loss, hyper) in RUNS.items():
        rows = reference if loss == "sft" else batch
        new, path = toy.train(
            lm, loss, lambda _, rows=rows: rows, ALIGN_STEPS, lr=1e-3, every=EVERY,
            watch=lambda now: negatives(now, batch)[0].mean(), **hyper,
        )  # fmt: skip
        score, bound = negatives(new, batch, hyper.get("slack", SLACK))
        out[f"path {name}"], out[f"bound {name}"] = np.array(path), bound.mean()
        out[f"apart {name}"] = np.median(abs(score - bound))
        out[f"gain {name}"] = accuracy(new, held_out) - before
    return out


def main() -> list[report.Row]:
    bound = theory.boundary(POSITIVE, SLACK)
    paths = {c: np.asarray(descend(c)) for c in CONSTRAINTS}
    off = {c: abs(p[-1] - bound).max() for c, p in paths.items()}
    decade = {c: (p[-2] - p[-1]).mean() for c, p in paths.items()}
    slope = {
        c: abs(jax.grad(free_loss)(jnp.asarray(NEGATIVE), c)).max() for c in CONSTRAINTS
    }
    found = toy.over_seeds(transformer)
    half = ALIGN_STEPS // EVERY // 2
    late = {k: found[f"path {k}"][:, half] - found[f"path {k}"][:, -1] for k in RUNS}
    check = report.check
    rows = [
        check("free negatives, furthest from B; control: no constraint", "0 (1e-3)",
              lambda x: x < 1e-3, off["boundary"], off["none"]),
        check("no constraint: nats lost from 10⁴ to 10⁵ steps; control: boundary",
              "ln 10 = 2.30 (2 %)", lambda x: abs(x / np.log(10) - 1) < 0.02,
              decade["none"], decade["boundary"]),
        check("detached: largest gradient of a negative; control: no constraint", "0",
              lambda x: x == 0, slope["detached"], slope["none"]),
        check("transformer, no constraint: nats that negatives sink from step 100 to 200; "
              "control: boundary", "without bound, > .5", lambda x: x > 0.5, late["none"],
              late["boundary"]),
        report.false("transformer, slack of .1: median distance of negatives from B; beside: no "
                     "constraint", "<= .05", lambda x: x <= 0.05, found["apart boundary"],
                     found["apart none"], cause="e^s of a prompt's answers sum to no more "
                     "than a distribution has room for: negatives at B do not fit beside positives "
                     "above it"),
        check("the same with a slack of 3 nats; control: no constraint", "<= .05",
              lambda x: x <= 0.05, found["apart wide"], found["apart none"]),
        check("held-out accuracy, no constraint less the likelihood alone; control: boundary",
              "drops, < 0", lambda x: x < 0, found["gain none"] - found["gain likelihood"],
              found["gain boundary"] - found["gain likelihood"]),
        report.false("held-out accuracy, with the boundary less without constraint; beside: "
                     "slack of 3", "> 0", lambda x: x > 0,
                     found["gain boundary"] - found["gain none"],
                     found["gain wide"] - found["gain none"], cause="a boundary of .1 lifts "
                     "wrong answers that were less likely than B"),
    ]  # fmt: skip

    drawing, (a, b) = report.figure(
        ["Free scores", "Transformer"], title="AFT: where negatives come to rest"
    )
    marks = [10, 100, 1000, 10_000, 100_000]
    at = np.arange(0, ALIGN_STEPS + 1, EVERY)
    colors = dict(zip((*CONSTRAINTS, "wide"), report.COLORS, strict=False))
    for c, color in colors.items():
        if c in paths:
            for j, path in enumerate(paths[c].T):
                a.semilogx(marks, path, color=color, label="" if j else c)
        if c in RUNS:
            name = {"boundary": "slack .1", "wide": "slack 3"}.get(c, c)
            report.curve(b, at, found[f"path {c}"], color=color, label=name)
    report.mark(a, y=bound)
    for c in ("boundary", "wide"):
        report.mark(b, y=np.median(found[f"bound {c}"]))
    report.label(a, "step", "score of a negative, nats a token")
    report.label(b, "step", "mean score of negatives, nats a token")
    return report.finish("aft", rows, drawing)


if __name__ == "__main__":
    main()
