"""Losses in numpy float64, one prompt and one response at a time, from the papers."""

import math
from typing import NamedTuple

import numpy as np


def sequence(logps, mask, b, g):
    """log p(y|x) of response g to prompt b, in Python floats."""
    return sum(float(x) for x, m in zip(logps[b, g], mask[b, g], strict=True) if m)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sft(logps, mask, valid, reduction, length=None):
    """The mean over prompts that have a valid response, of the named reduction."""
    rows = [
        [float(x) for x, m in zip(logps[b, g], mask[b, g], strict=True) if m]
        for b, g in np.argwhere(valid)
    ]
    if reduction == "token":
        flat = [x for row in rows for x in row]
        return -sum(flat) / len(flat)
    if reduction == "sequence":
        return -sum(sum(row) / len(row) for row in rows) / len(rows)
    return -sum(sum(row) for row in rows) / (len(rows) * (length or mask.shape[-1]))


def dpo(logps, ref_logps, mask, beta, eps=0.0):
    """[B]: cross-entropy of the preference that the implicit rewards imply."""
    out = []
    for b in range(len(logps)):
        rewards = [
            beta * (sequence(logps, mask, b, g) - sequence(ref_logps, mask, b, g))
            for g in (0, 1)
        ]
        h = rewards[0] - rewards[1]
        out.append(-(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h))
    return np.array(out)


def reward_model(values, mask, margin=0.0, centring=0.0):
    """[B]: the reward is the value on the last scored token."""
    out = []
    for b in range(len(values)):
        r = [float(values[b, g, np.flatnonzero(mask[b, g])[-1]]) for g in (0, 1)]
        out.append(-log_sigmoid(r[0] - r[1] - margin) + centring * (r[0] + r[1]) ** 2)
    return np.array(out)


# -- pairs: the cost of one pair, given what is known of its two sides


class Side(NamedTuple):
    logp: float  # log π(y|x)
    ref: float  # log π_ref(y|x)
    length: int  # scored tokens

    @property
    def ratio(self):
        return self.logp - self.ref


def sides(logps, ref_logps, mask):
    """(chosen, rejected) of every pair."""
    logps, ref_logps, mask = (np.asarray(x) for x in (logps, ref_logps, mask))

    def side(b, g):
        return Side(
            sequence(logps, mask, b, g), sequence(ref_logps, mask, b, g),
            int(mask[b, g].sum()),
        )  # fmt: skip

    return [(side(b, 0), side(b, 1)) for b in range(len(logps))]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def prefers(chosen, rejected, beta):
    """Bradley-Terry probability of the label, under the implicit rewards."""
    return sigmoid(beta * (chosen.ratio - rejected.ratio))


def smoothed(p, eps):
    """Cross-entropy of a label that is wrong with probability eps."""
    return -(1 - eps) * math.log(p) - eps * math.log(1 - p)


def robust(c, r, *, beta, label_smoothing):
    clean, flipped = prefers(c, r, beta), prefers(r, c, beta)
    bias = label_smoothing / (1 - 2 * label_smoothing)
    return -(1 + bias) * math.log(clean) + bias * math.log(flipped)


def hinge(c, r, *, beta):
    return max(0.0, 1 - beta * (c.ratio - r.ratio))


def ipo(c, r, *, beta, average):
    per = (c.length, r.length) if average else (1, 1)
    return (c.ratio / per[0] - r.ratio / per[1] - 0.5 / beta) ** 2


def exo_pair(c, r, *, beta, label_smoothing):
    model = (prefers(c, r, beta), prefers(r, c, beta))
    label = (1 - label_smoothing, label_smoothing)
    return sum(q * math.log(q / p) for q, p in zip(model, label, strict=True))


def nca_pair(c, r, *, beta):
    data_c, data_r = sigmoid(beta * c.ratio), sigmoid(beta * r.ratio)
    return -math.log(data_c * math.sqrt((1 - data_c) * (1 - data_r)))


