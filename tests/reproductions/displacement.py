"""Learning "No" over "Never" can make the model say "Yes".

Razin et al. 2024, https://arxiv.org/abs/2410.08847. Two claims.

1. A pair of single tokens, output rows W frozen, the state trained by DPO until
   log π(No) - log π(Never) has grown by 2 nats, from π = (.496 No, .496 Never, .004 Yes,
   .004 other). With cos(W_No, W_Never) = .98, π(No) falls from .496 to .096 and π(Yes)
   rises to .891; with .92 they end at .76 and .137; up to .7, π(No) rises to .84 or more.
   The row of Yes lies along W_No - W_Never, with .8 of the norm of No's row (the numbers
   above were made with a geometry that is not stated; this one meets all of them).
2. Over 600 random linear-softmax instances, one step of DPO each, Spearman's correlation
   of a pair's score with how much log π(y₊) fell is about .67 for CHES and .60 for its
   length-normalised form, and negative for the inner product of the last states (-.45).
   The instances behind these numbers are not stated either. Here: 20 tokens, states of
   width 16 that share a mean direction, W trained. All three hold of responses of 4 to 6
   tokens whose states differ in size between instances by a factor of twenty. Of responses
   of 1 to 6 tokens with states of about one size, that for ln-CHES does not: it is blind to
   length, and what is foretold, a sum over tokens, is not. (On responses of one length the
   two are the same measure.) Hardly any of the 600 falls outright when W alone is trained:
   it is by how little log π(y₊) rises that CHES foretells.

Controls: rows at cos .7, where the same loss and margin displace nothing; Yes across
W_No - W_Never instead of along it; the measure that the paper rejects; the pair swapped;
for ln-CHES, the instances that differ in length rather than size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
import toy

from alignax import logprob
from alignax.batch import Scores, from_pairs
from alignax.losses import dpo
from alignax.theory import displacement

BEFORE = np.array([0.496, 0.496, 0.004, 0.004])  # No, Never, Yes, other
NO, NEVER, YES = 0, 1, 2
GAIN, LEAN = 2.0, 0.8
COSINES = (-0.5, 0.0, 0.3, 0.5, 0.7, 0.8, 0.86, 0.92, 0.95, 0.98)
INSTANCES, VOCAB, WIDTH, LONGEST = 600, 20, 16, 6


class Kind(NamedTuple):
    """What instances differ in: ranges of which each draws one number, uniformly."""

    shortest: int  # tokens of a response, up to LONGEST
    mean: tuple[float, float]  # size of what all states of an instance share
    spread: tuple[float, float]  # size of what each has of its own


KINDS = {
    "size": Kind(4, (0.0, 1.5), (0.1, 2.0)),
    "length": Kind(1, (0.2, 1.0), (0.3, 1.0)),
    "even": Kind(LONGEST, (0.2, 1.0), (0.3, 1.0)),
}


def rows(cos, lean=LEAN):
    """W: unit rows of No and Never at an angle, Yes along (or across) their difference."""
    across, along = np.sqrt((1 + cos) / 2), np.sqrt((1 - cos) / 2)
    rest = np.sqrt(LEAN**2 - lean**2)
    return np.array(
        [[across, along, 0], [across, -along, 0], [0, lean, rest], [0, 0, 0]],
        np.float32,
    )


@functools.partial(jax.jit, static_argnames=("num_steps",))
def train_state(weights, rate, num_steps=4000):
    """[num_steps + 1, 4] distributions while DPO trains the state, and the margin's gain."""
    batch = toy.choices([[NO, NEVER]])
    prior = jnp.log(jnp.asarray(BEFORE, jnp.float32))

    def logits(state):
        return prior + weights @ state

    def policy(state):
        return toy.scores(jnp.broadcast_to(logits(state), (1, 2, 4)), batch)

    zero = jnp.zeros(weights.shape[1])
    reference = batch._replace(ref_logps=policy(zero).logps)

    def loss(state):
        return toy.mean_loss(dpo.loss, policy(state), reference, beta=0.1)

    def body(state, _):
        return state - rate * jax.grad(loss)(state), logits(state)

    _, seen = jax.lax.scan(body, zero, None, num_steps)
    return jax.nn.softmax(seen), seen[:, NO] - seen[:, NEVER]


