"""Scoring and sampling with the rows of a batch spread over the mesh, for every host."""

import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignax import logprob
from alignax.batch import LM
from alignax.inputs import layout
from alignax.models import sharding, transformer
from alignax.runs.preemption import drop_if_asked
from alignax.sampling import decode
from alignax.text import tokenizer


def scorer(mesh: Mesh, *, packed: bool = False) -> Callable:
    """score(lm, batch, needs, ...) -> Scores on the host; every host holds the batch.

    Args:
      mesh: devices over which a batch is spread.
      packed: lay rows out anew, so that what responses share is computed once.
    """
    rows = NamedSharding(mesh, sharding.BATCH)
    shards = sharding.num_shards(mesh)

    def score(lm, batch, needs=(), temperature=1.0, **more):
        drop_if_asked()
        many = len(batch.tokens)
        for reader in (lm, more.get("kl_to")):
            if reader is not None:
                logprob.check_ids(reader, batch)
        # copies of the first row fill up what does not divide; they are cut off again
        at = np.r_[:many, np.zeros(-many % shards, int)]
        batch = batch._replace(layout=None)  # of other shards, if there is one
        batch = jax.tree.map(lambda x: np.asarray(x)[at], batch)
        if packed:
            batch, _ = layout.lay(batch, shards=shards)
        batch = jax.device_put(batch, rows)
        run = compiled_score(mesh, tuple(needs), temperature)
        out = jax.device_get(run(lm, batch, **more))
        return jax.tree.map(lambda x: x[:many], out)

    return score


@functools.cache
def compiled_score(
    mesh: Mesh, needs: tuple[str, ...], temperature: float = 1.0
) -> Callable:
    """score(lm, batch) of batches that are spread over the mesh, for every host."""
    whole = NamedSharding(mesh, P())  # every host reads the result
    score = functools.partial(
        logprob.score, mesh=mesh, needs=needs, temperature=temperature
    )
    return jax.jit(score, out_shardings=whole)


def known(ids: Iterable[int], lm: LM) -> list[int]:
    """Those of the ids that an LM decodes, in order."""
    return sorted(i for i in ids if i < lm.config.vocab_size)


def generator(
    text: tokenizer.Tokenizer, mesh: Mesh, tables: Callable[[int], dict] | None = None
) -> Callable:
    """decode.generate of the tokenizer's ids and EOS, prompts spread over the mesh.

    Args:
      text: the tokenizer.
      mesh: devices.
      tables: V -> the keywords 'stops' and 'grammar' of `generate`, over V tokens.
    """
    shards = sharding.num_shards(mesh)

    def generate(lm, prompts, lengths, key, **settings):
        drop_if_asked()
        lm = transformer.limit_ids(lm, text.vocab_size)
        eos_ids = known(text.eos_ids, lm)
        settings |= tables(lm.config.vocab_size) if tables else {}
        spec = P() if len(prompts) % shards else sharding.BATCH
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
        prompts, lengths = place(np.asarray(prompts)), place(np.asarray(lengths))
        out = decode.generate(lm, prompts, lengths, key, eos_ids=eos_ids, **settings)
        if jax.process_count() > 1:
            out = multihost_utils.process_allgather(out, tiled=True)
        return out

    return generate
