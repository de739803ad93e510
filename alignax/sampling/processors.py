"""From the policy's logits to the law that is sampled, in one fixed order.

  1  penalties: repetition, then frequency, then presence; logit bias
  2  temperature
  3  masks: the grammar, and EOS while a response is shorter than it has to be
  4  top-k, then top-p, then min-p, each of what the one before left
  5  the guide            (decode.py)
  6  renormalise          (decode.py)

Another order is another law. Settings are arrays with one entry a row, so that one
compiled program serves mixed requests; a setting that is None compiles to nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Warpers(NamedTuple):
    """Settings of steps 1, 2 and 4."""

    temperature: Float[Array, "*N"]  # one for all, or one a row; 0 is greedy
    repetition: Float[Array, " N"] | None = None  # 1 = off; of prompt and response
    frequency: Float[Array, " N"] | None = None  # 0 = off; nats per time it was said
    presence: Float[Array, " N"] | None = None  # 0 = off; nats if it was said
    bias: Float[Array, "*N V"] | None = None  # nats; -inf forbids a token
    top_k: Int[Array, " N"] | None = None  # 0 = off
    top_p: Float[Array, " N"] | None = None  # 1 = off
    min_p: Float[Array, " N"] | None = None  # 0 = off

    @property
    def counts(self) -> bool:
        """Whether they read what the response has said so far."""
        return any(
            x is not None for x in (self.repetition, self.frequency, self.presence)
        )


def warp(
    logits: Float[Array, "N V"],
    w: Warpers,
    *,
    counts: Int[Array, "N V"] | None = None,
    prompt: Bool[Array, "N V"] | None = None,
    allowed: Bool[Array, "N V"] | None = None,
) -> Float[Array, "N V"]:
    """Steps 1 to 4. What they exclude is -inf; the rest is not normalised.

    Args:
      logits: the model's own where there is a repetition penalty, which depends on
        their sign; log-probabilities do as well without one.
      w: settings.
      counts: times that the response has each token, if `w.counts`.
      prompt: whether the prompt has it, if there is a repetition penalty.
      allowed: False is masked.
    """
    logits = penalise(logits, w, counts, prompt)
    temperature = w.temperature
    if temperature.ndim:
        temperature = jnp.where(temperature > 0, temperature, 1.0)[:, None]
    logits = logits / temperature
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return truncate(logits, w.top_k, w.top_p, w.min_p)


def penalise(
    logits: Float[Array, "N V"],
    w: Warpers,
    counts: Int[Array, "N V"] | None,
    prompt: Bool[Array, "N V"] | None,
) -> Float[Array, "N V"]:
    """Step 1: Keskar et al. 2019 on prompt and response, the others on the response.

    https://arxiv.org/abs/1909.05858: a positive logit is divided by the penalty, a
    negative one multiplied.
    """
    if w.repetition is not None:
        assert counts is not None
        assert prompt is not None
        r = w.repetition[:, None]
        shrunk = jnp.where(logits > 0, logits / r, logits * r)
        logits = jnp.where(prompt | (counts > 0), shrunk, logits)
    if w.frequency is not None:
        assert counts is not None
        logits = logits - w.frequency[:, None] * counts
    if w.presence is not None:
        assert counts is not None
        logits = logits - w.presence[:, None] * (counts > 0)
    return logits if w.bias is None else logits + jnp.broadcast_to(w.bias, logits.shape)


def truncate(
    logits: Float[Array, "N V"],
    top_k: Int[Array, " N"] | None,
    top_p: Float[Array, " N"] | None,
    min_p: Float[Array, " N"] | None,
) -> Float[Array, "N V"]:
    """Step 4. Of equal logits the lower id ranks first; the best token always stays.

    top-p keeps the fewest best tokens that together have at least that much of the mass
    which top-k left; min-p keeps what is at least that share of the best one.
    """
    if top_k is None and top_p is None and min_p is None:
        return logits
    row = jnp.arange(logits.shape[0])[:, None]
    order = jnp.argsort(-logits, -1, stable=True)
    ranked = logits[row, order]
    rank = jnp.arange(logits.shape[1])[None]
    keep = jnp.ones(logits.shape, bool)
    if top_k is not None:
        keep &= (rank < top_k[:, None]) | (top_k[:, None] == 0)
    if top_p is not None:
        p = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), -1)
        # the mass before a token: with p = 1 rounding must not cut the tail
        keep &= (jnp.cumsum(p, -1) - p < top_p[:, None]) | (top_p[:, None] >= 1)
    if min_p is not None:
        keep &= jnp.exp(ranked - ranked[:, :1]) >= min_p[:, None]
    keep = jnp.zeros_like(keep).at[row, order].set(keep)
    return jnp.where(keep, logits, -jnp.inf)
