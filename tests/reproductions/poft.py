"""PoFT stops learning from rows that a trusted model finds unlikely.

Fan et al. 2024, https://arxiv.org/abs/2412.12865. A transformer from scratch on 2000
rows: a prompt of six symbols, answered by a fixed map of them in reverse order; in one row
of five the answer is random. The aligned model was trained on clean rows of its own.
Predicted: after 10 epochs the weight σ(-Δ) of a row in PoFT's gradient separates clean
from corrupted rows with an AUC above .9, and the NLL of clean test rows is lower than after
plain fine-tuning.

Controls: an untrained model in the place of the aligned one; plain fine-tuning.
"""

import jax.numpy as jnp
import numpy as np
import report
import toy

SYMBOLS, SIZE, ROWS, BATCH, EPOCHS, CORRUPT = 16, 6, 2000, 100, 10, 0.2
MAP = np.random.default_rng(7).permutation(SYMBOLS)


def data(seed, size, corrupt=0.0):
    """Prompts, answers and which of them are random."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, SYMBOLS, (size, SIZE))
    answers = MAP[prompts[:, ::-1]]
    wrong = rng.random(size) < corrupt
    answers[wrong] = rng.integers(0, SYMBOLS, (wrong.sum(), SIZE))
    start = np.full((size, 1), SYMBOLS)  # where the answer begins
    prompts = np.concatenate([prompts, start], 1)
    return toy.groups(prompts, answers[:, None], 2 * SIZE + 1), wrong


def nll(lm, batch):
    """Mean nats a token."""
    return -toy.logps(lm, batch).sum() / np.asarray(batch.mask).sum()


def fit(lm, loss, batch, test, seed, **lms):
    """Trains for EPOCHS of shuffled rows; (model, test NLL after each epoch)."""
    rng = np.random.default_rng(seed)
    steps = len(batch.tokens) // BATCH
    orders = [rng.permutation(len(batch.tokens)) for _ in range(EPOCHS)]

    def batch_of(i):
        order = orders[i // steps]
        return toy.take(batch, order[i % steps * BATCH :][:BATCH])

    return toy.train(
        lm, loss, batch_of, EPOCHS * steps, lr=3e-3, watch=lambda x: nll(x, test),
        every=steps, lms=lms,
    )  # fmt: skip


def scored_by(aligned, batch):
    return batch._replace(
        extra={"aligned_logps": jnp.asarray(toy.logps(aligned, batch))}
    )


def weights(policy, batch):
    """σ(-Δ) of each row, as PoFT's gradient has it at β = 1, γ = 0."""
    length = np.asarray(batch.mask).sum(-1)
    ahead = toy.logps(policy, batch) - np.asarray(batch.extra["aligned_logps"])
    return (1 / (1 + np.exp(ahead.sum(-1) / length)))[:, 0]


def auc(score, positive):
    """P(a positive's score is above a negative's); ties count half."""
    a, b = score[positive][:, None], score[~positive][None]
    return float(((a > b) + 0.5 * (a == b)).mean())


def compare(seed):
    """PoFT, plain fine-tuning and PoFT with an untrained judge: {name: what came out}."""
    rows, wrong = data((seed, 0), ROWS, CORRUPT)
    test, _ = data((seed, 1), 500)
    clean, _ = data((seed, 2), ROWS)
    fresh = toy.make(SYMBOLS + 1, length=16, seed=2 * seed)
    other = toy.make(SYMBOLS + 1, length=16, seed=2 * seed + 1)
    aligned, _ = fit(other, "sft", clean, test, seed)
    out = {
        "wrong": wrong,
        "nll plain": np.array(fit(fresh, "sft", rows, test, seed)[1]),
    }
    for name, judge in (("aligned", aligned), ("untrained", other)):
        judged = scored_by(judge, rows)
        policy, path = fit(fresh, "poft", judged, test, seed, aligned=judge)
        weight = weights(policy, judged)
        out[f"nll {name}"], out[f"weight {name}"] = np.array(path), weight
        out[f"auc {name}"] = auc(weight, ~wrong)
        out[f"ratio {name}"] = weight[wrong].mean() / weight[~wrong].mean()
    return out


def main() -> list[report.Row]:
    found = toy.over_seeds(compare)
    plain = found["nll plain"][:, -1]
    check = report.check
    table = [
        check("AUC of the weight, clean above corrupted; control: untrained judge",
              "> .9", lambda x: x > 0.9, found["auc aligned"], found["auc untrained"]),
        check("clean test NLL over plain fine-tuning's; control: untrained judge",
              "< 1", lambda x: x < 1, found["nll aligned"][:, -1] / plain,
              found["nll untrained"][:, -1] / plain),
        check("mean weight of corrupted rows over clean ones; control: untrained judge",
              "→ 0, < .5", lambda x: x < 0.5, found["ratio aligned"],
              found["ratio untrained"]),
    ]  # fmt: skip

    drawing, (a, b) = report.figure(
        ["Clean test rows", "Weight of a row in the end, one seed"],
        title="PoFT with one corrupted row in five",
    )
    curves = {"PoFT": "aligned", "fine-tuning": "plain", "PoFT, untrained": "untrained"}
    for color, (label, name) in zip(report.COLORS, curves.items(), strict=False):
        report.curve(
            a, np.arange(EPOCHS + 1), found[f"nll {name}"], color=color, label=label
        )
    a.set_ylim(0)
    report.label(a, "epoch", "NLL, nats a token", legend="lower left")
    wrong, weight = found["wrong"][0], found["weight aligned"][0]
    for color, name, rows in zip(
        report.COLORS, ("clean", "corrupted"), (~wrong, wrong), strict=False
    ):
        b.hist(weight[rows], np.linspace(0, 1, 41), color=color, alpha=0.7, label=name)
    report.label(b, "weight σ(−Δ)", "rows")
    return report.finish("poft", table, drawing)


if __name__ == "__main__":
    main()
