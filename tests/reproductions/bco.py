"""BCO bounds DPO, its shift makes the bound tight, and its optimum is a density ratio.

Jung et al. 2024, https://arxiv.org/abs/2404.04656. Three claims.

1. For implicit rewards a and b and any shift δ, the classifier's loss of a pair is above
   DPO's; what it exceeds it by is least at δ = (a + b)/2.
2. Where y is liked with density p₊ and disliked with p₋, training ends at
   r(y) - δ = log p₊(y)/p₋(y); with p₊ and p₋ each other's mirror image the running shift
   agrees with it, and DPO on pairs of independent draws ends at the same differences.
3. Two clusters of prompts, 80 % and 20 % of whose responses are liked. Fitted on prompt
   embeddings, the odds of a liked prompt come within 10 % of their true 4 and 1/4; with
   these weights the responses on the right side of δ are all of the good ones and none of
   the bad, in both clusters, and without them δ tells the clusters apart instead.

Controls: half of the classifier (no bound), no shift (δ = 0), a shift pooled over 9 liked
responses to each disliked one, weights of 1, and embeddings that say nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import toy

from alignax.batch import Scores
from alignax.losses import bco, bco_pair, dpo
from alignax.theory import bco as theory
from alignax.training import step

LIKED = np.array([0.4, 0.3, 0.2, 0.1])
DISLIKED = LIKED[::-1]
# (cluster, response): P(liked); response 0 is good, 1 bad, 2 never rated
APPROVAL = np.array([[0.95, 0.65], [0.35, 0.05]])
EMBEDDING, PROMPTS = 8, 512


def rated(rewards, labels):
    """Single-token responses whose implicit rewards at β = 1 are given, [B, G]."""
    batch = toy.choices(np.zeros(rewards.shape))
    batch = batch._replace(feedback=jnp.asarray(labels, jnp.float32))
    batch = batch._replace(ref_logps=jnp.zeros(batch.tokens.shape))
    logps = jnp.stack([jnp.zeros(rewards.shape), jnp.asarray(rewards)], -1)
    return Scores(logps.astype(jnp.float32)), batch


def losses(a, b, shift):
    """Per pair: BCO's loss of both sides (a sum), of the chosen side alone, and DPO's."""
    labels = np.broadcast_to([1.0, 0.0], (len(a), 2))
    policy, batch = rated(np.stack([a, b], -1), labels)

    def classify(policy, batch, shift):
        one = jax.tree.map(lambda x: x[None], (policy, batch))
        ema = {"desirable": shift, "undesirable": shift}
        return bco.loss(*one, ema=ema, beta=1.0)[0][0]

    each = jax.vmap(classify)
    half = batch._replace(
        valid=jnp.broadcast_to(jnp.array([True, False]), labels.shape)
    )
    shift = jnp.asarray(shift, jnp.float32)
    return (
        2 * np.asarray(each(policy, batch, shift)), np.asarray(each(policy, half, shift)),
        np.asarray(dpo.loss(policy, batch, beta=1.0)[0]),
    )  # fmt: skip


def bound(rng):
    """Least difference to DPO over random triples: the whole classifier, and half of it."""
    a, b, shift = rng.normal(0, 3, (3, 100_000)).astype(np.float32)
    whole, half, pair = losses(a, b, shift)
    return (whole - pair).min(), (half - pair).min()


def best_shift(rng):
    """Furthest that the best shift of a grid lies from (a + b)/2, and from 0."""
    a, b = rng.normal(1, 1.5, (2, 50)).astype(np.float32)
    grid = np.linspace(-6, 8, 1401, dtype=np.float32)
    spread = [np.repeat(x, len(grid)) for x in (a, b)]
    whole, _, pair = losses(*spread, np.tile(grid, len(a)))
    found = grid[(whole - pair).reshape(len(a), -1).argmin(1)]
    return abs(found - theory.best_shift(a, b)).max(), abs(found).max()


def excess(rng):
    """Mean of BCO - DPO at three shifts, over its least: balanced, pooled over 9 : 1, 0."""
    a, b = (rng.normal(m, 1, 20_000).astype(np.float32) for m in (6.0, 2.0))
    pooled = 0.9 * a.mean() + 0.1 * b.mean()
    shifts = (a + b) / 2, (a.mean() + b.mean()) / 2, pooled, 0.0
    least, *others = [
        (whole - pair).mean()
        for whole, _, pair in (
            losses(a, b, np.broadcast_to(s, a.shape)) for s in shifts
        )
    ]
    return [x / least for x in others]


def descend(value: Callable, logits, num_steps=6000, rate=0.01):
    """Adam on value(logits, ema) -> (loss, metrics), with the step's running means."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    ema = {k: jnp.float32(v) for k, v in bco.EMA.items()}

    def body(carry, _):
        logits, opt_state, ema = carry
        (_, metrics), grad = jax.value_and_grad(value, has_aux=True)(logits, ema)
        updates, opt_state = tx.update(grad, opt_state)
        ema = {
            k: step.EMA_DECAY * v + (1 - step.EMA_DECAY) * metrics.get(f"ema/{k}", v)
            for k, v in ema.items()
        }
        return (optax.apply_updates(logits, updates), opt_state, ema), None

    carry = (logits, tx.init(logits), ema)
    logits, _, ema = jax.lax.scan(body, carry, None, num_steps)[0]
    return logits, (ema["desirable"] + ema["undesirable"]) / 2