def bco_pair(c, r, *, beta, delta):
    good_c, good_r = (sigmoid(beta * side.ratio - delta) for side in (c, r))
    return -math.log(good_c * (1 - good_r))


def sppo_hard(c, r, *, beta):
    eta = 1 / beta  # the paper regresses each log-ratio on η (P - 1/2)
    return (c.ratio - eta * (1 - 0.5)) ** 2 + (r.ratio - eta * (0 - 0.5)) ** 2


def apo_zero(c, r, *, beta):
    return 1 - sigmoid(beta * c.ratio) + sigmoid(beta * r.ratio)


def apo_down(c, r, *, beta):
    return sigmoid(beta * c.ratio) + 1 - prefers(c, r, beta)


def discopop(c, r, *, beta, tau):
    z = beta * (c.ratio - r.ratio)
    m = sigmoid(z / tau)
    return (1 - m) * math.log(1 + math.exp(-z)) + m * math.exp(-z)


def f_dpo(c, r, *, beta, divergence, alpha=0.5):
    derivative = {
        "reverse_kl": lambda u: math.log(u) + 1,
        "forward_kl": lambda u: -1 / u,
        "js": lambda u: math.log(2 * u / (1 + u)),
        "alpha": lambda u: u ** (alpha - 1) / (alpha - 1),
    }[divergence]
    gap = derivative(math.exp(c.ratio)) - derivative(math.exp(r.ratio))
    return -math.log(sigmoid(beta * gap))


def dpo_norm(c, r, *, beta):
    return -math.log(sigmoid(beta * (c.ratio / c.length - r.ratio / r.length)))


def r_dpo(c, r, *, beta, alpha):
    reward = [beta * side.ratio + alpha * side.length for side in (c, r)]
    return -math.log(sigmoid(reward[0] - reward[1]))


def dpop(c, r, *, beta, lam):
    fall = max(0.0, c.ref - c.logp)
    return -log_sigmoid(beta * (c.ratio - r.ratio - lam * fall))


def cal_dpo(c, r, *, beta):
    calibration = [
        (side.ratio - sign / (2 * beta)) ** 2 for side, sign in ((c, 1), (r, -1))
    ]
    return -math.log(prefers(c, r, 1.0)) + sum(calibration) / 2


def rpo(c, r, *, beta, alpha):
    return -math.log(prefers(c, r, beta)) - alpha * c.logp / c.length


def bonbon(c, r, *, n, alpha):
    target = (n - 1) * sum(1 / k for k in range(1, n))
    return -alpha * c.logp + (1 - alpha) * (c.ratio - r.ratio - target) ** 2


def simpo(c, r, *, beta, gamma):
    reward = [beta / side.length * side.logp for side in (c, r)]
    return -math.log(sigmoid(reward[0] - reward[1] - gamma))


def orpo(c, r, *, lam):
    p, q = (math.exp(side.logp / side.length) for side in (c, r))
    odds = (p / (1 - p), q / (1 - q))
    return -math.log(p) - lam * math.log(odds[0] / sum(odds))


def cpo(c, r, *, beta, lam):
    return -math.log(sigmoid(beta * (c.logp - r.logp))) - lam * c.logp / c.length


def slic(c, r, *, delta, lam):
    return max(0.0, delta - c.logp + r.logp) - lam * c.logp / c.length


def aot(pairs, *, beta, label_smoothing, paired):
    """The sum over the pairs that are given, sorted as lists."""
    if paired:
        above = sorted(c.logp - r.logp for c, r in pairs)
        below = sorted(c.ref - r.ref for c, r in pairs)
    else:
        above = sorted(c.ratio for c, _ in pairs)
        below = sorted(r.ratio for _, r in pairs)
    return sum(
        smoothed(sigmoid(beta * (x - y)), label_smoothing)
        for x, y in zip(above, below, strict=True)
    )


# -- lists, labels, papers


