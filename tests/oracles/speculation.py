"""The exact distribution of speculative decoding, by enumeration of drafts and coins.

float64, dictionaries and loops. A model is a function: tuple of ids -> probabilities.
`rule(drafts, s, p, q)` yields (probability, emitted tokens) of one round.
"""

import itertools

import numpy as np


def normalised(x):
    return x / x.sum()


def stepwise(accept, residual, bonus):
    """A rule that decides token by token; the wrong ones differ in its three parts."""

    def rule(drafts, s, p, q):
        reach = 1.0
        for i, x in enumerate(drafts):
            here = (*s, *drafts[:i])
            keep = accept(here, x)
            if keep < 1:
                distribution = residual(here)
                for v, share in enumerate(distribution):
                    yield reach * (1 - keep) * share, (*drafts[:i], v)
            reach *= keep
        for v, share in enumerate(bonus((*s, *drafts))):
            yield reach * share, (*drafts, v)

    return rule


def token(p, q):
    """Leviathan et al. 2022."""
    return stepwise(
        lambda s, x: min(1.0, p(s)[x] / q(s)[x]),
        lambda s: normalised(np.maximum(p(s) - q(s), 0)),
        p,
    )


def block(drafts, s, p, q):
    """Sun et al. 2024: every outcome of every coin."""
    gamma = len(drafts)
    mass = [1.0]
    for i, x in enumerate(drafts):
        here = (*s, *drafts[:i])
        mass.append(min(1.0, mass[-1] * p(here)[x] / q(here)[x]))
    heads = [1.0]
    for i in range(1, gamma):
        here = (*s, *drafts[:i])
        a = np.maximum(mass[i] * p(here) - q(here), 0).sum()
        heads.append(a / (a + 1 - mass[i]))
    heads.append(mass[gamma])
    for coins in itertools.product([False, True], repeat=gamma):
        weight, tau = 1.0, 0
        for i, coin in enumerate(coins, 1):
            weight *= heads[i] if coin else 1 - heads[i]
            tau = i if coin else tau
        if not weight:
            continue
        here = (*s, *drafts[:tau])
        distribution = p(here)
        if tau < gamma:
            distribution = normalised(np.maximum(mass[tau] * distribution - q(here), 0))
        for v, share in enumerate(distribution):
            yield weight * share, (*drafts[:tau], v)


def rounds(rule, s, p, q, gamma):
    """(probability, emitted) of one round from prefix s, over every draft."""
    for drafts in itertools.product(range(len(q(s))), repeat=gamma):
        drawn = np.prod([q((*s, *drafts[:i]))[x] for i, x in enumerate(drafts)])
        for weight, emitted in rule(drafts, s, p, q):
            if weight:
                yield drawn * weight, emitted


def distribution(one_round, length):
    """{response of `length` tokens: probability}, of rounds until there are as many.

    Args:
      one_round: prefix -> iterable of (probability, emitted tokens).
      length: tokens; what a round emits beyond is cut.
    """
    out = {}
    front = {(): 1.0}
    while front:
        grown = {}
        for s, mass in front.items():
            for weight, emitted in one_round(s):
                new = (*s, *emitted)[:length]
                place = out if len(new) == length else grown
                place[new] = place.get(new, 0.0) + mass * weight
        front = grown
    return out


def plain(p, length):
    """The distribution of sampling token by token."""
    return distribution(
        lambda s: [(share, (v,)) for v, share in enumerate(p(s))], length
    )


def distance(a, b):
    """Total variation."""
    return 0.5 * sum(abs(a.get(y, 0) - b.get(y, 0)) for y in {*a, *b})