def policy_of(logits, reference, batch, where=None):
    """Scores of a table of logits, [V] or [C, V] with a row for each prompt."""
    rows = logits[None] if where is None else logits[where]
    wide = jnp.broadcast_to(rows[:, None], (*batch.tokens.shape[:2], logits.shape[-1]))
    ref = toy.scores(jnp.broadcast_to(reference, wide.shape), batch).logps
    return toy.scores(wide, batch), batch._replace(ref_logps=ref)


def population(method):
    """Implicit rewards of the four responses, less the shift, after training."""
    reference = jnp.zeros(4)
    each = np.arange(4)
    if method == "bco":  # ten ratings of each kind, a batch that is the population
        counts = np.round(10 * np.concatenate([LIKED, DISLIKED])).astype(int)
        batch = toy.choices(np.repeat(np.tile(each, 2), counts)[:, None])
        batch = batch._replace(feedback=jnp.repeat(jnp.array([1.0, 0.0]), 10)[:, None])
    else:  # every pair of a liked and a disliked draw
        one, other = (np.repeat(each, np.round(10 * p).astype(int))
                      for p in (LIKED, DISLIKED))  # fmt: skip
        batch = toy.choices(np.stack(np.meshgrid(one, other), -1).reshape(-1, 2))

    def value(logits, ema):
        scores, filled = policy_of(logits, reference, batch)
        if method == "bco":
            values, metrics = bco.loss(scores, filled, ema=ema, beta=1.0)
            return values.mean(), metrics
        loss = {"dpo": dpo.loss, "bco_pair": bco_pair.loss}[method]
        return loss(scores, filled, beta=1.0)[0].mean(), {}

    logits, shift = jax.jit(lambda x: descend(value, x))(reference)
    rewards = jax.nn.log_softmax(logits) - jax.nn.log_softmax(reference)
    return np.asarray(rewards - (shift if method == "bco" else 0.0))


def odds(embedding, label):
    """P(liked)/P(disliked) of each prompt by logistic regression."""
    inputs = jnp.concatenate([embedding, jnp.ones((len(embedding), 1))], 1)

    def loss(weights):
        return optax.sigmoid_binary_cross_entropy(inputs @ weights, label).mean()

    start = jnp.zeros(inputs.shape[1])
    weights = jax.lax.fori_loop(
        0, 3000, lambda _, w: w - 0.5 * jax.grad(loss)(w), start
    )
    return np.asarray(jnp.exp(inputs @ weights))


