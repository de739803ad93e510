"""LongPO carries what the short context taught over to the long one, and keeps it.

Chen et al. 2025, https://arxiv.org/abs/2502.13922. A transformer trained on documents of
32 tokens to repeat the only value token among fillers. Long documents have 256 tokens, a
quarter of them decoys that training never showed. For each long document, chosen is what
the model itself samples under the 32 tokens around the value, rejected what it samples
under the whole. Predicted: LongPO ends with a better accuracy on long documents than DPO
with the reference on the long context, and with a smaller KL(π_ref ‖ π_θ) on short ones
than SFT on the chosen answers. β = .1 and λ = 1 (with the command of the paper's code, both
.01, the preference term is a hundredth of the likelihood's and LongPO is SFT).

The last is false here: both are near zero, and SFT on the model's own short-context answers
does as well on long documents. What LongPO beats, on both counts, is DPO with the reference
on the long context.

Controls: DPO, and LongPO with chosen and rejected swapped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import report
import toy

from alignax import decode

QUESTION, VALUES, FILLERS, DECOYS = 0, 16, 20, 20
FIRST_FILLER = 1 + VALUES
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
    out = decode.generate(
        lm,
        jnp.asarray(prompts),
        jnp.full(len(prompts), prompts.shape[1]),
        key,
        max_new=1,
    )
    return np.asarray(out.batch.tokens)[:, 0, -1:]


def answers(lm, tokens):
    """[N, V] laws of the answer, nats."""
    return np.asarray(toy.next_laws(lm, jnp.asarray(tokens)))[:, -1]


def accuracy(lm, tokens, values):
    """Mean probability of the right value."""
    return float(np.exp(answers(lm, tokens)[np.arange(len(values)), values]).mean())


def batches(lm, seed):
    """(long rows with the reference on x_S, the same with it on x_L), made by the model."""
    rng, out = np.random.default_rng((seed, 1)), []
    for key in jax.random.split(jax.random.key(seed), STEPS):
        long, short, _ = documents(rng, BATCH, LONG)
        keys = jax.random.split(key)
        sides = [sample(lm, short, keys[0]), sample(lm, long, keys[1])]
        groups = np.stack(sides, 1)
        there = toy.groups(short, groups, SHORT + 2)
        batch = toy.groups(long, groups, LONG + 2)
        column = np.zeros(batch.mask.shape, np.float32)
        column[np.asarray(batch.mask)] = toy.logps(lm, there)[np.asarray(there.mask)]
        short_batch = batch._replace(ref_logps=jnp.asarray(column))
        out.append((short_batch, toy.annotated(lm, batch)))
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
        return toy.groups(short, values[:, None, None], SHORT + 2)

    fresh = toy.make(VOCAB, width=32, num_layers=1, length=LONG + 2, seed=seed)
    base, _ = toy.train(fresh, "sft", short_batch, 300, lr=5e-3)
    long, short, values = documents(np.random.default_rng((seed, 2)), ASKED, LONG)
    before = answers(base, short)

    def measures(lm):
        law = answers(lm, short)
        drift = (np.exp(before) * (before - law)).sum(-1).mean()
        return accuracy(lm, long, values), accuracy(lm, short, values), drift

    data = batches(base, seed)
    rule = dict(beta=0.1, lam=1.0)
    runs = {
        "LongPO": ("longpo", lambda i: data[i][0], rule),
        "DPO": ("dpo", lambda i: data[i][1], {"beta": 0.1}),
        "SFT": ("sft", lambda i: chosen_alone(data[i][0]), {}),
        "swapped": ("longpo", lambda i: swapped(data[i][0]), rule),
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
        check("KL on short documents, nats; control: DPO", "kept, < .05",
              lambda x: x < 0.05, ends["LongPO"][2], ends["DPO"][2]),
        report.false("KL on short documents over SFT's", "< 1", lambda x: x < 1,
                     ends["LongPO"][2] / ends["SFT"][2], cause="both are near zero: SFT "
                     "on the model's own short-context answers hardly moves it there"),
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
