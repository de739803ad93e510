"""On-policy samples and negative gradients find a reward that data alone do not show.

Tajwar et al. 2024, https://arxiv.org/abs/2404.14367, section 4: 100 actions, contexts
that the reward ignores, the reward exp(-((a - c)/10)²) with its peak c at 70 (misaligned)
or 20 (aligned), where the data are. Ten actions a context. Offline methods see one set of
data; on-policy ones draw anew.

MLP: sizes, steps and rates of the paper's code (offline 100 contexts and 200 steps at
.003, on-policy 10 contexts, 100 draws and 15 steps each at .001; IPO's margin is 10), whose
data are a squashed Cauchy distribution with heavy ends, and whose pairs differ by a reward of .2 at
least. Predicted: on-policy samples are far ahead of offline ones where misaligned, a
negative gradient (IPO) beats likelihood (best-of-10) offline too, and neither matters
where aligned.

Table: a vector of logits, 400 steps at .1, drawing at every one. The predictions in numbers
were made for it, for the mean of four runs (which is what one seed stands for here), and
for a distribution that starts at an expected reward of .013 for c = 70 and of .681 for c = 20: a
Cauchy distribution of 5 actions' width about 19.5, and all pairs. On-policy best-of-10 and REINFORCE
end above .95 and at least .5 above any offline method, offline ones below .30, on-policy
IPO at least .25 above offline IPO, negatives hardly help offline (.12 to .11), and for
c = 20 no two methods are more than .03 apart.

Controls: the aligned reward, for which the method should not matter; offline methods, for
what on-policy ones reach.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import toy

from alignax import logprob
from alignax.batch import Scores
from alignax.losses import dpo, ipo, sft
from alignax.theory import mode_seeking

ACTIONS, CONTEXT, DRAWN, MARKS = 100, 100, 10, 20
SIZES = (CONTEXT, 50, 256, 256, ACTIONS)
PEAKS = {"misaligned": 70, "aligned": 20}
METHODS = (
    "offline best-of-10", "offline DPO", "offline IPO",
    "on-policy best-of-10", "on-policy REINFORCE", "on-policy IPO",
)  # fmt: skip
OFF_BEST, OFF_DPO, OFF_IPO, ON_BEST, ON_REINFORCE, ON_IPO = METHODS
STYLES = dict(zip(METHODS, ("0--", "1--", "2--", "0-", "3-", "2-"), strict=True))
AWAY = np.arange(ACTIONS) - 19.5
CAUCHY = 1 / (1 + (AWAY / 5) ** 2)
DISTRIBUTIONS = {
    "table": CAUCHY / CAUCHY.sum(),
    "MLP": mode_seeking.squashed_cauchy(ACTIONS),
}
GAPS = {"table": 0.0, "MLP": 0.2}  # pairs that differ by less are left out
RUNS = {"table": 4, "MLP": 1}  # whose mean is one seed's number
FIRST, SECOND = map(np.array, zip(*[(i, j) for i in range(DRAWN) for j in range(i)],
                                  strict=True))  # fmt: skip


def init_mlp(key):
    keys = jax.random.split(key, len(SIZES) - 1)
    layers = []
    for k, n, m in zip(keys, SIZES, SIZES[1:], strict=False):
        edge = 0.01 * np.sqrt(6 / (n + m))  # Xavier, as small as in the paper's code
        weight = jax.random.uniform(k, (n, m), minval=-edge, maxval=edge)
        layers.append({"weight": weight, "bias": jnp.zeros(m)})
    return {"layers": layers, "scale": jnp.ones(SIZES[1]), "shift": jnp.zeros(SIZES[1])}


def mlp(params, x):
    for i, layer in enumerate(params["layers"]):
        x = x @ layer["weight"] + layer["bias"]
        if i == 0:
            x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(
                x.var(-1, keepdims=True) + 1e-5
            )
            x = x * params["scale"] + params["shift"]
        if i < len(SIZES) - 2:
            x = jax.nn.relu(x)
    return x


def table(params, x):
    return jnp.broadcast_to(params, (len(x), ACTIONS))


def update(tx, loss, carry, _=None):
    params, opt_state = carry
    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None


def start(key, apply, contexts, distribution):
    """A policy that imitates the data: KL(π ‖ distribution) over 100 steps of Adam."""
    if apply is table:
        return distribution
    params, tx = init_mlp(key), optax.adam(0.01)

    def loss(params):
        logps = jax.nn.log_softmax(apply(params, contexts))
        return (jnp.exp(logps) * (logps - distribution)).sum(-1).mean()

    carry = (params, tx.init(params))
    return jax.lax.scan(functools.partial(update, tx, loss), carry, None, 100)[0][0]


def objective(kind, logits, actions, reward, distribution, gap):
    """The loss of a method on [S, DRAWN] actions under [S, ACTIONS] logits."""
    r = reward[actions]
    if kind == "best-of-10":
        best = jnp.take_along_axis(actions, r.argmax(-1, keepdims=True), -1)
        batch = toy.choices(best)
        policy = toy.scores(logits[:, None], batch)
        return toy.mean_loss(sft.loss, policy, batch, reduction="sequence")
    each = jnp.broadcast_to(logits[:, None], (*actions.shape, ACTIONS))
    logps = logprob.token_logps(each, actions)
    if kind == "REINFORCE":
        return -((r - r.mean(-1, keepdims=True)) * logps).mean()
    swap = r[:, FIRST] < r[:, SECOND]
    chosen, rejected = (
        jnp.where(swap, a, b) for a, b in ((SECOND, FIRST), (FIRST, SECOND))
    )

    def side(x, slot):
        return jnp.take_along_axis(x, slot, -1).reshape(-1)

    def both(x):
        return jnp.stack([side(x, chosen), side(x, rejected)], -1)

    ahead = side(r, chosen) - side(r, rejected)
    far = ((ahead > 0) & (ahead >= gap))[:, None]
    batch = toy.choices(both(actions), valid=jnp.broadcast_to(far, (len(far), 2)))

    def tokens(x):
        return jnp.stack([jnp.zeros_like(x), x], -1)

    batch = batch._replace(ref_logps=tokens(both(distribution[actions])))
    # IPO's margin of 10 is 1/(2β)
    loss = {"DPO": functools.partial(dpo.loss, beta=0.1),
            "IPO": functools.partial(ipo.loss, beta=0.05)}[kind]  # fmt: skip
    values, _ = loss(Scores(tokens(both(logps))), batch)
    return values.sum() / jnp.maximum(far.sum(), 1)


@functools.partial(jax.jit, static_argnames=("method", "policy"))
def train(reward, distribution, gap, *, method, policy):
    apply = {"table": table, "MLP": mlp}[policy]
    data, kind = method.split(" ")
    offline = data == "offline"
    draws, steps = (1, 200) if offline else (100, 15)
    rate, num_contexts = (0.003, 100) if offline else (0.001, 10)
    if policy == "table":
        draws, steps, rate = (1, 400, 0.1) if offline else (400, 1, 0.1)
    tx = optax.adam(rate)

    def run(key):
        *keys, key = jax.random.split(key, 5)
        contexts = jax.random.uniform(keys[0], (num_contexts, CONTEXT))
        fresh = jax.random.uniform(keys[1], (100, CONTEXT))
        params = start(
            keys[2], apply, jax.random.uniform(keys[3], (100, CONTEXT)), distribution
        )

        def value(params):
            return (jax.nn.softmax(apply(params, fresh)) @ reward).mean()

        def learn_from(carry, actions, count):
            def loss(params):
                return objective(
                    kind, apply(params, contexts), actions, reward, distribution, gap
                )

            return jax.lax.scan(functools.partial(update, tx, loss), carry, None, count)

        def draw(key, logits):
            shape = (DRAWN, num_contexts)
            return jax.random.categorical(key, logits, shape=shape).T

        carry = (params, tx.init(params))
        if offline:
            actions = draw(key, jnp.broadcast_to(distribution, (num_contexts, ACTIONS)))

            def body(carry, _):
                return learn_from(carry, actions, steps // MARKS)[0], value(carry[0])

            carry, seen = jax.lax.scan(body, carry, None, MARKS)
        else:

            def body(carry, i):
                logits = apply(carry[0], contexts)
                actions = draw(jax.random.fold_in(key, i), logits)
                return learn_from(carry, actions, steps)[0], value(carry[0])

            carry, seen = jax.lax.scan(body, carry, jnp.arange(draws))
            seen = seen[:: draws // MARKS]
        return jnp.append(seen, value(carry[0]))

    runs = RUNS[policy]
    seen = jax.vmap(run)(jax.random.split(jax.random.key(1), report.SEEDS * runs))
    return seen.reshape(report.SEEDS, runs, -1).mean(1)


def learn(name, policy, method, gap=None):
    """[SEEDS, MARKS + 1] expected reward along the way, exact over the actions."""
    reward = jnp.asarray(mode_seeking.bump(ACTIONS, peak=PEAKS[name]), jnp.float32)
    distribution = jnp.log(jnp.asarray(DISTRIBUTIONS[policy], jnp.float32))
    gap = GAPS[policy] if gap is None else gap
    return np.asarray(train(reward, distribution, gap, method=method, policy=policy))


def main() -> list[report.Row]:
    panels = [(name, policy) for policy in DISTRIBUTIONS for name in PEAKS]
    curves = {(*p, method): learn(*p, method) for p in panels for method in METHODS}
    ends = {k: v[:, -1] for k, v in curves.items()}

    def least(name):
        """What both seekers reach."""
        return np.minimum(*(ends[name, "table", m] for m in (ON_BEST, ON_REINFORCE)))

    def offline(name):
        return np.max([ends[name, "table", m] for m in METHODS[:3]], 0)

    def lead(method, base, policy):
        """By how much a method is above another: where misaligned, where aligned."""
        return [ends[n, policy, method] - ends[n, policy, base] for n in PEAKS]

    def spread(name):
        """The largest gap of two methods."""
        return np.ptp([ends[name, "table", m] for m in METHODS], 0)

    paired = np.max(
        [
            learn("misaligned", "table", m, GAPS["MLP"])[:, -1]
            for m in (OFF_DPO, OFF_IPO)
        ],
        0,
    )
    check, false = report.check, report.false
    rows = [
        check("table: the lesser of on-policy best-of-10 and REINFORCE; control: the best "
              "offline", ">= .95", lambda x: x >= 0.95, least("misaligned"),
              offline("misaligned")),
        false("table: the best offline method; beside: aligned", "<= .30",
              lambda x: x <= 0.3, *map(offline, PEAKS), cause="DPO passes it where the data "
              "hold more actions near the peak, some dozen of 1000"),
        check("table: the lesser over the best offline method; control: aligned", ">= .5",
              lambda x: x >= 0.5, *(least(n) - offline(n) for n in PEAKS)),
        check("table: on-policy IPO over offline IPO; control: aligned", ">= .25",
              lambda x: x >= 0.25, *lead(ON_IPO, OFF_IPO, "table")),
        false("table: offline IPO over offline best-of-10; beside: aligned", "hardly, < .1",
              lambda x: x < 0.1, *lead(OFF_IPO, OFF_BEST, "table"), cause="IPO follows "
              "the actions near the peak, some dozen of 1000, where best-of-10 imitates"),
        check("table, aligned: largest gap of two methods; control: misaligned", "<= .03",
              lambda x: x <= 0.03, spread("aligned"), spread("misaligned")),
        false("table, offline pairs that differ by .2 at least: on-policy over offline",
              ">= .5", lambda x: x >= 0.5, least("misaligned") - paired, cause="these pairs "
              "are mostly those with one of the few good actions, which they weigh heavily"),
        check("MLP: on-policy best-of-10 over offline best-of-10; control: aligned",
              "far ahead, > .1", lambda x: x > 0.1, *lead(ON_BEST, OFF_BEST, "MLP")),
        check("MLP: on-policy IPO over offline IPO; control: aligned", "far ahead, > .1",
              lambda x: x > 0.1, *lead(ON_IPO, OFF_IPO, "MLP")),
        check("MLP: offline IPO over offline best-of-10; control: aligned", "ahead, > .1",
              lambda x: x > 0.1, *lead(OFF_IPO, OFF_BEST, "MLP")),
    ]  # fmt: skip

    drawing, axes = report.figure(
        [f"{policy}, {name} reward" for name, policy in panels],
        title="Bandit: on-policy samples and negative gradients",
    )
    for axis, panel in zip(axes, panels, strict=True):
        for method, (color, *style) in STYLES.items():
            report.curve(
                axis, np.linspace(0, 1, MARKS + 1), curves[(*panel, method)],
                color=report.COLORS[int(color)], linestyle="".join(style), label=method,
            )  # fmt: skip
        report.label(axis, "share of the steps", "expected reward", legend="")
        axis.set_ylim(0, 1.02)
    axes[-1].legend(fontsize=7, frameon=False, loc="lower right")
    return report.finish("bandit", rows, drawing)


if __name__ == "__main__":
    main()