class Response(NamedTuple):
    logp: float  # log π(y|x)
    ref: float  # log π_ref(y|x)
    length: int  # scored tokens
    feedback: float
    value: float  # scalar head on the last scored token

    @property
    def mean(self):
        return self.logp / self.length

    @property
    def ratio(self):
        return self.logp - self.ref


def groups(policy, batch):
    """The valid responses of every prompt."""
    logps, values = np.asarray(policy.logps), np.asarray(policy.values)
    ref, mask, valid = (
        np.asarray(x) for x in (batch.ref_logps, batch.mask, batch.valid)
    )

    def response(b, g):
        return Response(
            sequence(logps, mask, b, g), sequence(ref, mask, b, g), int(mask[b, g].sum()),
            float(batch.feedback[b, g]), float(values[b, g, np.flatnonzero(mask[b, g])[-1]]),
        )  # fmt: skip

    return [
        [response(b, g) for g in range(valid.shape[1]) if valid[b, g]]
        for b in range(len(valid))
    ]


def best_first(group):
    return sorted(group, key=lambda y: -y.feedback)


def ordered(group):
    """(better, worse) for all pairs of a group that the feedback tells apart."""
    return [(y, z) for y in group for z in group if y.feedback > z.feedback]


def order_probability(strengths):
    """Of drawing items one by one without replacement, in the order they are given."""
    p = 1.0
    for k in range(len(strengths)):
        p *= math.exp(strengths[k]) / sum(map(math.exp, strengths[k:]))
    return p


def plackett_luce(group, *, beta):
    return -math.log(order_probability([beta * y.ratio for y in best_first(group)]))


def reward_plackett_luce(group):
    return -math.log(order_probability([y.value for y in best_first(group)]))


def reward_regression(group):
    return sum((y.value - y.feedback) ** 2 for y in group) / len(group)


def rrhf(group, *, lam):
    rank = sum(max(0.0, z.mean - y.mean) for y, z in ordered(group))
    return rank - lam * best_first(group)[0].mean


def ranking(group, *, margin, lam):
    rank = 0.0
    for y, z in ordered(group):
        rank += max(0.0, z.mean - y.mean + margin * (y.feedback - z.feedback))
    return rank - lam * best_first(group)[0].mean


def pro(group, *, lam):
    total, left = 0.0, best_first(group)
    while len(left) > 1:
        y, *rest = left
        temperatures = [1 / (y.feedback - z.feedback) for z in rest]
        own = math.exp(y.mean / min(temperatures))
        others = [math.exp(z.mean / t) for z, t in zip(rest, temperatures, strict=True)]
        total -= math.log(own / (own + sum(others)))
        left = rest
    return total - lam * best_first(group)[0].mean


def aft(group, *, constraint, slack, lam):
    """Feedback above 1/2 is positive; the reference is the first positive."""
    positives = [y.mean for y in group if y.feedback > 0.5]
    negatives = [y.mean for y in group if y.feedback <= 0.5]
    if not positives:
        return 0.0
    total = 1.0
    for p in positives:
        for n in negatives:
            total += math.exp(n - p)
            if constraint == "boundary":
                target = 2 * (min(positives) - slack) - p
                total += math.exp(target - n)
    return math.log(total) - lam * positives[0]


def aft_ranking(group, *, constraint, slack, lam, right=0.5):
    total = 1.0
    for y, z in ordered(group):
        total += math.exp(z.mean - y.mean)
        if constraint == "boundary":
            lowest = min(x.mean for x in group if x.feedback > z.feedback)
            total += math.exp(2 * lowest - 2 * slack - y.mean - z.mean)
    best = best_first(group)[0]
    return math.log(total) - (lam * best.mean if best.feedback > right else 0.0)


def kto(prompts, *, beta, desirable_weight, undesirable_weight):
    """The cost of every (response, mismatched response), all of one batch."""
    z = max(0.0, sum(m.ratio for _, m in prompts) / len(prompts))
    out = []
    for y, _ in prompts:
        if y.feedback > 0.5:
            out.append(desirable_weight * (1 - sigmoid(beta * (y.ratio - z))))
        else:
            out.append(undesirable_weight * (1 - sigmoid(beta * (z - y.ratio))))
    return out