def clusters(rng, informative=True):
    """Embedding, cluster and label of a rated prompt; half of the prompts each."""
    cluster = np.arange(2 * PROMPTS) % 2
    share = np.where(cluster == 0, 0.8, 0.2)
    label = (np.arange(2 * PROMPTS) // 2 % 10 < 10 * share).astype(np.float32)
    embedding = rng.normal(size=(2 * PROMPTS, EMBEDDING)) * 0.1
    if informative:
        embedding[:, 0] += 2.0 * cluster - 1
    return jnp.asarray(embedding, jnp.float32), cluster, jnp.asarray(label)


def fitted_odds(rng, informative=True):
    embedding, cluster, label = clusters(rng, informative)
    ratio = odds(embedding, label)
    return tuple(float(np.exp(np.log(ratio[cluster == c]).mean())) for c in (0, 1))


def side_of_shift(weights):
    """[cluster, response] r - δ after BCO with a weight for each cluster's prompts."""
    reference = jnp.log(jnp.array([0.1, 0.1, 0.8]))
    cells = [(c, y) for c in (0, 1) for y in (0, 1)]
    counts = [(round(20 * APPROVAL[c, y]), c, y) for c, y in cells]
    rows = [(c, y, up) for n, c, y in counts for up in [1.0] * n + [0.0] * (20 - n)]
    where, response, up = map(np.array, zip(*rows, strict=True))
    batch = toy.choices(response[:, None])._replace(feedback=jnp.asarray(up)[:, None])
    batch = batch._replace(
        feedback=batch.feedback.astype(jnp.float32),
        extra={"density_ratio": jnp.asarray(np.array(weights)[where], jnp.float32)},
    )

    def value(logits, ema):
        scores, filled = policy_of(logits, reference, batch, where)
        values, metrics = bco.loss(scores, filled, ema=ema, beta=1.0)
        return values.mean(), metrics

    start = jnp.broadcast_to(reference, (2, 3))
    logits, shift = jax.jit(lambda x: descend(value, x))(start)
    return np.asarray(jax.nn.log_softmax(logits) - reference - shift)[:, :2]


def on_the_right_side(margin):
    """Cluster-balanced accuracy: good responses above δ, bad ones below."""
    return float(((margin > 0) == [True, False]).mean())


def random_parts(seed):
    """What depends on a seed: {name: number}."""
    rng = np.random.default_rng(seed)
    out = dict(zip(("whole", "half"), bound(rng), strict=True))
    out |= dict(zip(("off", "off_zero"), best_shift(rng), strict=True))
    out |= dict(zip(("balanced", "pooled", "none"), excess(rng), strict=True))
    for name, informative in (("learned", True), ("blind", False)):
        out[name] = np.array(fitted_odds(rng, informative))
    margins = side_of_shift(out["learned"])
    return out | {"margins": margins, "right": on_the_right_side(margins)}


def main() -> list[report.Row]:
    drawn = toy.over_seeds(random_parts)
    want = theory.optimum(LIKED, DISLIKED)
    found = {m: population(m) for m in ("bco", "dpo", "bco_pair")}
    far = {m: abs(r - want).max() for m, r in found.items()}
    ends = {m: r[0] - r[-1] for m, r in found.items()}
    without = side_of_shift((1.0, 1.0))
    check = report.check
    rows = [
        check("least of BCO - DPO on 10⁵ triples; control: the chosen half alone", ">= 0",
              lambda x: x >= 0, drawn["whole"], drawn["half"]),
        check("best shift, furthest from (a+b)/2; control: from 0", "0 (.01)",
              lambda x: x <= 0.0101, drawn["off"], drawn["off_zero"]),
        check("excess over DPO at the balanced shift, over its least; control: pooled 9:1",
              "< 1.5", lambda x: x < 1.5, drawn["balanced"], drawn["pooled"]),
        check("the same; control: δ = 0", "< 1.5", lambda x: x < 1.5, drawn["balanced"],
              drawn["none"]),
        check("population optimum, furthest from log p₊/p₋; control: δ=0 (bco_pair)",
              "0 (.02)", lambda x: x < 0.02, far["bco"], far["bco_pair"]),
        check("reward of best over worst, BCO and DPO; control: bco_pair and DPO",
              "2.77 / 2.77 (.02)", lambda x, y: abs(x - y) < 0.02 and abs(x - 2.773) < 0.02,
              (ends["bco"], ends["dpo"]), (ends["bco_pair"], ends["dpo"])),
        check("odds of the two clusters; control: uninformative embeddings",
              "4 / .25 (10 %)", lambda x, y: abs(x / 4 - 1) < 0.1 and abs(y * 4 - 1) < 0.1,
              tuple(drawn["learned"].T), tuple(drawn["blind"].T)),
        check("responses on the right side of δ, balanced; control: no weights", "1",
              lambda x: x == 1, drawn["right"],
              on_the_right_side(without)),
    ]  # fmt: skip

    drawing, (a, b, c) = report.figure(
        [
            "A pair with rewards 6 and 2",
            "Population optimum",
            "Two clusters of prompts",
        ],
        title="BCO: a bound, a shift, a density ratio",
    )
    shifts = np.linspace(-2, 10, 200)
    a.plot(shifts, theory.bce(6, 2, shifts), color=report.COLORS[0], label="BCO")
    a.axhline(theory.dpo(6, 2), color=report.COLORS[1], label="DPO")
    report.mark(a, x=4)
    a.set_ylim(-0.2, 5.5)  # room for the legend
    report.label(a, "shift δ", "loss, nats", legend="upper left")
    for i, (method, rewards) in enumerate(found.items()):
        style = "o-" if method == "bco" else "-"
        b.plot(want, rewards, style, color=report.COLORS[i], label=method)
    b.plot(want, want, color=report.COLORS[4], linewidth=0.9, linestyle=(0, (4, 3)))
    report.label(b, "log p₊/p₋", "reward − δ")
    place, weighed = np.arange(4), np.median(drawn["margins"], 0).ravel()
    c.bar(place - 0.2, weighed, 0.4, color=report.COLORS[0], label="weighted")
    c.bar(place + 0.2, without.ravel(), 0.4, color=report.COLORS[1], label="unweighted")
    c.set_xticks(place, ["good\n80 %", "bad\n80 %", "good\n20 %", "bad\n20 %"])
    report.label(c, "response and approval of its cluster", "reward − δ")
    return report.finish("bco", rows, drawing)


if __name__ == "__main__":
    main()
