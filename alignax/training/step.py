"""One optimiser step: the state it changes and the jitted function that changes it.

batch -> annotate (frozen LMs) -> score (policy) -> loss -> mean -> gradient -> update
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from alignax import logprob, masked
from alignax.batch import LM, Batch, Metrics, Params
from alignax.inputs.source import annotate, unfilled
from alignax.models import sharding
from alignax.models.transformer import ModelConfig
from alignax.plugin import Bound, bind

EMA_DECAY = 0.99  # of the running means that a loss asks for


class TrainState(NamedTuple):
    """Everything that a step changes; all of it is checkpointed."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ema: dict[str, Float[Array, ""]]  # running means a loss asks for
    average: Params | None = None  # exponential average of the parameters, if asked for


class TrainStep(NamedTuple):
    """step(state, lms, batch) -> (state, metrics). The state is donated.

    Frozen LMs are read by a program of their own, so that a batch that brings their
    columns along (from a cache) takes the very step that it takes without.
    """

    fill: Callable[[Any, dict[str, LM], Batch], Batch]  # jitted: what frozen LMs say
    program: Callable[[TrainState], Any]  # the jitted function for a state's shardings
    hyper: dict[str, Array]  # numeric hyper-parameters of the loss: traced scalars
    needs: tuple[str, ...]  # of the loss

    def __call__(
        self, state: TrainState, lms: dict[str, LM], batch: Batch
    ) -> tuple[TrainState, Metrics]:
        if unfilled(batch, self.needs):
            batch = self.fill(state.average, lms, batch)
        return self.program(state)(state, lms, batch, self.hyper)

    def with_hyper(self, **numbers: float) -> "TrainStep":
        """The same compiled program with other hyper-parameters: for sweeps.

        Raises:
          ValueError: a name that is no numeric hyper-parameter of the loss.
        """
        if unknown := sorted(numbers.keys() - self.hyper.keys()):
            raise ValueError(
                f"the loss has no number {unknown}; it has {sorted(self.hyper)}"
            )
        placed = {
            k: jax.device_put(jnp.asarray(v, jnp.float32), self.hyper[k].sharding)
            for k, v in numbers.items()
        }
        return self._replace(hyper={**self.hyper, **placed})

    def lower(self, state: TrainState, lms: dict[str, LM], batch: Batch) -> Any:
        """The lowered program, for inspection; nothing runs."""
        batch = jax.eval_shape(self.fill, state.average, lms, batch)
        return self.program(state).lower(state, lms, batch, self.hyper)

    def compilations(self, state: TrainState) -> int:
        """How many programs jit's fast path holds: 1 a shape; 0 once it was evicted."""
        return self.program(state)._cache_size()


def init_state(
    params: Params, tx: optax.GradientTransformation, mesh: Mesh, *,
    ema: Mapping[str, float] | None = None, average: bool = False,
) -> TrainState:  # fmt: skip
    """A state at step 0, placed on the mesh by the rule table.

    Args:
      params: the policy's parameters, on host or device; they are copied.
      tx: the optimiser.
      mesh: from `sharding.make_mesh`.
      ema: initial values of the running means a loss declares.
      average: keep an exponential average of the parameters.
    """
    params = sharding.put_params(params, mesh)
    shapes = jax.eval_shape(tx.init, params)
    opt_state = jax.jit(tx.init, out_shardings=sharding.shardings(shapes, mesh))(params)
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
    means = {k: place(jnp.float32(v)) for k, v in (ema or {}).items()}
    copy = sharding.put_params(params, mesh) if average else None
    return TrainState(place(jnp.int32(0)), params, opt_state, means, copy)


