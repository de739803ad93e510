"""One compiled program for each loss: values and gradient, with numbers as arguments."""

import functools

import jax
import numpy as np


@functools.cache
def _program(loss, choices):
    def total(policy, batch, numbers):
        values = loss(policy, batch, **dict(choices), **numbers)[0]
        return values.sum(), values

    return jax.jit(jax.grad(total, has_aux=True))


def graded(loss, policy, batch, **hyper):
    """(values [B], the gradient of their sum as Scores), on the host."""
    kinds = (str, bool, int, type(None))
    choices = {k: v for k, v in hyper.items() if type(v) in kinds}
    numbers = {k: v for k, v in hyper.items() if k not in choices}
    grads, values = _program(loss, frozenset(choices.items()))(policy, batch, numbers)
    return jax.tree.map(np.asarray, (values, grads))
