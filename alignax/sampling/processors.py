"""Logits processors: from the policy's logits to the sampling distribution, in order.

  1  penalties: repetition, then frequency, then presence; logit bias
  2  temperature
  3  masks: the grammar, and EOS while a response is shorter than it has to be
  4  top-k, then top-p, then min-p, each on the tokens that the one before kept
  5  the guide            (decode.py)
  6  renormalise          (decode.py)

Ids beyond a tokenizer's, with which tables are padded, are not there from the beginning
(`transformer.limit_ids`): step 6 normalises over the others.

Another order is another distribution. Settings are arrays with one entry per row, so that
one compiled program serves different settings; a setting that is None compiles to nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Processors(NamedTuple):
    """Settings of steps 1, 2 and 4."""

    temperature: Float[Array, "*N"]  # one for all, or one per row; 0 is greedy
    repetition: Float[Array, " N"] | None = None  # 1 = off; of prompt and response
    frequency: Float[Array, " N"] | None = None  # 0 = off; nats per occurrence
    presence: Float[Array, " N"] | None = None  # 0 = off; nats if it occurs
    bias: Float[Array, "*N V"] | None = None  # nats; -inf forbids a token
    top_k: Int[Array, " N"] | None = None  # 0 = off
    top_p: Float[Array, " N"] | None = None  # 1 = off
    min_p: Float[Array, " N"] | None = None  # 0 = off

    @property
    def counts(self) -> bool:
        """Whether they depend on the tokens of the response."""
        return any(
            x is not None for x in (self.repetition, self.frequency, self.presence)
        )


def process(
    logits: Float[Array, "N V"],
    processors: Processors,
    *,
    counts: Int[Array, "N V"] | None = None,
    prompt: Bool[Array, "N V"] | None = None,
    allowed: Bool[Array, "N V"] | None = None,
) -> Float[Array, "N V"]:
    """Steps 1 to 4. Excluded tokens are -inf; the others are not normalised.

    Args:
      logits: of the model. A repetition penalty depends on their sign; without one,
        log-probabilities may be given instead.
      processors: settings.
      counts: occurrences of each token in the response, if `processors.counts`.
      prompt: whether the prompt has it, if there is a repetition penalty.
      allowed: False is masked.
    """
    logits = penalise(logits, processors, counts, prompt)
    temperature = processors.temperature
    if temperature.ndim:
        temperature = jnp.where(temperature > 0, temperature, 1.0)[:, None]
    logits = logits / temperature
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return truncate(logits, processors.top_k, processors.top_p, processors.min_p)


def penalise(
    logits: Float[Array, "N V"],
    processors: Processors,
    counts: Int[Array, "N V"] | None,
    prompt: Bool[Array, "N V"] | None,
) -> Float[Array, "N V"]:
    """Step 1: penalties and bias. Repetition counts the prompt too, the others do not.

    Repetition: Keskar et al. 2019, https://arxiv.org/abs/1909.05858: a positive logit is
    divided by the penalty, a negative one multiplied.
    """
    if processors.repetition is not None:
        assert counts is not None
        assert prompt is not None
        r = processors.repetition[:, None]
        shrunk = jnp.where(logits > 0, logits / r, logits * r)
        logits = jnp.where(prompt | (counts > 0), shrunk, logits)
    if processors.frequency is not None:
        assert counts is not None
        logits = logits - processors.frequency[:, None] * counts
    if processors.presence is not None:
        assert counts is not None
        logits = logits - processors.presence[:, None] * (counts > 0)
    return (
        logits
        if processors.bias is None
        else logits + jnp.broadcast_to(processors.bias, logits.shape)
    )


def truncate(
    logits: Float[Array, "N V"],
    top_k: Int[Array, " N"] | None,
    top_p: Float[Array, " N"] | None,
    min_p: Float[Array, " N"] | None,
) -> Float[Array, "N V"]:
    """Step 4. Of equal logits the lower id ranks first; the best token is always kept.

    top-p keeps the smallest set of best tokens with at least this probability, among those
    that top-k kept; min-p keeps tokens with at least this share of the best probability.
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
        # the mass before a token: at top_p = 1 rounding must not cut the tail
        keep &= (jnp.cumsum(p, -1) - p < top_p[:, None]) | (top_p[:, None] >= 1)
    if min_p is not None:
        keep &= jnp.exp(ranked - ranked[:, :1]) >= min_p[:, None]
    keep = jnp.zeros_like(keep).at[row, order].set(keep)
    return jnp.where(keep, logits, -jnp.inf)