def bco(group, *, beta, desirable, undesirable, density_ratio=1.0):
    """`desirable` and `undesirable` are what mean rewards have been so far."""
    total = 0.0
    for y in group:
        p = sigmoid(beta * y.ratio - (desirable + undesirable) / 2)
        w = min(10.0, max(0.5, density_ratio))
        total += -math.log(p) if y.feedback > 0.5 else -w * math.log(1 - p)
    return total / len(group)


def poft(group, *, beta, gamma):
    """`ref` is log p(y|x) under the aligned model."""
    wins = [sigmoid(beta * (y.mean - y.ref / y.length) + gamma) for y in group]
    return -sum(map(math.log, wins)) / len(group)


def unlearning(group, forget, retain_weight):
    costs = [forget(y) if y.feedback <= 0.5 else -retain_weight * y.mean for y in group]
    return sum(costs) / len(costs)


def npo(group, *, beta, retain_weight):
    def forget(y):
        return 2 / beta * math.log(1 + math.exp(y.ratio) ** beta)

    return unlearning(group, forget, retain_weight)


def gradient_ascent(group, *, retain_weight):
    return unlearning(group, lambda y: y.mean, retain_weight)


def simnpo(group, *, beta, gamma, retain_weight):
    def forget(y):
        return -2 / beta * math.log(sigmoid(-beta * y.mean - gamma))

    return unlearning(group, forget, retain_weight)


def unlearn_dpo(refusal, answer, *, beta, retain_weight):
    if answer.feedback > 0.5:
        return -retain_weight * refusal.mean
    return -2 / beta * math.log(prefers(refusal, answer, beta))


def d2o(samples, negative, *, beta, alpha):
    """From the log-ratios of K samples and of the negative."""
    mean = sum(samples) / len(samples)
    return -math.log(sigmoid(beta * mean - alpha * negative))


def longpo(c, r, *, beta, lam):
    """`ref` is log π_ref(y|x) under the short context."""
    return -lam * math.log(prefers(c, r, beta)) - c.logp / c.length


def token_constrained(logps, ref_logps, *, first, middle, late, early):
    """Mean over the tokens of one response, in order."""
    total = 0.0
    for t, (logp, ref) in enumerate(zip(logps, ref_logps, strict=True), 1):
        beta = first if t == 1 else middle if t <= early else late
        total += 2 / beta * math.log(1 + math.exp(ref - logp) ** beta)
    return total / len(logps)


# -- rollouts: token by token


def token_weights(mask, valid, reduction):
    """[B, G, T]: their sums over a prompt have the named reduction as their mean."""
    out = np.zeros(mask.shape)
    rows = np.argwhere(valid)
    tokens = sum(int(mask[b, g].sum()) for b, g in rows)
    for b, g in rows:
        each = {
            "token": 1 / tokens,
            "sequence": 1 / (len(rows) * mask[b, g].sum()),
            "constant": 1 / (len(rows) * mask.shape[-1]),
        }[reduction]
        out[b, g, mask[b, g]] = each * valid.any(-1).sum()
    return out


def reinforce(advantages, mask, valid, reduction):
    """[B, G, T]: what -Σ w A log π has as gradient by log π."""
    weights = token_weights(np.asarray(mask), np.asarray(valid), reduction)
    return -weights * np.asarray(advantages, np.float64)


def clipped(rho, advantage, low, high, cap=math.inf):
    """Gains stop growing above, losses stop shrinking below and stop growing at the cap."""
    if advantage >= 0:
        return advantage * min(rho, 1 + high)
    return advantage * min(max(rho, 1 - low), cap)


