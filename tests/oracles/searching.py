"""What tests of searches share: exact distributions of tiny models, and counts against them."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from alignax.batch import LM
from alignax.models import transformer
from oracles import decoding
from oracles import transformer as oracle


def twin(lm, length=16):
    """ids -> float64 logits of the next token by the plain twin, each prefix once."""
    with jax.enable_x64(True):
        params = oracle.float64(lm.params)
        run = jax.jit(lambda ids: oracle.logits(lm.config, params, ids))
    seen = {}

    def next_logits(ids):
        ids = tuple(map(int, ids))
        if ids not in seen:
            padded = np.zeros(length, int)
            padded[: len(ids)] = ids
            with jax.enable_x64(True):
                rows = np.asarray(run(padded))
            for n in range(1, len(ids) + 1):
                seen[ids[:n]] = rows[n - 1]
        return seen[ids]

    return next_logits


def constant(config, distribution):
    """An LM whose next token has this distribution after any prefix: every weight 0 but two."""
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    params["embed"] = jnp.ones_like(params["embed"])
    params["norm"]["scale"] = jnp.ones_like(params["norm"]["scale"])
    logits = jnp.log(jnp.asarray(distribution)) / config.width
    params["head"] = jnp.tile(logits, (config.width, 1))
    return LM(config, params)


def distribution(next_logits, prompt, **settings):
    """{response: probability}; `oracles.decoding.distribution` with numpy prompts."""
    return decoding.distribution(next_logits, [int(x) for x in prompt], **settings)


def best(distribution, score, n):
    """The distribution of the best of n by `score`, with ties shared by the distribution itself."""
    out = {}
    for y, mass in distribution.items():
        below = sum(m for z, m in distribution.items() if score(z) < score(y))
        upto = below + sum(m for z, m in distribution.items() if score(z) == score(y))
        out[y] = mass * (upto**n - below**n) / (upto - below)
    return out


def rows(batch):
    """[B][G] tuples of the ids of the responses."""
    pairs = zip(np.asarray(batch.tokens), np.asarray(batch.mask), strict=True)
    return [
        [tuple(t[m].tolist()) for t, m in zip(*group, strict=True)] for group in pairs
    ]


def responses(out):
    """The first response to every prompt."""
    return [group[0] for group in rows(out.batch)]


def by_response(score):
    """A judge from a function of the response's ids; it shrugs at what is not valid."""

    def judge(batch):
        asked = zip(rows(batch), np.asarray(batch.valid), strict=True)
        return np.array(
            [
                [score(y) if valid else -7.0 for y, valid in zip(*row, strict=True)]
                for row in asked
            ]
        )

    return judge


def surprise(samples, distribution):
    """χ² of samples against a distribution, in standard deviations above its mean.

    Responses that are expected less than five times share a cell.
    """
    counts = collections.Counter(samples)
    assert set(counts) <= set(distribution), "a response that cannot be"
    total = sum(counts.values())
    expected = {y: total * mass for y, mass in distribution.items()}
    assert abs(sum(distribution.values()) - 1) < 1e-9
    rare = [y for y, e in expected.items() if e < 5]
    cells = [(counts[y], e) for y, e in expected.items() if e >= 5]
    if rare:
        cells.append((sum(counts[y] for y in rare), sum(expected[y] for y in rare)))
    dof = len(cells) - 1
    chi2 = sum((c - e) ** 2 / e for c, e in cells if e > 0)
    return (chi2 - dof) / np.sqrt(2 * dof)


def distance(p, q):
    """Total variation."""
    return sum(abs(p.get(y, 0) - q.get(y, 0)) for y in {*p, *q}) / 2
