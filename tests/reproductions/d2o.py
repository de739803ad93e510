"""D²O unlearns harm from negatives alone, where DPO trusts positives that are wrong.

Duan et al. 2024, https://arxiv.org/abs/2403.03419. A transformer that answers risky
prompts with a harmful or a safe mode token (even odds), then two of the prompt's symbols,
and plain prompts with a neutral one. Human negatives are harmful; three human positives
in ten are harmful too. D²O compares each negative with 11 samples of the policy itself,
drawn anew every ten steps (π⁺ = π⁻ = the model it starts from, α = β = .1); DPO compares
it with the noisy positive, with the same β, rate and steps; gradient ascent pushes the
very negatives of D²O down. Predicted: D²O ends with no more probability on the harmful
token than DPO, and with a smaller rise of the NLL of neutral text than gradient ascent; its
loss is at most the mean of the losses of its single pairs (convexity).

Controls: D²O with safe negatives; without its samples (β = .001), which leaves ascent; ascent
itself; the least of the single pairs instead of their mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
import report
import toy

from alignax.batch import Scores
from alignax.losses import d2o, dpo
from alignax.sampling import decode

SAFE, HARM, NEUTRAL, RISKY, PLAIN, SYMBOLS = 1, 2, 3, 4, 5, 16
VOCAB, PROMPT, RESPONSE, SAMPLES = 6 + SYMBOLS, 3, 3, 11
LENGTH = PROMPT + RESPONSE
NOISE, BETA, STEPS, BATCH, REFRESH = 0.3, 0.1, 60, 32, 10


def prompt(rng, marker):
    return [marker, *(6 + rng.integers(0, SYMBOLS, 2)).tolist()]


def answer(rng, prompt, mode):
    return [mode, *rng.choice(prompt[1:], 2).tolist()]


def mode_of(rng, prompt):
    return NEUTRAL if prompt[0] == PLAIN else int(rng.choice([SAFE, HARM]))


def pretraining(rng, size=128):
    prompts = [prompt(rng, RISKY if i % 2 else PLAIN) for i in range(size)]
    return toy.groups(
        prompts, [[answer(rng, x, mode_of(rng, x))] for x in prompts], LENGTH
    )


def risky(seed, size):
    rng = np.random.default_rng(seed)
    return [prompt(rng, RISKY) for _ in range(size)], rng


def samples(lm, prompts, key):
    """[B][SAMPLES] answers of the model."""
    out = decode.generate(
        lm, jnp.asarray(prompts), jnp.full(len(prompts), PROMPT), key,
        max_new=RESPONSE, group=SAMPLES,
    )  # fmt: skip
    return np.asarray(out.batch.tokens)[:, :, PROMPT:].tolist()


def with_samples(lm, seed, draw, negative=HARM):
    """D²O's batch: samples of lm, and a negative that begins with the token `negative`."""
    prompts, rng = risky((seed, draw), BATCH)
    drawn = samples(lm, prompts, jax.random.key(draw))
    groups = [
        [*own, answer(rng, x, negative)] for own, x in zip(drawn, prompts, strict=True)
    ]
    return toy.groups(prompts, groups, LENGTH)


def negatives_alone(seed, draw):
    """The negatives of `with_samples`; feedback 0 is to be forgotten."""
    prompts, rng = risky((seed, draw), BATCH)
    return toy.groups(prompts, [[answer(rng, x, HARM)] for x in prompts], LENGTH)


def pairs(seed, draw, *, swaps):
    """A positive that is harmful with probability NOISE, and a negative.

    swaps: a wrong label swaps the pair, so that its rejected side is safe.
    """
    prompts, rng = risky((seed, draw), BATCH)
    groups = []
    for x in prompts:
        wrong = rng.random() < NOISE
        modes = (HARM, SAFE if swaps else HARM) if wrong else (SAFE, HARM)
        groups.append([answer(rng, x, m) for m in modes])
    return toy.groups(prompts, groups, LENGTH)


def measures(lm, seed):
    """Mean probability of the harmful token on new risky prompts; NLL of neutral text."""
    prompts, rng = risky((seed, 99), 200)
    harm = np.exp(toy.next_laws(lm, jnp.asarray(prompts))[:, -1, HARM]).mean()
    prompts = [prompt(rng, PLAIN) for _ in range(200)]
    batch = toy.groups(prompts, [[answer(rng, x, NEUTRAL)] for x in prompts], LENGTH)
    return harm, -toy.logps(lm, batch).sum() / np.asarray(batch.mask).sum()


def unlearned(base, seed, loss, make, **hyper):
    """(model, measures) after STEPS steps; make(model, draw) is the next REFRESH batches."""
    now, batches = {}, {}

    def watch(lm):
        now["lm"] = lm
        return measures(lm, seed)

    def batch_of(step):
        draw = step // REFRESH
        if draw not in batches:
            batches[draw] = make(now["lm"], draw)
        return batches[draw]

    lms = dict.fromkeys(("ref", "helpful", "harmful"), base)
    return toy.train(
        base, loss, batch_of, STEPS, lr=1e-3, lms=lms, watch=watch, **hyper
    )


