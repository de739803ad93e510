"""Scoring and sampling with the rows of a batch spread over the mesh, for every host."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignax import decode, logprob, sharding, tokenizer


def scorer(mesh: Mesh) -> Callable:
    """score(lm, batch, needs, ...) -> Scores on the host; every host holds the batch."""
    rows = NamedSharding(mesh, sharding.BATCH)

    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def score(lm, batch, needs=(), **more):
        many = len(batch.tokens)
        # copies of the first row fill up what does not divide; they are cut off again
        at = np.r_[:many, np.zeros(-many % shards, int)]
        batch = jax.device_put(jax.tree.map(lambda x: np.asarray(x)[at], batch), rows)
        out = jax.device_get(compiled_score(mesh, tuple(needs))(lm, batch, **more))
        return jax.tree.map(lambda x: x[:many], out)

    return score


@functools.cache
def compiled_score(mesh: Mesh, needs: tuple[str, ...]) -> Callable:
    """score(lm, batch) of batches that are spread over the mesh, for every host."""
    whole = NamedSharding(mesh, P())  # every host reads the result
    score = functools.partial(logprob.score, mesh=mesh, needs=needs)
    return jax.jit(score, out_shardings=whole)


def generator(text: tokenizer.Tokenizer, mesh: Mesh) -> Callable:
    """decode.generate that ends at the tokenizer's EOS, prompts spread over the mesh."""
    eos_ids = sorted(text.eos_ids)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def generate(lm, prompts, lengths, key, **settings):
        spec = P() if len(prompts) % shards else sharding.BATCH
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
        prompts, lengths = place(np.asarray(prompts)), place(np.asarray(lengths))
        out = decode.generate(lm, prompts, lengths, key, eos_ids=eos_ids, **settings)
        if jax.process_count() > 1:
            out = multihost_utils.process_allgather(out, tiled=True)
        return out

    return generate
