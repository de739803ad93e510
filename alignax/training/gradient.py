"""The gradient of one optimiser step; gradient accumulation is here.

  separable loss   for every micro-batch: score, loss, gradient; the gradients are added
  coupled loss     score every micro-batch; differentiate the loss once, on the Scores of
                   all of them; pull the cotangent back through every micro-batch

Both give the gradient of the whole batch: k micro-batches of b prompts equal one batch of
k b prompts up to rounding, whatever the mesh.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import LM, Batch, Metrics, Params, Scores
from alignax.plugin import Bound


class Objective(NamedTuple):
    """What is differentiated. Everything in it is fixed when a step is compiled.

    Attributes:
      loss: bound; its numeric hyper-parameters are handed in at every step.
      fixed: its other hyper-parameters.
      score: `logprob.score` with the mesh bound.
      assemble: (trained parameters, frozen LMs) -> the policy.
      accumulate: micro-batches per step.
      shards: of the batch over the mesh.
      length: tokens that the reduction 'constant' divides by, 0 for T.
    """

    loss: Bound
    fixed: Mapping[str, Any]
    score: Callable[..., Scores]
    assemble: Callable[[Params, Mapping[str, LM]], LM]
    accumulate: int = 1
    shards: int = 1
    length: int = 0


def gradient(
    objective: Objective, params: Params, lms: Mapping[str, LM], batch: Batch,
    ema: Mapping[str, Array], hyper: Mapping[str, Array],
) -> tuple[Float[Array, ""], Metrics, Params]:  # fmt: skip
    """The loss, its metrics and its gradient: means over the prompts of the whole step.

    Args:
      objective: what is differentiated.
      params: what is trained.
      lms: frozen LMs by name.
      batch: [B, G, T], whose columns of frozen LMs are filled.
      ema: running means that the loss asks for.
      hyper: numeric hyper-parameters of the loss.

    Returns:
      (loss, metrics, gradient). Prompts without a valid response do not count.
    """
    count = jnp.maximum(masked.prompts(batch).sum(), 1)
    loss = objective.loss
    if mode := loss.hyper.get("reduction"):  # weights know the whole step
        weights = masked.token_weights(batch, mode, length=objective.length)
        extra = {**(batch.extra or {}), "token_weights": weights}
        batch = batch._replace(extra=extra)

    def forward(params: Params, part: Batch) -> Scores:
        policy = objective.assemble(params, lms)
        needs = objective.loss.needs
        return objective.score(policy, part, needs=needs, kl_to=lms.get("ref"))

    def share(params: Params, part: Batch) -> tuple[Array, Metrics]:
        """What a part of the batch adds to the loss, and sums of its metrics."""
        scores = forward(params, part)
        value, metrics = loss_sums(objective, scores, part, ema, hyper)
        return value / count, metrics

    if objective.accumulate == 1:
        of_batch = jax.value_and_grad(share, has_aux=True)
        (value, metrics), grads = of_batch(params, batch)
        return value, {k: v / count for k, v in metrics.items()}, grads

    parts = jax.tree.map(lambda x: split(objective, x), batch)
    if not loss.coupled:

        def separable(part: Batch) -> tuple[Params, Array, Metrics]:
            of_part = jax.value_and_grad(share, has_aux=True)
            (value, metrics), grads = of_part(params, part)
            return grads, value, metrics

        grads, value, metrics = add_up(separable, parts)
        return value, {k: v / count for k, v in metrics.items()}, grads

    scores = jax.lax.map(lambda part: forward(params, part), parts)
    whole = jax.tree.map(lambda x: join(objective, x), scores)
    of_scores = jax.value_and_grad(
        lambda scores: loss_sums(objective, scores, batch, ema, hyper), has_aux=True
    )
    (value, metrics), cotangent = of_scores(whole)
    cotangents = jax.tree.map(lambda x: split(objective, x / count), cotangent)

    def pull_back(part: tuple[Batch, Scores]) -> Params:
        rows, cotangent = part
        return jax.vjp(lambda p: forward(p, rows), params)[1](cotangent)[0]

    grads = add_up(pull_back, (parts, cotangents))
    return value / count, {k: v / count for k, v in metrics.items()}, grads


def loss_sums(
    objective: Objective, scores: Scores, batch: Batch, ema: Mapping[str, Array],
    hyper: Mapping[str, Array],
) -> tuple[Float[Array, ""], Metrics]:  # fmt: skip
    """Sums of the loss and of its metrics over prompts that have a valid response."""
    loss = objective.loss
    given = {"ema": ema} if loss.ema else {}
    values, metrics = loss.function(scores, batch, **objective.fixed, **hyper, **given)
    metrics = {**metrics, **sampler_gap(scores, batch)}
    keep = masked.prompts(batch)
    total = {k: jnp.where(keep, v, 0.0).sum() for k, v in metrics.items()}
    return jnp.where(keep, values, 0.0).sum(), total


def sampler_gap(scores: Scores, batch: Batch) -> Metrics:
    """Nats per token between the sampler and the kernel, of fresh responses.

    Rollouts report it of other responses: those are scored when they are drawn.
    """
    if batch.old_logps is not None or "sampler_logps" not in (batch.extra or {}):
        return {}
    assert batch.extra is not None
    gap = jnp.abs(jax.lax.stop_gradient(scores.logps) - batch.extra["sampler_logps"])
    return {"rollout/logp_gap": masked.per_prompt(gap, masked.scored(batch))}


def add_up(function: Callable[[Any], Any], parts: Any) -> Any:
    """The sum of function(part) over micro-batches, one after another, in float32."""

    def body(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes
    )
    return jax.lax.scan(body, zeros, parts)[0]


def split(objective: Objective, x: Array) -> Array:
    """Rows [B, ...] as micro-batches [k, B / k, ...].

    The rows of a shard are cut in order: every micro-batch stays spread over the mesh,
    and what belongs together (the blocks of a layout, the prompts in them) meets.
    """
    x = x.reshape(objective.shards, objective.accumulate, -1, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0).reshape(objective.accumulate, -1, *x.shape[3:])


def join(objective: Objective, x: Array) -> Array:
    """The inverse of `split`."""
    x = x.reshape(objective.accumulate, objective.shards, -1, *x.shape[2:])
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])
