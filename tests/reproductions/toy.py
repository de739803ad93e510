"""Small policies for the reproductions, trained by the project's own step and kernel."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from jaxtyping import Array, Float

from alignax import logprob, plugin
from alignax.batch import LM, Batch, Scores, from_groups
from alignax.models import sharding, transformer
from alignax.models.transformer import ModelConfig
from alignax.training import step


def over_seeds(run: Callable[[int], Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What run(0), run(1), ... return by name, on a first axis of seeds."""
    runs = [run(seed) for seed in range(report.SEEDS)]
    return {k: np.stack([one[k] for one in runs]) for k in runs[0]}


def choices(actions: Any, *, valid: Any = None) -> Batch:
    """A batch of single-token responses, [B, G] ids after a prompt of one token."""
    actions = jnp.asarray(actions, jnp.int32)
    tokens = jnp.stack([jnp.zeros_like(actions), actions], -1)
    mask = jnp.broadcast_to(jnp.asarray([False, True]), tokens.shape)
    keep = jnp.ones(actions.shape, bool) if valid is None else jnp.asarray(valid)
    lengths = jnp.full(actions.shape, 2, jnp.int32)
    return Batch(tokens, mask, lengths, jnp.zeros(actions.shape), keep)


def scores(logits: Float[Array, "B G V"], batch: Batch) -> Scores:
    """Scores of single-token responses under logits, [B, G, V]."""
    logps = logprob.token_logps(logits, batch.tokens[..., 1])
    return Scores(jnp.stack([jnp.zeros_like(logps), logps], -1))


def mean_loss(loss: Callable, policy: Scores, batch: Batch, **hyper: Any) -> Array:
    """What the step minimises: the mean over prompts."""
    return loss(policy, batch, **hyper)[0].mean()


def make(
    vocab_size: int, *, width: int = 64, num_layers: int = 2, num_heads: int = 4,
    length: int = 32, seed: int = 0,
) -> LM:  # fmt: skip
    """A fresh transformer."""
    config = ModelConfig(
        vocab_size=vocab_size, width=width, num_layers=num_layers,
        num_heads=num_heads, num_kv_heads=num_heads, head_dim=width // num_heads,
        mlp_width=2 * width, max_length=length,
    )  # fmt: skip
    return LM(config, transformer.init(config, jax.random.key(seed)))


def groups(prompts: Sequence, responses: Sequence, length: int, **more: Any) -> Batch:
    """`batch.from_groups` on the device."""
    batch = from_groups(prompts, responses, length=length, **more)
    return jax.tree.map(jnp.asarray, batch)


def take(batch: Batch, rows: Any) -> Batch:
    """Some prompts of a batch."""
    return jax.tree.map(lambda x: x[rows], batch)


@functools.cache  # a step is compiled once, however many seeds train with it
def _trainer(
    config: ModelConfig, loss: str, lr: float, b1: float, hyper: tuple, lms: tuple
):
    bound = plugin.load("losses", loss, dict(hyper))
    bound = bound._replace(needs=plugin.match_needs(bound.needs, lms))
    mesh = sharding.make_mesh((1, 1, 1))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr, b1=b1))

    def init(params):
        params = jax.tree.map(jnp.array, params)  # the step donates what it is given
        return step.init_state(params, tx, mesh, ema=bound.ema)

    return init, step.make_train_step(config, tx, bound, mesh)


def train(
    lm: LM, loss: str, batch_of: Callable[..., Batch], num_steps: int, *,
    lr: float = 3e-3, lms: dict[str, LM] | None = None, watch: Callable | None = None,
    every: int = 1, b1: float = 0.9, on_policy: bool = False, **hyper: Any,
) -> tuple[LM, list]:  # fmt: skip
    """Trains a copy of `lm` with Adam.

    Args:
      lm: where to start.
      loss: a file of alignax/losses.
      batch_of: step -> Batch, or (step, LM) -> Batch if `on_policy`; one shape, or every
        new shape compiles.
      num_steps: optimiser steps.
      lr: learning rate, constant.
      lms: frozen models by name, for what the loss needs.
      watch: called with the LM before steps 0, every, 2 every, ... and after the last.
      every: see `watch`.
      b1: Adam's first decay.
      on_policy: see `batch_of`.
      **hyper: of the loss.

    Returns:
      The trained LM, and what `watch` returned.
    """
    keys = tuple(sorted(hyper.items())), tuple(sorted(lms or {}))
    init, run = _trainer(lm.config, loss, lr, b1, *keys)
    state, seen = init(lm.params), []
    for i in range(num_steps):
        if watch is not None and i % every == 0:
            seen.append(watch(LM(lm.config, state.params)))
        now = (LM(lm.config, state.params),) if on_policy else ()
        state, _ = run(state, lms or {}, batch_of(i, *now))
    out = LM(lm.config, jax.tree.map(jnp.array, state.params))
    if watch is not None:
        seen.append(watch(out))
    return out, seen


@jax.jit
def _sequence_logps(lm: LM, batch: Batch) -> Array:
    return logprob.score(lm, batch).logps


def logps(lm: LM, batch: Batch) -> np.ndarray:
    """Log-probabilities of a batch's scored tokens, [B, G, T] nats."""
    return np.asarray(_sequence_logps(lm, batch))


def annotated(lm: LM, batch: Batch) -> Batch:
    """The batch with `ref_logps` under a frozen LM."""
    return batch._replace(ref_logps=jnp.asarray(logps(lm, batch)))


@jax.jit
def next_laws(lm: LM, tokens: Array) -> Array:
    """log p(v | tokens[..=t]) for every position, [N, T, V] nats; T and V are small."""
    h, _ = transformer.hidden(lm, tokens)
    return logprob.rows(lm, h)