def at_gain(cos, lean=LEAN):
    """Laws on the way, up to the step at which the margin has grown by GAIN."""
    weights = rows(cos, lean)
    # the margin's slope is β/2 ‖W_No - W_Never‖² at most: some 400 steps whatever the angle
    rate = 0.05 / (1 - cos)
    distributions, gain = map(np.asarray, train_state(weights, rate))
    last = int(np.argmax(gain >= GAIN))
    assert last, f"the margin grew by {gain[-1]:.2f} only"
    return distributions[: last + 1], gain[: last + 1]


def instance(rng, kind):
    """States [k, WIDTH] and tokens of two responses that differ in their first token."""
    mean = rng.normal(size=WIDTH) * rng.uniform(*kind.mean)
    spread = rng.uniform(*kind.spread)
    lengths = rng.integers(kind.shortest, LONGEST + 1, 2)
    first = mean + spread * rng.normal(size=WIDTH)  # the prompt's state: both have it
    states = [
        np.vstack([first, mean + spread * rng.normal(size=(n - 1, WIDTH))])
        for n in lengths
    ]
    tokens = [rng.integers(0, VOCAB, n) for n in lengths]
    tokens[1][0] = (tokens[0][0] + rng.integers(1, VOCAB)) % VOCAB
    return states, tokens


@jax.jit
def fall(weights, states, batch):
    """[B]: by how much one small step of DPO on W lowers log π(y₊), per unit of rate."""

    def one(weights, states, batch):
        batch = jax.tree.map(lambda x: x[None], batch)

        def policy(w):
            logits = jnp.einsum("gtd,vd->gtv", states, w, precision="highest")[None]
            logps = logprob.token_logps(logits, batch.tokens)
            return Scores(jnp.where(batch.mask, logps, 0.0))

        reference = batch._replace(ref_logps=policy(weights).logps)
        grad = jax.grad(
            lambda w: toy.mean_loss(dpo.loss, policy(w), reference, beta=0.1)
        )(weights)
        _, rise = jax.jvp(lambda w: policy(w).logps[0, 0].sum(), (weights,), (-grad,))
        return -rise

    return jax.vmap(one)(weights, states, batch)


def correlations(seed, kind):
    """Spearman of four measures with the fall, and what is behind that of CHES."""
    rng = np.random.default_rng(seed)
    drawn = [instance(rng, kind) for _ in range(INSTANCES)]
    weights = rng.normal(size=(INSTANCES, VOCAB, WIDTH)) / np.sqrt(WIDTH)
    batch = from_pairs(
        [[0]] * INSTANCES, [t[0] for _, t in drawn], [t[1] for _, t in drawn],
        length=1 + LONGEST,
    )  # fmt: skip
    padded = np.zeros((INSTANCES, 2, 1 + LONGEST, WIDTH))
    for i, (pair, _) in enumerate(drawn):
        for g, states in enumerate(pair):
            padded[i, g, 1 : 1 + len(states)] = states
    batch = jax.tree.map(jnp.asarray, batch)
    down = np.asarray(fall(jnp.float32(weights), jnp.float32(padded), batch))
    measures = {
        "CHES": [displacement.ches(*s) for s, _ in drawn],
        "ln-CHES": [displacement.ches(*s, normalised=True) for s, _ in drawn],
        "last states": [displacement.last_inner(*s) for s, _ in drawn],
        "swapped": [displacement.ches(*s[::-1]) for s, _ in drawn],
    }
    ranks = {k: displacement.spearman(v, down) for k, v in measures.items()}
    return ranks | {"ches": np.array(measures["CHES"]), "down": down}


