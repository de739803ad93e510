"""Groups of responses for the tests of shapings: what they earned and how long they are."""

import jax
import jax.numpy as jnp
import numpy as np

from alignax.batch import Batch, from_groups

PROMPT = 2  # tokens before every response


def group(rewards, lengths=1, valid=True) -> Batch:
    """A batch of responses with these rewards [B, G]; lengths are in scored tokens."""
    rewards = np.asarray(rewards, np.float32)
    lengths = np.broadcast_to(lengths, rewards.shape)
    batch = from_groups(
        [[1] * PROMPT] * len(rewards),
        [[[2] * n for n in row] for row in lengths],
        length=PROMPT + int(lengths.max()) + 1,
        feedback=rewards,
    )
    batch = batch._replace(valid=batch.valid & valid)
    return jax.tree.map(jnp.asarray, batch)


def tokens(batch, rows):
    """[B, G, T] with these numbers [B, G, <= T] on the first tokens of each response."""
    out = np.zeros(batch.mask.shape, np.float32)
    for b, of_prompt in enumerate(rows):
        for g, row in enumerate(of_prompt):
            out[b, g, PROMPT : PROMPT + len(row)] = row
    return jnp.asarray(out)


def firsts(x) -> np.ndarray:
    """[B, G]: what the first token of each response was given."""
    return np.asarray(x)[:, :, PROMPT]
