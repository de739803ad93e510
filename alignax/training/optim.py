"""Optimisers and schedules: names from a config to an optax transformation.

Parameters in bfloat16 have 8 bits of precision: at usual learning rates the nearest value
to a moved parameter is mostly the parameter itself. So steps are computed in float32, and
a moved parameter is rounded up or down at random, with its own value as the mean.

Source of stochastic rounding in this place: Zamirai et al. 2020,
https://arxiv.org/abs/2010.06192
"""

import itertools

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, BFloat16, Float, Int

from alignax.batch import Params
from alignax.models.sharding import path_string
from alignax.runs.workdirs import OWN_B2

SCHEDULES = ("constant", "linear", "cosine")
# of config.optim: the schedule's own
RATE = ("lr", "schedule", "schedule_steps", "warmup", "final", "critic_lr")


def schedule(
    lr: float,
    num_steps: int,
    *,
    kind: str = "cosine",
    warmup: int = 0,
    final: float = 0.1,
):
    """Learning rate by step: linear warm-up to `lr`, then `kind` down to `final * lr`.

    Args:
      lr: peak rate.
      num_steps: optimiser steps until the last rate, which stays after them.
      kind: one of SCHEDULES.
      warmup: steps of linear warm-up.
      final: last rate as a share of the peak, in [0, 1].
    """
    rest = max(num_steps - warmup, 1)
    if kind == "constant":
        after = optax.constant_schedule(lr)
    elif kind == "linear":
        after = optax.linear_schedule(lr, final * lr, rest)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(lr, rest, alpha=final)
    else:
        raise ValueError(f"unknown schedule {kind!r}; known: {', '.join(SCHEDULES)}")
    if not warmup:
        return after
    # step 0 already moves: lr/warmup, not 0
    rise = optax.linear_schedule(lr / warmup, lr, warmup - 1 or 1)
    return optax.join_schedules([rise, after], [warmup])


def decayed(params):
    """True on matrices and embeddings; norms, biases and DoRA's magnitudes are not decayed."""

    def one(path, _):
        return not path_string(path).endswith(("scale", "bias", "magnitude"))

    return jax.tree_util.tree_map_with_path(one, params)


def make_tx(
    rate, *, name: str = "adamw", clip: float = 1.0, weight_decay: float = 0.0,
    b1: float = 0.9, b2: float = 0.0, critic: float = 1.0,
) -> optax.GradientTransformation:  # fmt: skip
    """Global-norm clipping (clip > 0), then the named optimiser.

    Args:
      rate: a number or a schedule.
      name: 'adamw', 'adafactor', 'lion' or 'muon'.
      clip: largest global gradient norm; 0 does not clip.
      weight_decay: decoupled, on matrices only.
      b1, b2: decay of the first and second moments (Adafactor has its own). A b2 of 0 is
        the optimiser's own, in OWN_B2. Muon's matrices have its default momentum instead.
      critic: the rate of the value head, in multiples of the others'.

    Raises:
      ValueError: unknown name.
    """
    b2 = b2 or OWN_B2.get(name, 0.0)
    makers = {
        "adamw": lambda: optax.adamw(rate, b1, b2, weight_decay=weight_decay, mask=decayed),
        "lion": lambda: optax.lion(rate, b1, b2, weight_decay=weight_decay, mask=decayed),
        # not optax.adafactor: its decay is not scaled by the learning rate, and its rate is
        # relative to a parameter's size, which no other optimiser's here is
        "adafactor": lambda: optax.chain(
            _clipped_rms(),
            optax.add_decayed_weights(weight_decay, decayed),
            optax.scale_by_learning_rate(rate),
        ),
        # matrices' updates have AdamW's root mean square (.2), so that one rate serves both
        "muon": lambda: optax.contrib.muon(
            rate, weight_decay=weight_decay, weight_decay_mask=decayed,
            adam_b1=b1, adam_b2=b2, adam_weight_decay=0.0, consistent_rms=0.2,
            muon_weight_dimension_numbers=matrices,
        ),
    }  # fmt: skip
    if name not in makers:
        raise ValueError(f"unknown optimiser {name!r}; known: {', '.join(makers)}")
    clipping = optax.clip_by_global_norm(clip) if clip else optax.identity()
    own = [] if critic == 1 else [optax.masked(optax.scale(critic), of_critic)]
    # an average with a slower decay would not reach its values in bfloat16
    quick = {"adamw": b1, "muon": max(b1, 0.95)}.get(name, 1.0) <= 0.95
    return in_float32(optax.chain(clipping, makers[name](), *own), narrow=quick)


