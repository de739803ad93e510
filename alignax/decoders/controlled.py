"""Controlled decoding, token by token: a value of the prefix tilts the next token.

  π*(v | s) ∝ p(v | s) e^{V(s v) / β}

Mudgal et al. 2023, https://arxiv.org/abs/2310.17022 (λ = 1/β there). V was trained on
rollouts of p; its training objective determines what is sampled:

  losses/value_mean       V(s) = E[r | s]              CD-FUDGE
  losses/value_bootstrap  the same, bootstrapped from its next value: CD-Q
  losses/value_soft       V(s) = β log E[e^{r/β} | s]   the product over a response is then
                          p(y) e^{r(y)/β} / Z itself; with a mean value it is not
  losses/value_q          Q(s, v) = V(s v) of every next token, from one call: a vector
                          guide, Q = b(s) + c log(π / p), in which b(s) has no effect

Differs from the paper: the paper has a mean value. A scalar head gives V of one prefix per
call: tokens that are not among the `candidates` best have probability 0.
"""

from alignax.batch import LM
from alignax.decoders import proxy
from alignax.sampling import guide_models
from alignax.sampling.guides import Guide

HEADS = ("scalar", "q")
RANGES = {
    "beta": "(0, inf)",
    "radius": "(0, inf]",
    "scale": "(0, inf)",
    "centre": "(-inf, inf)",
}


def guide(
    lms: dict[str, LM],
    *,
    values: str = "value",
    head: str = "scalar",
    beta: float = 1.0,
    centre: float = 0.0,
    radius: float = float("inf"),
    reference: str = "ref",
    scale: float = 1.0,
) -> Guide:
    """An *exact* guide: g(s, v) = V(s v) / beta, scalar or of all tokens at once.

    *Exact*: the distribution of each token, given V; of a scalar guide, on the best tokens.
    The distribution of whole responses is p tilted by their reward only if V is the soft
    value of the same beta.

    Args:
      lms: has the value model, which shares the target's vocabulary.
      values: its name.
      head: 'scalar' uses its scalar head; 'q' its log-probabilities minus the reference's.
      beta: units of V per nat; for a soft value, the one of its training.
      centre, radius: of 'scalar': V = centre + radius tanh(head / radius), as in
        training. With a finite radius, g has the bounds (centre ± radius) / beta, which
        rejection sampling needs.
      reference: of 'q': name of the LM that made the rollouts.
      scale: of 'q': as in training.

    Returns:
      A Guide whose state is the KV cache of the value model, of 'q' also the reference's.

    Raises:
      ValueError: a name that `lms` does not have, another head, or an LM without one.
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r} is not one of {', '.join(HEADS)}")
    if head == "q":
        return proxy.guide(lms, expert=values, base=reference, weight=scale / beta)
    (model,) = guide_models.find(lms, values, value_head=True)
    return guide_models.of_values(model, 1 / beta, centre=centre, radius=radius)