def make_train_step(
    config: ModelConfig,
    tx: optax.GradientTransformation,
    loss: Bound | Callable,
    mesh: Mesh | None,
    *,
    accumulate: int = 1,
    average: float = 0.0,
    average_every: int = 1,
    moving: tuple[str, ...] = (),
    assemble: Callable[[Params, Mapping[str, LM]], LM] | None = None,
) -> TrainStep:
    """Builds the jitted optimiser step. The state it is given is donated.

    Numeric hyper-parameters of the loss enter as traced scalars: a sweep over them
    lowers to the same program.

    Args:
      config: of the policy.
      tx: the optimiser.
      loss: from `plugin.load`, or any function `loss(policy, batch)`.
      mesh: devices; None is one device.
      accumulate: micro-batches per step; the gradient is that of the whole batch.
      average: decay of the parameters' exponential average, 0 for none.
      average_every: steps between two updates of that average.
      moving: names of frozen LMs that are the average of the policy instead.
      assemble: (what is trained, frozen LMs) -> the policy; by default the parameters
        are the policy's own, with adapters they are attached to a frozen base.

    Returns:
      A TrainStep.
    """
    if assemble is None:

        def assemble(params, lms):
            return LM(config, params)

    if not isinstance(loss, Bound):
        loss = bind(loss)
    score = functools.partial(logprob.score, mesh=mesh)
    numbers = {k: v for k, v in loss.hyper.items() if type(v) in (int, float)}
    fixed = {k: v for k, v in loss.hyper.items() if k not in numbers}
    hyper = {
        k: np.float32(v) if type(v) is float else np.int32(v)
        for k, v in numbers.items()
    }

    def evaluate_loss(scores, batch, ema, hyper):
        """Sums over prompts with a valid response: (loss, {name: sum})."""
        given = {"ema": ema} if loss.ema else {}
        values, metrics = loss.function(scores, batch, **fixed, **hyper, **given)
        keep = masked.prompts(batch)
        total = {k: jnp.where(keep, v, 0.0).sum() for k, v in metrics.items()}
        return jnp.where(keep, values, 0.0).sum(), total

    def gradient(params, lms, batch, ema, hyper):
        """(loss, metrics), gradient: means over the whole step's prompts."""
        count = jnp.maximum(masked.prompts(batch).sum(), 1)

        def forward(params, part):
            policy = assemble(params, lms)
            return score(policy, part, needs=loss.needs, kl_to=lms.get("ref"))

        def direct(params, part):
            value, metrics = evaluate_loss(forward(params, part), part, ema, hyper)
            return value / count, metrics

        if accumulate == 1:
            (value, metrics), grads = jax.value_and_grad(direct, has_aux=True)(
                params, batch
            )
            return value, {k: v / count for k, v in metrics.items()}, grads

        if "reduction" in loss.hyper:  # weights know the whole step, not a micro-batch
            weights = masked.token_weights(batch, loss.hyper["reduction"])
            batch = batch._replace(
                extra={**(batch.extra or {}), "token_weights": weights}
            )
        parts = jax.tree.map(split, batch)
        if loss.coupled:
            scores = jax.lax.map(lambda part: forward(params, part), parts)
            whole = jax.tree.map(join, scores)
            (value, metrics), cotangent = jax.value_and_grad(
                evaluate_loss, has_aux=True
            )(whole, batch, ema, hyper)
            value = value / count
            cotangents = jax.tree.map(lambda x: split(x / count), cotangent)

            def one(part):
                part, cotangent = part
                return (
                    jax.vjp(lambda p: forward(p, part), params)[1](cotangent)[0],
                    0.0,
                    {},
                )

            parts = (parts, cotangents)
        else:

            def one(part):
                (value, metrics), grads = jax.value_and_grad(direct, has_aux=True)(
                    params, part
                )
                return grads, value, metrics

        def body(total, part):
            return jax.tree.map(jnp.add, total, one(part)), None

        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first)
        )
        (grads, *sums), _ = jax.lax.scan(body, zeros, parts)
        if not loss.coupled:
            value, metrics = sums
        return value, {k: v / count for k, v in metrics.items()}, grads

    shards = 1 if mesh is None else sharding.num_shards(mesh)

    def split(x):
        # A shard's rows are cut in order: every micro-batch stays spread over the mesh,
        # and what belongs together (the blocks of a layout, the prompts in them) meets.
        x = x.reshape(shards, accumulate, -1, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(accumulate, -1, *x.shape[3:])

    def join(x):
        x = x.reshape(accumulate, shards, -1, *x.shape[2:])
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])

    def frozen(average, lms):
        if not moving:
            return lms
        return {**lms, **dict.fromkeys(moving, assemble(average, lms))}

    def fill(average, lms, batch: Batch) -> Batch:
        one = functools.partial(
            annotate, lms=frozen(average, lms), needs=loss.needs, score=score
        )
        if accumulate == 1:
            return one(batch)
        parts = jax.lax.map(one, jax.tree.map(split, batch))
        return jax.tree.map(join, parts)

    def update(state: TrainState, lms, batch: Batch, hyper):
        lms = frozen(state.average, lms)
        value, metrics, grads = gradient(state.params, lms, batch, state.ema, hyper)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = {
            k: EMA_DECAY * v + (1 - EMA_DECAY) * metrics[f"ema/{k}"]
            for k, v in state.ema.items()
        }
        mean = state.average
        if mean is not None:
            due = (state.step + 1) % average_every == 0
            mean = jax.tree.map(
                lambda a, p: jnp.where(due, average * a + (1 - average) * p, a),
                mean, params,
            )  # fmt: skip
        metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, ema, mean), metrics

    def place(x):
        return jax.device_put(x, None if mesh is None else NamedSharding(mesh, P()))

    hyper = jax.tree.map(place, hyper)

    @functools.cache
    def program(shardings):
        # The state keeps its shardings: left to itself, XLA may pick others and the next
        # call would compile again.
        leaves, tree = shardings
        out = (jax.tree.unflatten(tree, leaves), None)
        return jax.jit(update, donate_argnums=0, out_shardings=out)

    def jitted(state):
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state))
        return program((tuple(leaves), tree))

    rows = None if mesh is None else NamedSharding(mesh, sharding.BATCH)
    return TrainStep(jax.jit(fill, out_shardings=rows), jitted, hyper, loss.needs)
