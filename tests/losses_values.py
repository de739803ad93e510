"""Responses with a value at every token, and a whole world of them with exact values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from losses_compiled import graded

from alignax.batch import Scores, from_groups

V, T = 3, 4


def prompt(values, feedback, *, valid=None):
    """One prompt; `values` has a list of numbers for each response, one a token."""
    ids = [[[2] * len(row) for row in values]]
    length = max(map(len, values)) + 2
    batch = from_groups([[1]], ids, length=length, feedback=[feedback])
    filled = np.zeros(batch.mask.shape, np.float32)
    for g, row in enumerate(values):
        filled[0, g, 1 : 1 + len(row)] = row
    if valid is not None:
        batch = batch._replace(valid=np.array([valid]))
    policy = Scores(np.zeros_like(filled), values=filled)
    return jax.tree.map(jnp.asarray, (policy, batch))


def cost(loss, values, feedback, *, valid=None, **hyper):
    """What the loss of that prompt is."""
    policy, batch = prompt(values, feedback, valid=valid)
    return float(graded(loss, policy, batch, **hyper)[0][0])


def slopes(loss, values, feedback, *, valid=None, **hyper):
    """Its derivatives by the values of scored tokens, response after response."""
    policy, batch = prompt(values, feedback, valid=valid)
    grads = graded(loss, policy, batch, **hyper)[1].values
    return grads[np.asarray(batch.mask)]


class World:
    """Every response of T tokens of V, each as often as its distribution says: p has no error.

    Prefixes are tuples; a table has one number for each of those with 1 to T tokens.
    """

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.all = list(itertools.product(range(V), repeat=T))
        self.counts = dict(
            zip(self.all, rng.integers(1, 5, len(self.all)), strict=True)
        )
        self.rewards = dict(zip(self.all, rng.normal(size=len(self.all)), strict=True))
        self.prefixes = [
            s for n in range(1, T + 1) for s in itertools.product(range(V), repeat=n)
        ]

    def given(self, s):
        """(rewards, probabilities) of the responses that begin like that."""
        own = [y for y in self.all if y[: len(s)] == s]
        p = np.array([self.counts[y] for y in own], float)
        return np.array([self.rewards[y] for y in own]), p / p.sum()

    def mean(self, s):
        r, p = self.given(s)
        return float(p @ r)

    def soft(self, s, beta):
        r, p = self.given(s)
        return float(beta * np.log(p @ np.exp(r / beta)))

    def next(self, s):
        """p(. | s)."""
        p = np.array([sum(self.counts[y] for y in self.all if y[: len(s) + 1] == (*s, v))
                      for v in range(V)], float)  # fmt: skip
        return p / p.sum()

    def distribution(self):
        """p(y), in the order of `all`."""
        p = np.array([self.counts[y] for y in self.all], float)
        return p / p.sum()

    def gradient(self, loss, value, **hyper):
        """{prefix: derivative by its value} of the loss on the whole world, float64."""
        rows = [y for y in self.all for _ in range(self.counts[y])]
        batch = from_groups([[0]], [rows], length=T + 1)
        at = np.zeros(batch.mask.shape, int)
        for g, y in enumerate(rows):
            at[0, g, 1:] = [self.prefixes.index(y[:n]) for n in range(1, T + 1)]
        with jax.enable_x64(True):
            batch = jax.tree.map(jnp.asarray, batch)
            feedback = jnp.asarray([[self.rewards[y] for y in rows]], jnp.float64)
            batch = batch._replace(feedback=feedback)

            def total(table):
                values = jnp.where(batch.mask, table[at], 0.0)
                policy = Scores(jnp.zeros_like(values), values=values)
                return loss(policy, batch, **hyper)[0].sum()

            table = jnp.asarray([value(s) for s in self.prefixes], jnp.float64)
            grads = jax.jit(jax.grad(total))(table)
        return dict(zip(self.prefixes, np.asarray(grads).tolist(), strict=True))
