"""NPO runs away logarithmically and keeps what gradient ascent destroys.

Zhang et al. 2024, https://arxiv.org/abs/2404.05868. Two claims.

1. One logistic example, π = σ(z), forgotten by descent with rate 1 from z = 1: gradient
   ascent has moved z by 97, 997 and 9997 after 10², 10³ and 10⁴ steps, NPO with β = 1 by
   6.52, 8.90 and 11.22: ln(10)/β = 2.30 a decade (theorem 2).
2. The paper's synthetic benchmark (section 4; sizes, rates and steps are those of its
   code): 16-dimensional Gaussians, N(1, I) to forget and N(-1, I) to retain, with
   opposite logistic labels; 128 frozen ReLU features, a logistic readout trained by full
   batches. Distances are KL(π_retrained ‖ π_θ) on fresh inputs. It starts at a forget
   distance of 1.70 and a retain distance of .02. Within 1200 of 2000 steps every method
   but IDK+RT comes below a forget distance of .005; gradient ascent, with or without the
   retain term, goes on and leaves the retain set; NPO+RT has the least retain distance at
   every level of forgetting; with β → 0 the curves of NPO become those of ascent.

Controls: gradient ascent where NPO is claimed, IDK+RT for forgetting, GA+RT for
dominance, β = 1 for the limit, and NPO with its sign turned round.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
import toy

from alignax.losses import gradient_ascent, npo, sft, unlearn_dpo
from alignax.theory import unlearning

D, FEATURES, N_FORGET, N_RETAIN, N_EVAL = 16, 128, 200, 1000, 1000
STEPS, EVERY = 2000, 25
RATES = {  # as in the paper's code, for means one unit from the origin
    "GA": 5e-4, "GA+RT": 5e-4, "IDK+RT": 5e-4, "DPO+RT": 5e-3, "NPO": 5e-3, "NPO+RT": 5e-3,
}  # fmt: skip
LEVELS = (0.5, 0.2, 0.1, 0.05, 0.02)  # forget distances at which methods are compared
BETAS = (0.01, 0.1, 0.2, 0.5, 1.0)


class Problem(NamedTuple):
    """Features and labels of one seed, and the two models that it starts from."""

    forget: jax.Array  # [N, F]
    retain: jax.Array
    labels_forget: jax.Array  # [N] in {0, 1}
    labels_retain: jax.Array
    labels_idk: jax.Array  # fair coins
    eval_forget: jax.Array
    eval_retain: jax.Array
    start: jax.Array  # [F] readout fitted to everything
    retrained: jax.Array  # [F] fitted to the retain set alone


def logits(theta, features):
    """[N, 1, 2] for labels 0 and 1."""
    z = features @ theta
    return jnp.stack([jnp.zeros_like(z), z], -1)[:, None]


def scored(theta, features, labels):
    batch = toy.choices(labels[:, None])
    return toy.scores(logits(theta, features), batch), batch


def nll(theta, features, labels):
    return toy.mean_loss(
        sft.loss, *scored(theta, features, labels), reduction="sequence"
    )


def ascent(theta, features, labels):
    return toy.mean_loss(gradient_ascent.loss, *scored(theta, features, labels))


def descend(loss, theta, rate, steps):
    return jax.lax.fori_loop(0, steps, lambda _, t: t - rate * jax.grad(loss)(t), theta)


def draw(key, count, side):
    """Inputs and labels of one set: side +1 is to forget, -1 to retain."""
    key_x, key_y = jax.random.split(key)
    centred = jax.random.normal(key_x, (count, D))
    p = jax.nn.sigmoid(side * (centred.sum(-1) / np.sqrt(D) + 1))
    return side + centred, jax.random.bernoulli(key_y, p).astype(jnp.int32)


def problem(key) -> Problem:
    keys = jax.random.split(key, 6)
    weights = jax.random.normal(keys[0], (D, FEATURES)) / np.sqrt(D)

    def features(x):
        return jax.nn.relu(x @ weights)

    forget, labels_forget = draw(keys[1], N_FORGET, 1)
    retain, labels_retain = draw(keys[2], N_RETAIN, -1)
    idk = jax.random.bernoulli(keys[3], 0.5, (N_FORGET,)).astype(jnp.int32)
    forget, retain = features(forget), features(retain)
    both = jnp.concatenate([forget, retain])
    labels = jnp.concatenate([labels_forget, labels_retain])

    def fit(inputs, labels):
        loss = functools.partial(nll, features=inputs, labels=labels)
        return descend(loss, jnp.zeros(FEATURES), 0.05, 20_000)

    return Problem(
        forget, retain, labels_forget, labels_retain, idk,
        features(draw(keys[4], N_EVAL, 1)[0]), features(draw(keys[5], N_EVAL, -1)[0]),
        fit(both, labels), fit(retain, labels_retain),
    )  # fmt: skip


def objective(name, p: Problem, beta: float, sign: float = 1.0):
    """The loss of a method as a function of the readout."""
    policy, batch = scored(p.start, p.forget, p.labels_forget)
    batch = batch._replace(ref_logps=policy.logps)
    pairs = toy.choices(jnp.stack([p.labels_idk, p.labels_forget], -1))
    at_start = jnp.repeat(logits(p.start, p.forget), 2, 1)
    pairs = pairs._replace(ref_logps=toy.scores(at_start, pairs).logps)

    def forgetting(theta):
        if name.startswith("GA"):
            return ascent(theta, p.forget, p.labels_forget)
        if name.startswith("IDK"):
            return nll(theta, p.forget, p.labels_idk)
        if name.startswith("DPO"):
            policy = toy.scores(jnp.repeat(logits(theta, p.forget), 2, 1), pairs)
            return toy.mean_loss(unlearn_dpo.loss, policy, pairs, beta=beta)
        policy = toy.scores(logits(theta, p.forget), batch)
        return sign * toy.mean_loss(npo.loss, policy, batch, beta=beta)

    if name.endswith("+RT"):
        return lambda t: forgetting(t) + nll(t, p.retain, p.labels_retain)
    return forgetting


def distance(theta, other, features):
    """E KL(π_other ‖ π_theta)."""
    z, w = (jax.nn.log_softmax(logits(t, features)) for t in (theta, other))
    return (jnp.exp(w) * (w - z)).sum(-1).mean()


@functools.partial(jax.jit, static_argnames=("name", "rate", "beta", "sign"))
def unlearn(problems: Problem, *, name, rate, beta, sign=1.0):
    """[seeds, STEPS / EVERY + 1, 2] forget and retain distances along the way."""

    def run(p):
        loss = objective(name, p, beta, sign)

        def measure(theta):
            both = (p.eval_forget, p.eval_retain)
            return jnp.stack([distance(theta, p.retrained, x) for x in both])

        def body(theta, _):
            return descend(loss, theta, rate, EVERY), measure(theta)

        last, seen = jax.lax.scan(body, p.start, None, STEPS // EVERY)
        return jnp.concatenate([seen, measure(last)[None]])

    return jax.vmap(run)(problems)


def retained_at(curve, level):
    """Least retain distance, over the way, at a forget distance below `level`."""
    return np.where(curve[..., 0] < level, curve[..., 1], np.inf).min(-1)


def worst_ratio(curves, name):
    """[seeds] retain distance over the least of the others, at the worst level."""
    others = [c for k, c in curves.items() if k != name]
    ratios = [
        retained_at(curves[name], level)
        / np.min([retained_at(c, level) for c in others], 0)
        for level in LEVELS
    ]
    return np.max(ratios, 0)


@functools.partial(jax.jit, static_argnames=("climb",))
def displacement(beta, *, climb: bool):
    """Distances after 10², 10³ and 10⁴ steps on one example, by the project's losses."""
    one, label = jnp.ones((1, 1)), jnp.ones(1, jnp.int32)
    start, batch = scored(jnp.ones(1), one, label)
    batch = batch._replace(ref_logps=start.logps)

    def loss(theta):
        policy, _ = scored(theta, one, label)
        if climb:
            return toy.mean_loss(gradient_ascent.loss, policy, batch)
        return toy.mean_loss(npo.loss, policy, batch, beta=beta)

    marks, theta, seen = (100, 1000, 10_000), jnp.ones(1), []
    for before, after in zip((0, *marks), marks, strict=False):
        theta = descend(loss, theta, 1.0, after - before)
        seen.append(1 - theta[0])
    return jnp.stack(seen)


