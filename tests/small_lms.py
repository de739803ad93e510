"""Small models for guides, and what they say in float64 by the plain twins."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracles import transformer as oracle

V, P, NEW = 5, 3, 3
PROMPTS = np.array([[3, 1, 4], [2, 0, 0]])
LENGTHS = np.array([3, 1])
KEY = jax.random.key(0)


def models(tiny_config, make_lm, *names, **changes):
    """{name: LM} of one layer; the first is a bit larger than the others."""
    large = dataclasses.replace(tiny_config, vocab_size=V, num_layers=1, **changes)
    small = dataclasses.replace(large, width=8, num_heads=2, num_kv_heads=1)
    return {
        name: make_lm(small if seed else large, seed) for seed, name in enumerate(names)
    }


def run(function, *lms, **settings):
    """Of `generate` or `speculate`, on the host."""
    settings = dict(max_new=NEW, group=4) | settings
    out = function(*lms, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), KEY, **settings)
    return jax.tree.map(np.asarray, out)


def responses(out):
    """Of every prompt, its responses as tuples."""
    return [
        [tuple(t[m].tolist()) for t, m in zip(*rows, strict=True)]
        for rows in zip(out.batch.tokens, out.batch.mask, strict=True)
    ]


def steps(out):
    """(ids before it, token, log-probability under the distribution drawn from) of every token."""
    for b, g, t in zip(*out.batch.mask.nonzero(), strict=True):
        ids = out.batch.tokens[b, g]
        yield ids[:t].tolist(), int(ids[t]), float(out.batch.old_logps[b, g, t])


@functools.cache
def _hidden(config):
    with jax.enable_x64(True):
        return jax.jit(functools.partial(oracle.hidden, config))


def hidden(lm, ids):
    """After the last of these ids, float64."""
    padded = np.zeros(P + NEW, int)
    padded[: len(ids)] = ids
    with jax.enable_x64(True):
        h = _hidden(lm.config)(oracle.float64(lm.params), padded)
    return np.asarray(h)[len(ids) - 1]


def distribution(lm, ids):
    """p(. | ids)."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params)
    table = params["embed"].T if lm.config.tied else params["head"]
    return softmax(hidden(lm, ids) @ table)


def value(lm, ids):
    """What the scalar head says of these ids."""
    kernel = np.asarray(lm.params["value_head"]["kernel"], np.float64)
    return float(hidden(lm, ids) @ kernel)


def softmax(z):
    e = np.exp(z - np.max(z))
    return e / e.sum()
