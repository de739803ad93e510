"""One optimiser step: the state it changes and the jitted function that changes it.

batch -> annotate (frozen LMs) -> score (policy) -> loss -> mean -> gradient -> update
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from alignax import logprob
from alignax.batch import LM, Batch, Metrics, Params
from alignax.inputs.annotate import annotate, unfilled
from alignax.models import sharding
from alignax.models.transformer import ModelConfig
from alignax.plugin import Bound, bind
from alignax.training.gradient import Objective, gradient, join, split
from alignax.training.optim import moved

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

        An integer stays one: another type would be another program.

        Raises:
          ValueError: a name that is no numeric hyper-parameter of the loss; a fraction
            where the loss has an integer.
        """
        if unknown := sorted(numbers.keys() - self.hyper.keys()):
            raise ValueError(
                f"the loss has no number {unknown}; it has {sorted(self.hyper)}"
            )
        for k, v in numbers.items():
            if self.hyper[k].dtype == np.int32 and v != int(v):
                raise ValueError(f"the loss has an integer for {k}, not {v}")
        placed = {
            k: jax.device_put(
                np.asarray(v, self.hyper[k].dtype), self.hyper[k].sharding
            )
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
    ema: Mapping[str, float] | None = None, average: bool = False, donate: bool = False,
) -> TrainState:  # fmt: skip
    """A state at step 0, placed on the mesh by the rule table.

    Args:
      params: the policy's parameters, on host or device; they are copied, unless
        they are donated.
      tx: the optimiser.
      mesh: from `sharding.make_mesh`.
      ema: initial values of the running means a loss declares.
      average: keep an exponential average of the parameters, in float32.
      donate: take the memory of `params`, as `sharding.put_params` does.
    """
    params = sharding.put_params(params, mesh, donate=donate)
    shapes = jax.eval_shape(tx.init, params)
    opt_state = jax.jit(tx.init, out_shardings=sharding.shardings(shapes, mesh))(params)
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
    means = {k: place(jnp.float32(v)) for k, v in (ema or {}).items()}
    copy = sharding.put_params(params, mesh, jnp.float32) if average else None
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
    temperature: float = 1.0,
    grammar: Bool[Array, "S V"] | Bool[np.ndarray, "S V"] | None = None,
    length: int = 0,
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
      average: decay of the parameters' exponential average (read if the state has one);
        at 0 it is a copy of the parameters, made every `average_every` steps.
      average_every: steps between two updates of that average.
      moving: names of frozen LMs that are the average of the policy instead.
      assemble: (what is trained, frozen LMs) -> the policy; by default the parameters
        are the policy's own, with adapters they are attached to a frozen base.
      temperature: at which the policy and the frozen LMs are scored.
      grammar: under which they are, as in `logprob.score`; a constant of the program.
      length: tokens of a row that the reduction 'constant' divides by, whatever the T of
        a batch; 0 divides by T.

    Returns:
      A TrainStep.
    """
    if not isinstance(loss, Bound):
        loss = bind(loss)
    numbers = {k: v for k, v in loss.hyper.items() if type(v) in (int, float)}
    objective = Objective(
        loss, {k: v for k, v in loss.hyper.items() if k not in numbers},
        functools.partial(
            logprob.score, mesh=mesh, temperature=temperature, grammar=grammar
        ),
        assemble or (lambda params, lms: LM(config, params)), accumulate,
        1 if mesh is None else sharding.num_shards(mesh), length,
    )  # fmt: skip
    plan = _Plan(objective, tx, average, average_every, moving)
    whole = None if mesh is None else NamedSharding(mesh, P())
    hyper = {
        k: jax.device_put(np.float32(v) if type(v) is float else np.int32(v), whole)
        for k, v in numbers.items()
    }

    @functools.cache
    def program(leaves: tuple, tree: Any) -> Any:
        # The state keeps its shardings: left to itself, XLA may pick others and the next
        # call would compile again.
        out = (jax.tree.unflatten(tree, leaves), None)
        step = functools.partial(update, plan)
        return jax.jit(step, donate_argnums=0, out_shardings=out)

    def jitted(state: TrainState) -> Any:
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state))
        return program(tuple(leaves), tree)

    rows = None if mesh is None else NamedSharding(mesh, sharding.BATCH)
    filled = jax.jit(functools.partial(fill, plan), out_shardings=rows)
    return TrainStep(filled, jitted, hyper, loss.needs)


class _Plan(NamedTuple):
    """What a step does; fixed when it is compiled."""

    objective: Objective
    tx: optax.GradientTransformation
    average: float  # decay of the average of the parameters
    average_every: int  # steps
    moving: tuple[str, ...]  # names of LMs that are that average


def update(
    plan: _Plan, state: TrainState, lms: Mapping[str, LM], batch: Batch,
    hyper: Mapping[str, Array],
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """One optimiser step: gradient, optimiser, running means, average."""
    lms = with_average(lms, plan.moving, plan.objective.assemble, state.average)
    value, metrics, grads = gradient(
        plan.objective, state.params, lms, batch, state.ema, hyper
    )
    updates, opt_state = plan.tx.update(grads, state.opt_state, state.params)
    params = moved(state.params, updates, state.step)
    ema = {
        k: EMA_DECAY * v + (1 - EMA_DECAY) * metrics[f"ema/{k}"]
        for k, v in state.ema.items()
    }
    mean = state.average
    if mean is not None:
        due = (state.step + 1) % plan.average_every == 0
        decay, wide = plan.average, optax.tree.cast(params, jnp.float32)
        mean = jax.tree.map(
            lambda a, p: jnp.where(due, decay * a + (1 - decay) * p, a), mean, wide
        )
    metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state, ema, mean), metrics


def fill(
    plan: _Plan, average: Params | None, lms: Mapping[str, LM], batch: Batch
) -> Batch:
    """The batch with the columns that frozen LMs fill, by micro-batches."""
    objective = plan.objective
    lms = with_average(lms, plan.moving, objective.assemble, average)
    needs = objective.loss.needs
    one = functools.partial(annotate, lms=lms, needs=needs, score=objective.score)
    if objective.accumulate == 1:
        return one(batch)
    parts = jax.lax.map(one, jax.tree.map(functools.partial(split, objective), batch))
    return jax.tree.map(functools.partial(join, objective), parts)


def with_average(
    lms: Mapping[str, LM],
    moving: Sequence[str],
    assemble: Callable[..., LM],
    average: Any,
) -> Mapping[str, LM]:
    """The frozen LMs, with the average of the policy under the names that mean it.

    Args:
      lms: frozen LMs by name.
      moving: names that mean the average; it is not read where there are none.
      assemble: (trained parameters, frozen LMs) -> the policy.
      average: of what is trained.
    """
    if not moving:
        return lms
    return {**lms, **dict.fromkeys(moving, assemble(average, lms))}
