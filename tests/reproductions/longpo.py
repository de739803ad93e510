"""LongPO carries what the short context taught over to the long one, and keeps it.

Chen et al. 2025, https://arxiv.org/abs/2502.13922. A transformer trained on documents of
32 tokens to name the only value among fillers, in either of two notations, as often one as
the other. Long documents have 256 tokens, a quarter of them decoys that training never
showed. For each long document, chosen is what the model itself samples under the 32 tokens
around the value, rejected what it samples under the whole. Predicted: LongPO ends with a
better accuracy on long documents than DPO with the reference on the long context, and
keeps the short-context policy, with a smaller KL(π_ref ‖ π_θ) on short documents than SFT.
β = .1 and λ = 1 (with the command of the paper's code, both .01, the preference term is a
hundredth of the likelihood's and LongPO is SFT).

What SFT does to the short-context policy depends on whose answers it learns. On those of
an annotator, right but always in one notation, it gives up the other. On the very answers
that LongPO prefers, the model's own, it stays as near as LongPO: samples of π(·|x_S) are
likeliest under π(·|x_S) itself, which leaves the preference nothing to keep. So the last
prediction is true of the one and false of the other.

Controls: SFT on the annotator's answers, and LongPO with chosen and rejected swapped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import report
import toy

from alignax.sampling import decode

QUESTION, VALUES, FILLERS, DECOYS = 0, 16, 20, 20
NOTATIONS = np.array([0, VALUES])  # added to a value's token; documents have the first
FIRST_FILLER = 1 + 2 * VALUES
FIRST_DECOY = FIRST_FILLER + FILLERS
VOCAB = FIRST_DECOY + DECOYS
SHORT, LONG, BATCH, STEPS, EVERY, ASKED = 32, 256, 8, 40, 8, 64


def documents(rng, size, length):
    """(long documents, the SHORT tokens around the value, values); ends of both asked."""
    values = 1 + rng.integers(0, VALUES, size)
    tokens = FIRST_FILLER + rng.integers(0, FILLERS, (size, length))
    if length > SHORT:
        decoy = rng.random((size, length)) < 0.25
        tokens[decoy] = FIRST_DECOY + rng.integers(0, DECOYS, decoy.sum())
    starts = rng.integers(0, length // SHORT, size) * SHORT
    chunk = FIRST_FILLER + rng.integers(0, FILLERS, (size, SHORT))
    chunk[np.arange(size), rng.integers(0, SHORT, size)] = values
    for row, start, part in zip(tokens, starts, chunk, strict=True):
        row[start : start + SHORT] = part
    question = np.full((size, 1), QUESTION)
    return (
        np.concatenate([tokens, question], 1), np.concatenate([chunk, question], 1), values
    )  # fmt: skip


def sample(lm, prompts, key):
    """[N, 1] answers of the model."""
    parts = []
    for i in range(0, len(prompts), ASKED):
        some = jnp.asarray(prompts[i : i + ASKED])
        lengths, here = jnp.full(len(some), some.shape[1]), jax.random.fold_in(key, i)
        parts.append(decode.generate(lm, some, lengths, here, max_new=1).batch.tokens)
    return np.concatenate(parts)[:, 0, -1:]


def answers(lm, tokens):
    """[N, V] distributions of the answer, nats."""
    return np.asarray(toy.next_laws(lm, jnp.asarray(tokens)))[:, -1]


def right(distribution, values):
    """Mean probability of the right value, in either notation."""
    each = values[:, None] + NOTATIONS
    return float(np.exp(np.take_along_axis(distribution, each, 1)).sum(-1).mean())


def batches(lm, seed):
    """By what is compared: a list of STEPS batches of BATCH long documents.

    "short": the model's answers under x_S and x_L, the reference on x_S; "long": the same,
    the reference on x_L; "annotator": the right value in the first notation.
    """
    rng = np.random.default_rng((seed, 1))
    long, short, values = documents(rng, STEPS * BATCH, LONG)
    keys = jax.random.split(jax.random.key(seed))
    groups = np.stack([sample(lm, short, keys[0]), sample(lm, long, keys[1])], 1)
    under_short = answers(lm, short)[np.arange(len(short))[:, None], groups[..., 0]]
    out = {"short": [], "long": [], "annotator": []}
    for rows in np.split(np.arange(len(long)), STEPS):
        batch = toy.groups(long[rows], groups[rows], LONG + 2)
        logps = jnp.where(batch.mask, under_short[rows][..., None], 0.0)
        out["short"].append(batch._replace(ref_logps=logps))
        out["long"].append(toy.annotated(lm, batch))
        named = toy.groups(long[rows], values[rows, None, None], LONG + 2)
        out["annotator"].append(named)
    return out


def swapped(batch):
    return jax.tree.map(lambda x: x[:, ::-1], batch)


def chosen_alone(batch):
    return jax.tree.map(lambda x: x[:, :1], batch)


def compare(seed):
    """[marks, 3] of each method: accuracy on long and on short documents, KL on short."""
    rng = np.random.default_rng((seed, 0))

    def short_batch(_):
        _, short, values = documents(rng, 64, SHORT)
        named = values + rng.choice(NOTATIONS, len(values))
        return toy.groups(short, named[:, None, None], SHORT + 2)

    fresh = toy.make(
        VOCAB, width=32, num_layers=1, num_heads=2, length=LONG + 2, seed=seed
    )
    base, _ = toy.train(fresh, "sft", short_batch, 300, lr=5e-3)
    long, short, values = documents(np.random.default_rng((seed, 2)), ASKED, LONG)
    before = answers(base, short)

    def measures(lm):
        distribution = answers(lm, short)
        drift = (np.exp(before) * (before - distribution)).sum(-1).mean()
        return right(answers(lm, long), values), right(distribution, values), drift

    data = batches(base, seed)
    rule = dict(beta=0.1, lam=1.0)
    own, anothers = data["short"], data["annotator"]
    runs = {
        "LongPO": ("longpo", lambda i: own[i], rule),
        "DPO": ("dpo", lambda i: data["long"][i], {"beta": 0.1}),
        "SFT, own answers": ("sft", lambda i: chosen_alone(own[i]), {}),
        "SFT, annotator": ("sft", lambda i: anothers[i], {}),
        "swapped": ("longpo", lambda i: swapped(own[i]), rule),
    }
    paths = {
        name: toy.train(
            base, loss, batch_of, STEPS, lr=1e-3, watch=measures, every=EVERY, **hyper
        )[1]
        for name, (loss, batch_of, hyper) in runs.items()
    }
    return {name: np.array(path) for name, path in paths.items()}


def main() -> list[report.Row]:
    paths = toy.over_seeds(compare)
    start, ends = paths["LongPO"][:, 0].T, {k: v[:, -1].T for k, v in paths.items()}
    check = report.check
    rows = [
        check("accuracy on long documents over DPO's; control: swapped pairs", "> 0",
              lambda x: x > 0, ends["LongPO"][0] - ends["DPO"][0],
              ends["swapped"][0] - ends["DPO"][0]),
        check("accuracy on long documents after, on short ones before; control: swapped",
              "carried over, within .05", lambda long, short: long > short - 0.05,
              (ends["LongPO"][0], start[1]), (ends["swapped"][0], start[1])),
        check("KL on short documents, nats; control: SFT on an annotator's answers",
              "kept, < .05", lambda x: x < 0.05, ends["LongPO"][2],
              ends["SFT, annotator"][2]),
        report.false("KL on short documents over that of SFT on own answers; beside: over "
                     "SFT's on an annotator's", "< 1", lambda x: x < 1,
                     ends["LongPO"][2] / ends["SFT, own answers"][2],
                     ends["LongPO"][2] / ends["SFT, annotator"][2],
                     cause="they are equal: the likelihood of own short-context answers is "
                     "greatest at the short-context policy, whoever trains on them"),
    ]  # fmt: skip

    drawing, (a, b) = report.figure(
        ["Long documents", "Short documents"], title="LongPO: 32 tokens teach 256"
    )
    at = np.arange(0, STEPS + 1, EVERY)
    for color, (name, path) in zip(report.COLORS, paths.items(), strict=False):
        report.curve(a, at, path[..., 0], color=color, label=name)
        report.curve(b, at, path[..., 2], color=color, label=name)
    a.set_ylim(0, 1.02)
    report.label(a, "step", "probability of the right value")
    report.label(b, "step", "KL(reference ‖ policy), nats", legend="")
    return report.finish("longpo", rows, drawing)


if __name__ == "__main__":
    main()