def per_token(policy, batch, reduction, cost):
    """[B]: weighted sums of cost(b, g, t) over scored tokens of valid responses."""
    mask, valid = np.asarray(batch.mask), np.asarray(batch.valid)
    weights = token_weights(mask, valid, reduction)
    out = np.zeros(len(mask))
    for b, g, t in np.argwhere(mask & valid[..., None]):
        out[b] += weights[b, g, t] * cost(b, g, t)
    return out


def log_rho(policy, batch):
    return np.asarray(policy.logps, np.float64) - np.asarray(batch.old_logps)


def policy_gradient(policy, batch, *, clip_low, clip_high, cap, reduction):
    log_ratio, a = log_rho(policy, batch), np.asarray(batch.advantages, np.float64)

    def cost(*at):
        return -clipped(math.exp(log_ratio[at]), a[at], clip_low, clip_high, cap)

    return per_token(policy, batch, reduction, cost)


def bond(policy, batch, *, gamma, clip_low, clip_high):
    """Sums over tokens; the mean over the policy's own valid responses to a prompt."""
    mask, valid = np.asarray(batch.mask), np.asarray(batch.valid)
    log_ratio, a = log_rho(policy, batch), np.asarray(batch.advantages, np.float64)
    out = np.zeros(len(mask))
    for b in range(len(mask)):
        own = [g for g in range(mask.shape[1] - 1) if valid[b, g]]
        for g in own:
            gains = [
                clipped(math.exp(log_ratio[b, g, t]), a[b, g, t], clip_low, clip_high)
                for t in np.flatnonzero(mask[b, g])
            ]
            out[b] -= gamma * sum(gains) / len(own)
        if valid[b, -1]:
            out[b] -= (1 - gamma) * sequence(policy.logps, mask, b, -1)
    return out


def kl_estimate(x, estimator):
    return x**2 / 2 if estimator == "k2" else math.exp(-x) - 1 + x


def policy_gradient_kl(
    policy, batch, *, beta, clip_low, clip_high, estimator, reduction
):
    """k3+ has the value of k3."""
    plain = dict(clip_low=clip_low, clip_high=clip_high, cap=math.inf)
    ratio = np.asarray(policy.logps, np.float64) - np.asarray(batch.ref_logps)
    kl = per_token(
        policy, batch, reduction, lambda *at: kl_estimate(ratio[at], estimator)
    )
    gain = policy_gradient(policy, batch, reduction=reduction, **plain)
    return gain + beta * kl


def gspo(policy, batch, *, clip_low, clip_high, reduction):
    log_ratio, a = log_rho(policy, batch), np.asarray(batch.advantages, np.float64)
    mask = np.asarray(batch.mask)

    def cost(b, g, t):
        scored = mask[b, g]
        s = math.exp(log_ratio[b, g, scored].mean())
        return -clipped(s, a[b, g, scored].mean(), clip_low, clip_high)

    return per_token(policy, batch, reduction, cost)


def cispo(policy, batch, *, clip_low, clip_high, reduction):
    log_ratio, a = log_rho(policy, batch), np.asarray(batch.advantages, np.float64)
    logps = np.asarray(policy.logps, np.float64)

    def cost(*at):
        weight = min(max(math.exp(log_ratio[at]), 1 - clip_low), 1 + clip_high)
        return -weight * a[at] * logps[at]

    return per_token(policy, batch, reduction, cost)


def ppo(policy, batch, *, clip, value_clip, value_weight, reduction):
    plain = dict(clip_low=clip, clip_high=clip, cap=math.inf)
    value = np.asarray(policy.state_values, np.float64)
    old, returns = (np.asarray(batch.extra[k]) for k in ("old_values", "returns"))

    def cost(*at):
        near = min(max(value[at], old[at] - value_clip), old[at] + value_clip)
        return max((value[at] - returns[at]) ** 2, (near - returns[at]) ** 2) / 2

    critic = per_token(policy, batch, reduction, cost)
    actor = policy_gradient(policy, batch, reduction=reduction, **plain)
    return actor + value_weight * critic
