"""Optimisers and schedules: names from a config to an optax transformation."""

import jax
import optax

from alignax.models.sharding import path_string

SCHEDULES = ("constant", "linear", "cosine")
RATE = ("lr", "schedule", "warmup", "final")  # of config.optim: the schedule's own


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
      num_steps: optimiser steps of the run.
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
    """True on matrices and embeddings; norms and biases are not decayed."""

    def one(path, _):
        return not path_string(path).endswith(("scale", "bias"))

    return jax.tree_util.tree_map_with_path(one, params)


def make_tx(
    rate, *, name: str = "adamw", clip: float = 1.0, weight_decay: float = 0.0,
    b1: float = 0.9, b2: float = 0.999,
) -> optax.GradientTransformation:  # fmt: skip
    """Global-norm clipping (clip > 0), then the named optimiser.

    Args:
      rate: a number or a schedule.
      name: 'adamw', 'adafactor' or 'lion'.
      clip: largest global gradient norm; 0 does not clip.
      weight_decay: decoupled, on matrices only.
      b1, b2: decay of the first and second moments (Adafactor has its own).

    Raises:
      ValueError: unknown name.
    """
    makers = {
        "adamw": lambda: optax.adamw(rate, b1, b2, weight_decay=weight_decay, mask=decayed),
        "lion": lambda: optax.lion(rate, b1, b2, weight_decay=weight_decay, mask=decayed),
        # not optax.adafactor, whose weight decay the learning rate does not scale
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(),
            optax.add_decayed_weights(weight_decay, decayed),
            optax.scale_by_learning_rate(rate),
        ),
    }  # fmt: skip
    if name not in makers:
        raise ValueError(f"unknown optimiser {name!r}; known: {', '.join(makers)}")
    clipping = optax.clip_by_global_norm(clip) if clip else optax.identity()
    return optax.chain(clipping, makers[name]())


def from_config(config) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by step and the optimiser that config.optim describes.

    Raises:
      ValueError: an unknown optimiser or schedule.
    """
    rate = schedule(
        config.optim.lr, config.num_steps, kind=config.optim.schedule,
        warmup=config.optim.warmup, final=config.optim.final,
    )  # fmt: skip
    others = {k: v for k, v in config.optim.items() if k not in RATE}
    return rate, make_tx(rate, **others)