def main() -> list[report.Row]:
    far = np.asarray(displacement(1.0, climb=True))
    near = {b: np.asarray(displacement(b, climb=False)) for b in (0.1, 1.0, 5.0)}
    exact = unlearning.displacement(10_000, beta=1.0)[[100, 1000, 10_000]]
    np.testing.assert_allclose(near[1.0], exact, rtol=1e-3)

    keys = jax.random.split(jax.random.key(0), report.SEEDS)
    problems = jax.jit(jax.vmap(problem))(keys)
    curves = {
        name: np.asarray(
            unlearn(problems, name=name, rate=rate, beta=0.1 if "DPO" in name else 1.0)
        )
        for name, rate in RATES.items()
    }
    turned = np.asarray(unlearn(problems, name="NPO", rate=5e-3, beta=1.0, sign=-1.0))
    sweep = {
        b: np.asarray(unlearn(problems, name="NPO", rate=5e-4, beta=b)) for b in BETAS
    }
    gaps = {b: abs(c - curves["GA"])[:, :, 0].max(1) for b, c in sweep.items()}
    assert (np.diff(list(gaps.values()), axis=0) > 0).all(), (
        f"not monotone in β: {gaps}"
    )

    def least(curve):  # by step 1200
        return curve[:, : 1200 // EVERY + 1, 0].min(1)

    def ends(values):  # of the range of [seeds, 2]
        return tuple(np.stack([values.min(0), values.max(0)], 1).ravel())

    worst = np.max([least(c) for k, c in curves.items() if k != "IDK+RT"], 0)
    check = report.check
    rows = [
        check("one example, β=1: moved from 10³ to 10⁴ steps; control: ascent",
              "2.30 (5 %)", lambda x: abs(x / np.log(10) - 1) < 0.05,
              near[1.0][2] - near[1.0][1], far[2] - far[1]),
        check("the same for β=.1; control: β=1", "23.0 (5 %)",
              lambda x: abs(x / (10 * np.log(10)) - 1) < 0.05,
              near[0.1][2] - near[0.1][1], near[1.0][2] - near[1.0][1]),
        check("ascent: distance ×10 a decade; control: NPO", "10 (5 %)",
              lambda x: abs(x / 10 - 1) < 0.05, far[2] / far[1],
              near[1.0][2] / near[1.0][1]),
        check("start: least and most forget, least and most retain distance; control: "
              "after NPO+RT", "ranges hold 1.70 and .02",
              lambda a, b, c, d: a <= 1.7 <= b and c <= 0.02 <= d,
              ends(curves["NPO"][:, 0]), ends(curves["NPO+RT"][:, -1])),
        report.false("forget distance by step 1200, worst method; beside: IDK+RT", "< .005",
                     lambda x: x < 0.005, worst, least(curves["IDK+RT"]),
                     cause="one draw keeps every method above .006, in another ascent comes "
                     "down by step 1450; the paper shows one draw"),
        check("NPO: forget distance by step 1200 over the start's; control: its sign turned",
              "→ 0, < .01", lambda x: x < 0.01, least(curves["NPO"]) / curves["NPO"][:, 0, 0],
              least(turned) / turned[:, 0, 0]),
        check("retain distance in the end, NPO+RT; control: GA+RT",
              "< .1, GA+RT diverges", lambda x: x < 0.1, curves["NPO+RT"][:, -1, 1],
              curves["GA+RT"][:, -1, 1]),
        check("retain distance over the best other's, at the worst level of forgetting; "
              "control: GA+RT", "<= 1", lambda x: x <= 1,
              worst_ratio(curves, "NPO+RT"), worst_ratio(curves, "GA+RT")),
        check("NPO to ascent, gap of forget curves at β=.01 over that at 1; control: .5",
              "→ 0 with β, < .05", lambda x: x < 0.05, gaps[0.01] / gaps[1.0],
              gaps[0.5] / gaps[1.0]),
    ]  # fmt: skip

    drawing, (a, b, c, d) = report.figure(
        ["One example", "Forgetting", "Retaining, one draw", "β → 0"],
        title="NPO and gradient ascent",
    )
    steps = np.arange(1, 10_001)
    a.loglog(
        steps, unlearning.displacement(10_000)[1:], color=report.COLORS[1], label="GA"
    )
    a.loglog(
        steps, unlearning.displacement(10_000, beta=1.0)[1:], color=report.COLORS[0],
        label="NPO, β=1",
    )  # fmt: skip
    report.label(a, "step", "distance of z")
    at = np.arange(0, STEPS + 1, EVERY)
    for name, color in zip(curves, (1, 3, 4, 2, 5, 0), strict=True):
        middle = np.median(curves[name][..., 0], 0)
        b.semilogy(at, middle, color=report.COLORS[color], label=name)
        c.loglog(*curves[name][0].T, color=report.COLORS[color], label=name)
    report.label(b, "step", "forget distance, nats", legend="")
    report.label(
        c, "forget distance, nats", "retain distance, nats", legend="upper left"
    )
    c.invert_xaxis()
    for i, (beta, curve) in enumerate(sweep.items()):
        share = i / (len(sweep) - 1)
        d.plot(at, np.median(curve[..., 0], 0), color=(0, 0.45 * share, 0.7),
               alpha=0.4 + 0.6 * share, label=f"β={beta:g}")  # fmt: skip
    middle = np.median(curves["GA"][..., 0], 0)
    d.plot(at, middle, "--", color=report.COLORS[1], label="GA")
    report.label(d, "step", "forget distance, nats")
    d.set_ylim(0, 3)
    return report.finish("npo", rows, drawing)


if __name__ == "__main__":
    main()