def jensen(policy, base, seed):
    """Least gap to D²O's loss of the mean and of the least of its single pairs."""
    batch = with_samples(policy, seed, 98)
    now, before = (jnp.asarray(toy.logps(lm, batch)) for lm in (policy, base))
    extra = {"helpful_logps": before, "harmful_logps": before}
    whole, _ = d2o.loss(Scores(now), batch._replace(extra=extra), beta=BETA, alpha=BETA)
    single = []
    for i in range(SAMPLES):
        pair = np.array([i, SAMPLES])
        two = jax.tree.map(lambda x, pair=pair: x[:, pair], batch)
        two = two._replace(ref_logps=before[:, pair])
        single.append(dpo.loss(Scores(now[:, pair]), two, beta=BETA)[0])
    single = jnp.stack(single)
    return (single.mean(0) - whole).min(), (single.min(0) - whole).min()


def compare(seed):
    """[STEPS + 1, 2] measures of each method, and the gaps of `jensen`."""
    rng = np.random.default_rng((seed, 0))
    fresh = toy.make(VOCAB, width=32, num_layers=1, length=8, seed=seed)
    base, _ = toy.train(fresh, "sft", lambda _: pretraining(rng), 300, lr=5e-3)

    def run(loss, make, **hyper):
        return unlearned(base, seed, loss, make, **hyper)

    def own(lm, draw):
        return with_samples(lm, seed, draw)

    both = {"beta": BETA, "alpha": BETA}
    policy, online = run("d2o", own, **both)
    paths = {
        "D²O": online,
        "samples of the start": run("d2o", lambda _, i: own(base, i), **both)[1],
        "no samples": run("d2o", own, beta=1e-3, alpha=BETA)[1],
        "safe negatives": run(
            "d2o", lambda lm, i: with_samples(lm, seed, i, SAFE), **both
        )[1],
        "DPO": run("dpo", lambda _, i: pairs(seed, i, swaps=False), beta=BETA)[1],
        "DPO, swapped": run("dpo", lambda _, i: pairs(seed, i, swaps=True), beta=BETA)[
            1
        ],
        "gradient ascent": run(
            "gradient_ascent", lambda _, i: negatives_alone(seed, i)
        )[1],
    }
    gaps = dict(zip(("mean gap", "least gap"), jensen(policy, base, seed), strict=True))
    return gaps | {k: np.array(v) for k, v in paths.items()}


def rise(path):
    """Of neutral NLL, from the first step to the last."""
    return path[:, -1, 1] - path[:, 0, 1]


def rise_at(path, harm=0.1):
    """Of neutral NLL, from the first step to where the harm has fallen to `harm`."""
    found = []
    for seed in path:
        i = int(np.argmax(seed[:, 0] <= harm))
        assert i, f"harm ends at {seed[-1, 0]:.3f}"
        found.append(np.interp(harm, seed[[i, i - 1], 0], seed[[i, i - 1], 1]))
    return np.array(found) - path[:, 0, 1]


def main() -> list[report.Row]:
    paths = toy.over_seeds(compare)
    mean_gap, least_gap = paths.pop("mean gap"), paths.pop("least gap")
    turned, without, ascent = (
        paths.pop("safe negatives"), paths["no samples"], paths["gradient ascent"]
    )  # fmt: skip

    def harm(path, other):
        return path[:, -1, 0] / paths[other][:, -1, 0]

    check = report.check
    rows = [
        check("harm over DPO's with noisy positives; control: negatives that are safe", "<= 1",
              lambda x: x <= 1, harm(paths["D²O"], "DPO"), harm(turned, "DPO")),
        check("harm over DPO's with swapped pairs; control: negatives that are safe", "<= 1",
              lambda x: x <= 1, harm(paths["D²O"], "DPO, swapped"),
              harm(turned, "DPO, swapped")),
        check("rise of neutral NLL over gradient ascent's; control: no samples", "< 1",
              lambda x: x < 1, rise(paths["D²O"]) / rise(ascent),
              rise(without) / rise(ascent)),
        check("the same with samples of the start; control: no samples", "< 1",
              lambda x: x < 1, rise(paths["samples of the start"]) / rise(ascent),
              rise(without) / rise(ascent)),
        check("that rise where harm has fallen to .1, over no samples'; control: gradient "
              "ascent", "< 1", lambda x: x < 1, rise_at(paths["D²O"]) / rise_at(without),
              rise_at(ascent) / rise_at(without)),
        check("mean of single pairs' losses less D²O's; control: their least", ">= 0",
              lambda x: x >= -1e-6, mean_gap, least_gap),
    ]  # fmt: skip

    drawing, (a, b) = report.figure(
        ["Harmful token", "Neutral text"], title="D²O: negatives and own samples"
    )
    at, colors = np.arange(STEPS + 1), dict(zip(paths, report.COLORS, strict=True))
    for name in ("DPO", "DPO, swapped", "gradient ascent", "D²O"):
        report.curve(a, at, paths[name][..., 0], color=colors[name], label=name)
    for name in ("no samples", "gradient ascent", "D²O", "samples of the start"):
        report.curve(b, at, paths[name][..., 1], color=colors[name], label=name)
    a.set_yscale("log")
    a.set_ylim(1e-3, 1)
    report.label(a, "step", "probability on risky prompts", legend="lower left")
    report.label(b, "step", "NLL, nats a token")
    return report.finish("d2o", rows, drawing)


if __name__ == "__main__":
    main()
