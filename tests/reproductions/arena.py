"""Tournaments recover the ratings of best-of-N, and brackets their order.

Son et al. 2024, https://arxiv.org/abs/2411.01281. Contestants are the best of N = 1, 2, 4, 8
and 16 samples of one policy under one reward without ties, each of its own samples. The best
of a beats the best of b with probability a / (a + b), whatever the policy and the reward, so
that Bradley-Terry is exact with ratings 400 log10 N, 482 from end to end.

Predicted: all pairs recover the ratings; of brackets the order is right and the distances
are smaller, because who comes far was lucky on this prompt (by a factor of .864, of 400,000
prompts): read ratings of brackets as an order. Control: rewards shuffled between the
contestants of a prompt, after which there is nothing to rank.

1. A toy: 1000 prompts, rewards uniform in [0, 1].
2. SmolLM2-135M-Instruct, where ALIGNAX_SMOLLM2 names its .gguf and ALIGNAX_HH the pairs of
   HH-RLHF: 31 responses of at most 24 tokens to each of 100 prompts, the reward of which is
   the mean log-probability of a token; three seeds.
"""

import os
from collections.abc import Callable

import jax
import numpy as np
import report
import toy
from jaxtyping import Float

from alignax import plugin
from alignax.batch import Batch
from alignax.evals import arena
from alignax.models import load, sharding
from alignax.text import tokenizer
from alignax.theory import tournament
from alignax.training import parallel

SIZES = np.array([1, 2, 4, 8, 16])
EXACT = 400 * (np.log10(SIZES) - np.log10(SIZES).mean()) + 1000
SPREAD = float(np.ptp(EXACT))
PROMPTS, SEEDS = 100, 3  # of the model


def points(rewards: Float[np.ndarray, "N M"], pairing: Callable, rng) -> np.ndarray:
    """[N, M, M] points of contestants with these rewards."""
    rows = np.arange(len(rewards))

    def judge(a, b):
        return arena.more(rewards[rows, a], rewards[rows, b])

    return pairing(judge, *rewards.shape, rng)


def played(rewards: Float[np.ndarray, "N M"], seed: int) -> dict[str, np.ndarray]:
    """What all pairs, brackets and shuffled rewards make of the contestants' rewards."""
    rng = np.random.default_rng(seed)
    pairs = tournament.standings(points(rewards, tournament.all_pairs, rng))
    bracket = tournament.standings(points(rewards, tournament.single_elimination, rng))
    nothing = tournament.standings(
        points(rng.permuted(rewards, axis=1), tournament.all_pairs, rng)
    )
    return {
        "pairs": pairs.ratings, "bracket": bracket.ratings, "shuffled": nothing.ratings,
        "error": errors(pairs), "bracket error": errors(bracket),
        "shuffled error": errors(nothing),
        **{
            f"{name} order": ordered(s)
            for name, s in (("pairs", pairs), ("bracket", bracket), ("shuffled", nothing))
        },
        "ratio": np.ptp(bracket.ratings) / np.ptp(pairs.ratings),
        "shuffled ratio": np.ptp(nothing.ratings) / np.ptp(pairs.ratings),
    }  # fmt: skip


def errors(found: tournament.Standings) -> np.ndarray:
    """The largest distance from the exact ratings, in standard errors."""
    error = np.ptp(found.rating_interval, 0) / (2 * 1.96)
    return np.max(np.abs(found.ratings - EXACT) / error)


def ordered(found: tournament.Standings) -> np.ndarray:
    """Spearman's correlation of the ranks with N."""
    return np.array(-np.corrcoef(found.ranks, np.arange(len(SIZES)))[0, 1])


def uniform(seed: int) -> dict[str, np.ndarray]:
    """The toy: the best of N uniform numbers is distributed as U^(1/N)."""
    rng = np.random.default_rng(seed)
    samples = [rng.random((1000, n)).max(1) for n in SIZES]
    return played(np.stack(samples, 1), seed)


def own(batch: Batch, texts, lms, score) -> np.ndarray:
    """Mean log-probability of a response's tokens under the model itself, nats."""
    logps = np.asarray(score(lms["ref"], batch).logps).sum(-1)
    return logps / np.maximum(np.asarray(batch.mask).sum(-1), 1)


def smollm2(path: str, pairs: str) -> dict[str, np.ndarray]:
    """The same of a language model, on the first prompts of a file of pairs."""
    lm, text = load.load(path), tokenizer.load(path)
    mesh = sharding.make_mesh((1, 1, 1))
    data = plugin.load_section(
        "data", {"name": "hh_rlhf", "path": pairs, "split": "all", "kind": "prompts"}
    )()
    score = parallel.scorer(mesh)
    runs = []
    for seed in range(SEEDS):
        answered = arena.responses(
            lm, {"ref": lm}, data[:PROMPTS], key=jax.random.key(seed), tokenizer=text,
            generate=parallel.generator(text, mesh), score=score, batch_size=25,
            length=128, contestants={str(n): {"best_of": int(n)} for n in SIZES},
            selector="arena.own", max_new=24,
        )  # fmt: skip
        got = [own(batch, None, {"ref": lm}, score)[p.valid] for p, batch in answered]
        runs.append(played(np.concatenate(got), seed))
    return {k: np.stack([one[k] for one in runs]) for k in runs[0]}


def rows(found: dict[str, np.ndarray], who: str) -> list[report.Row]:
    """The claims of one policy."""
    check = report.check
    return [
        check(f"{who}: all pairs, largest error of five ratings, in standard errors; "
              "control: shuffled rewards", "400 log10 N, < 3.5", lambda x: x < 3.5,
              found["error"], found["shuffled error"]),
        check(f"{who}: brackets, Spearman of the rating with N; control: shuffled "
              "rewards", "1", lambda x: x > 0.999, found["bracket order"],
              found["shuffled order"]),
        check(f"{who}: spread of brackets over that of all pairs; control: shuffled "
              "rewards, all pairs", "squeezed by some .14: .76 to .96",
              lambda x: 0.76 < x < 0.96, found["ratio"], found["shuffled ratio"]),
    ]  # fmt: skip


def main() -> list[report.Row]:
    small = toy.over_seeds(uniform)
    table = rows(small, "uniform rewards")
    path, pairs = map(os.environ.get, ("ALIGNAX_SMOLLM2", "ALIGNAX_HH"))
    if path and pairs:
        table += rows(smollm2(path, pairs), "SmolLM2")
    else:
        print("  set ALIGNAX_SMOLLM2 and ALIGNAX_HH for the rows of SmolLM2")
    drawing, (axes,) = report.figure(["Ratings of best-of-N"], title="Arena")
    for i, (name, text) in enumerate(
        [("pairs", "all pairs"), ("bracket", "brackets"), ("shuffled", "shuffled")]
    ):
        color = report.COLORS[i]
        report.curve(axes, SIZES, small[name], color=color, label=text)
    axes.plot(SIZES, EXACT, ".", color=report.COLORS[4], label="400 log10 N")
    axes.set_xscale("log", base=2)
    report.label(axes, "N", "rating")
    return report.finish("arena", table, drawing)


if __name__ == "__main__":
    main()