def main() -> list[report.Row]:
    paths = {c: at_gain(c) for c in COSINES}
    ends = {c: distributions[-1] for c, (distributions, _) in paths.items()}
    for c, distribution in ends.items():  # any loss on the margin goes the same way
        exact = displacement.after_margin(rows(c), BEFORE, NO, NEVER, GAIN)
        np.testing.assert_allclose(distribution, exact, atol=0.01)
    across = at_gain(0.98, lean=0.0)[0][-1]
    size, length, even = (
        toy.over_seeds(functools.partial(correlations, kind=kind))
        for kind in KINDS.values()
    )
    low = min(ends[c][NO] for c in COSINES if c <= 0.7)
    check = report.check
    table = [
        check("π(No) and π(Yes) at cos .98; control: .7", ".096 / .891 (.03)",
              lambda no, yes: abs(no - 0.096) < 0.03 and abs(yes - 0.891) < 0.03,
              tuple(ends[0.98][[NO, YES]]), tuple(ends[0.7][[NO, YES]])),
        check("the same at cos .92; control: .98", ".76 / .137 (.03)",
              lambda no, yes: abs(no - 0.76) < 0.03 and abs(yes - 0.137) < 0.03,
              tuple(ends[0.92][[NO, YES]]), tuple(ends[0.98][[NO, YES]])),
        check("least π(No) for cos <= .7; control: .98", ">= .84",
              lambda x: x >= 0.84, low, ends[0.98][NO]),
        check("π(Yes) at cos .98; control: Yes across the difference", "> .5",
              lambda x: x > 0.5, ends[0.98][YES], across[YES]),
        check("Spearman of CHES with the fall; control: last states", ".67, > .5",
              lambda x: x > 0.5, size["CHES"], size["last states"]),
        check("Spearman of CHES; control: the pair swapped", "> .5",
              lambda x: x > 0.5, size["CHES"], size["swapped"]),
        check("Spearman of the inner product of last states; control: CHES", "-.45, < 0",
              lambda x: x < 0, size["last states"], size["CHES"]),
        check("Spearman of ln-CHES where states differ in size; control: where responses "
              "differ in length", ".60, > .5", lambda x: x > 0.5, size["ln-CHES"],
              length["ln-CHES"]),
        check("Spearman of CHES where responses differ in length; control: ln-CHES",
              "> .5", lambda x: x > 0.5, length["CHES"], length["ln-CHES"]),
        check("CHES over ln-CHES there; control: all lengths equal",
              "the sum foretells a sum, > .3", lambda x: x > 0.3,
              length["CHES"] - length["ln-CHES"], even["CHES"] - even["ln-CHES"]),
    ]  # fmt: skip

    drawing, (a, b, c) = report.figure(
        ["Rows at cos .98", "After a gain of 2 nats", "One step on 600 pairs"],
        title="Likelihood displacement",
    )
    distributions, gain = paths[0.98]
    for token, color in ((NO, 0), (NEVER, 1), (YES, 2)):
        name = ("No", "Never", "Yes")[token]
        a.plot(
            gain - gain[0],
            distributions[:, token],
            color=report.COLORS[color],
            label=name,
        )
    report.label(a, "margin gained, nats", "probability")
    grid = np.linspace(-0.5, 0.99, 150)
    exact = np.array(
        [displacement.after_margin(rows(x), BEFORE, NO, NEVER, GAIN) for x in grid]
    )
    for token, color in ((NO, 0), (YES, 2)):
        b.plot(grid, exact[:, token], color=report.COLORS[color],
               label=("No", "", "Yes")[token])  # fmt: skip
        b.plot(COSINES, [ends[x][token] for x in COSINES], "o", markersize=4,
               color=report.COLORS[color])  # fmt: skip
    report.mark(b, y=BEFORE[NO])
    report.label(b, "cosine of the rows of No and Never", "probability", legend="")
    c.plot(size["ches"][0], size["down"][0], ".", markersize=3, color=report.COLORS[0])
    report.label(c, "CHES", "fall of log π(chosen) per unit of rate", legend="")
    return report.finish("displacement", table, drawing)


if __name__ == "__main__":
    main()
