"""LongPO carries what the short context taught over to the long one, and keeps it.

Chen et al. 2025, https://arxiv.org/abs/2502.13922. A transformer trained on documents of
32 tokens to repeat the only value token among fillers. Long documents have 256 tokens, a
quarter of them decoys that training never showed. For each long document, chosen is what
the model itself samples under the 32 tokens around the value, rejected what it samples
under the whole. Predicted: LongPO ends with a better accuracy on long documents than DPO
with the reference on the long context, and with a smaller KL(π_ref ‖ π_θ) on short ones
than SFT on the chosen answers. β = .1 and λ = 1 (with the command of the paper's code, both
.01, the preference term is a hundredth of the likelihood's and LongPO is SFT).

The last is false here: both are near zero, SFT's is the smaller, and SFT on the model's own
short-context answers does as well on long documents. What LongPO beats, on both counts, is
DPO with the reference on the long context.

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
SHORT, LONG, BATCH, STEPS = 32, 256, 16, 40


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


def batches(lm, count):
    """(long rows with the reference on x_S, the same with it on x_L), made by the model."""
    rng, out = np.random.default_rng(4), []
    for i in range(count):
        long, short, _ = documents(rng, BATCH, LONG)
        keys = jax.random.split(jax.random.key(i))
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


def main() -> list[report.Row]:
    rng = np.random.default_rng(0)

    def short_batch(_):
        _, short, values = documents(rng, 64, SHORT)
        return toy.groups(short, values[:, None, None], SHORT + 2)

    fresh = toy.make(VOCAB, width=32, num_layers=1, length=LONG + 2)
    base, _ = toy.train(fresh, "sft", short_batch, 400, lr=5e-3)
    long, short, values = documents(np.random.default_rng(8), 100, LONG)
    before = answers(base, short)

    def measures(lm):
        law = answers(lm, short)
        drift = (np.exp(before) * (before - law)).sum(-1).mean()
        return accuracy(lm, long, values), accuracy(lm, short, values), drift

    data = batches(base, STEPS)
    more = dict(lr=1e-3, watch=measures, every=4)
    rule = dict(beta=0.1, lam=1.0)
    paths = {
        "LongPO": toy.train(base, "longpo", lambda i: data[i][0], STEPS, **more, **rule)[1],
        "DPO": toy.train(base, "dpo", lambda i: data[i][1], STEPS, beta=0.1, **more)[1],
        "SFT": toy.train(
            base, "sft", lambda i: chosen_alone(data[i][0]), STEPS, **more
        )[1],
        "swapped": toy.train(
            base, "longpo", lambda i: swapped(data[i][0]), STEPS, **more, **rule
        )[1],
    }  # fmt: skip
    paths = {k: np.array(v) for k, v in paths.items()}
    ends = {k: v[-1] for k, v in paths.items()}
    check = report.check
    rows = [
        check("accuracy on long documents over DPO's; control: swapped pairs", "> 0",
              lambda x: x > 0, ends["LongPO"][0] - ends["DPO"][0],
              ends["swapped"][0] - ends["DPO"][0]),
        check("gain on long documents; control: swapped pairs", "> .1",
              lambda x: x > 0.1, ends["LongPO"][0] - paths["LongPO"][0, 0],
              ends["swapped"][0] - paths["LongPO"][0, 0]),
        check("KL on short documents, nats; control: DPO", "kept, < .05",
              lambda x: x < 0.05, ends["LongPO"][2], ends["DPO"][2]),
        check("accuracy on short documents after over before; control: DPO", "> .97",
              lambda x: x > 0.97, ends["LongPO"][1] / paths["LongPO"][0, 1],
              ends["DPO"][1] / paths["DPO"][0, 1]),
        report.false("KL on short documents over SFT's", "< 1",
                     lambda x: x < 1, ends["LongPO"][2] / ends["SFT"][2]),
    ]  # fmt: skip

    drawing, (a, b) = report.figure(
        ["Long documents", "Short documents"], title="LongPO: 32 tokens teach 256"
    )
    at = np.linspace(0, STEPS, len(paths["SFT"]))
    for i, (name, path) in enumerate(paths.items()):
        a.plot(at, path[:, 0], color=report.COLORS[i], label=name)
        b.plot(at, path[:, 2], color=report.COLORS[i], label=name)
    a.set_ylim(0, 1.02)
    report.label(a, "step", "probability of the right value")
    report.label(b, "step", "KL(reference ‖ policy), nats")
    return report.finish("longpo", rows, drawing)


if __name__ == "__main__":
    main()