def in_float32(
    tx: optax.GradientTransformation, *, narrow: bool
) -> optax.GradientTransformation:
    """The same optimiser, which computes in float32 whatever the parameters' dtype.

    Its state is float32: in bfloat16 a second moment with b2 = .999 cannot fall, since a
    thousandth of it is less than half the distance to the next value. Nothing changes for
    parameters in float32.

    Args:
      tx: the optimiser.
      narrow: whether first moments (`mu`) have the dtype of the parameters instead.
    """

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        def one(path, whole, own):
            first = narrow and any(getattr(k, "name", "") == "mu" for k in path)
            return whole.astype(own.dtype) if first else whole

        states = tx.init(wide(params)), tx.init(params)
        return jax.tree_util.tree_map_with_path(one, *states)

    def update(grads, state, params):
        updates, new = tx.update(wide(grads), state, wide(params))
        return updates, jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)

    return optax.GradientTransformation(init, update)


def moved(params: Params, updates: Params, step: Int[Array, ""]) -> Params:
    """Parameters after a step: params + updates, rounded stochastically to bfloat16.

    Args:
      params: of float32 or bfloat16.
      updates: of float32.
      step: whose number decides how values are rounded, on every mesh and after a resume.
    """
    key = jax.random.fold_in(jax.random.key(0), step)
    numbers = itertools.count()

    def one(x, change):
        new, number = x.astype(jnp.float32) + change, next(numbers)
        if x.dtype == jnp.bfloat16:
            new = stochastic(new, jax.random.fold_in(key, number))
        return new.astype(x.dtype)

    return jax.tree.map(one, params, updates)


def stochastic(x: Float[Array, "..."], key) -> BFloat16[Array, "..."]:
    """Rounds float32 to one of the two nearest bfloat16 values; x is the mean.

    bfloat16 is the upper half of float32's bits. A random number of 16 bits is added to
    the lower half, whose carry rounds away from zero; then the lower half is cut.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def _clipped_rms() -> optax.GradientTransformation:
    """Factored second moments; a matrix's update has a root mean square of at most 1.

    The bound is that of the paper and of optax.adafactor. It keeps no state, so that runs
    from before it was here go on.

    Source: Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235
    """
    rms, bound = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)

    def update(grads, state, params=None):
        updates, state = rms.update(grads, state, params)
        return bound.update(updates, bound.init(params), params)[0], state

    return optax.GradientTransformation(rms.init, update)


def of_critic(params):
    """True on the value head."""

    def one(path, _):
        return path_string(path).startswith("value_head")

    return jax.tree_util.tree_map_with_path(one, params)


def matrices(params):
    """Which axes of the matrices of the blocks are inputs and outputs; None for all else.

    Embeddings, heads, norms and biases are AdamW's (with Nesterov momentum, as optax has it
    beside Muon). The first axis counts layers; the heads
    of an attention are one matrix. Adapters are matrices too.
    """

    def one(path, x):
        *_, module, name = ["", *path_string(path).split("/")]
        if not path_string(path).startswith("blocks") or name not in (
            "kernel",
            "a",
            "b",
        ):
            return None
        last = x.ndim - 1
        # what comes in: one axis, or heads and their width (of the output of an attention)
        middle = last if name == "a" or (name == "kernel" and module == "o") else 2
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(1, middle)), tuple(range(middle, last + 1))
        )

    return jax.tree_util.tree_map_with_path(one, params)


def from_config(config) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by step and the optimiser that config.optim describes.

    Raises:
      ValueError: an unknown optimiser or schedule.
    """
    rate = schedule(
        config.optim.lr, config.optim.schedule_steps or config.num_steps, kind=config.optim.schedule,
        warmup=config.optim.warmup, final=config.optim.final,
    )  # fmt: skip
    others = {k: v for k, v in config.optim.items() if k not in RATE}
    if config.optim.critic_lr and not config.optim.lr:
        raise ValueError(
            "optim.critic_lr is a multiple of optim.lr, which is 0: to warm up a critic "
            "take a small optim.lr, such as 1e-12"
        )
    critic = config.optim.critic_lr / config.optim.lr if config.optim.critic_lr else 1.0
    return rate, make_tx(rate, **others, critic=critic)
