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


def fit(lm, loss, batch, test, *, epochs=EPOCHS, seed=0, **hyper):
    """Trains for epochs of shuffled rows; (model, test NLL after each epoch)."""
    rng = np.random.default_rng(seed)
    steps = len(batch.tokens) // BATCH
    orders = [rng.permutation(len(batch.tokens)) for _ in range(epochs)]

    def batch_of(i):
        order = orders[i // steps]
        return toy.take(batch, order[i % steps * BATCH :][:BATCH])

    return toy.train(
        lm, loss, batch_of, epochs * steps, lr=3e-3, watch=lambda x: nll(x, test),
        every=steps, **hyper,
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


def main() -> list[report.Row]:
    rows, wrong = data(0, ROWS, CORRUPT)
    test, _ = data(1, 500)
    clean, _ = data(2, ROWS)
    fresh = toy.make(SYMBOLS + 1, length=16)
    other = toy.make(SYMBOLS + 1, length=16, seed=1)
    aligned, _ = fit(other, "sft", clean, test)
    _, plain_nll = fit(fresh, "sft", rows, test)
    judged, blind = scored_by(aligned, rows), scored_by(other, rows)
    policy, policy_nll = fit(fresh, "poft", judged, test)
    lost, lost_nll = fit(fresh, "poft", blind, test)
    weight = {"aligned": weights(policy, judged), "untrained": weights(lost, blind)}
    separates = {k: auc(w, ~wrong) for k, w in weight.items()}
    check = report.check
    table = [
        check("AUC of the weight, clean above corrupted; control: untrained model",
              "> .9", lambda x: x > 0.9, separates["aligned"], separates["untrained"]),
        check("clean test NLL over plain fine-tuning's; control: untrained model",
              "< 1", lambda x: x < 1, policy_nll[-1] / plain_nll[-1],
              lost_nll[-1] / plain_nll[-1]),
        check("mean weight of corrupted rows over clean ones; control: untrained model",
              "< 1", lambda x: x < 0.5,
              weight["aligned"][wrong].mean() / weight["aligned"][~wrong].mean(),
              weight["untrained"][wrong].mean() / weight["untrained"][~wrong].mean()),
    ]  # fmt: skip

    drawing, (a, b) = report.figure(
        ["Clean test rows", "Weight of a row in the end"],
        title="PoFT with one corrupted row in five",
    )
    at = np.arange(EPOCHS + 1)
    curves = {"PoFT": policy_nll, "fine-tuning": plain_nll, "PoFT, untrained": lost_nll}
    for i, (name, curve) in enumerate(curves.items()):
        a.semilogy(at, curve, color=report.COLORS[i], label=name)
    report.label(a, "epoch", "NLL, nats a token")
    edges = np.linspace(0, 1, 41)
    for i, (name, rows_) in enumerate((("clean", ~wrong), ("corrupted", wrong))):
        b.hist(
            weight["aligned"][rows_],
            edges,
            color=report.COLORS[i],
            alpha=0.7,
            label=name,
        )
    report.label(b, "weight σ(−Δ)", "rows")
    return report.finish("poft", table, drawing)


if __name__ == "__main__":
    main()
