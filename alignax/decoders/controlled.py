"""Controlled decoding, token by token: a value of the prefix tilts the next token.

  π*(v | s) ∝ p(v | s) e^{V(s v) / β}

Mudgal et al. 2023, https://arxiv.org/abs/2310.17022 (λ = 1/β there). V was trained on
rollouts of p; what it was trained on decides what is sampled:

  losses/value_mean       V(s) = E[r | s]              CD-FUDGE
  losses/value_bootstrap  the same, from its own next value: CD-Q
  losses/value_soft       V(s) = β log E[e^{r/β} | s]   the product over a response is then
                          p(y) e^{r(y)/β} / Z itself; with a mean value it is not
  losses/value_q          Q(s, v) = V(s v) of every next token, from one call: a vector
                          guide, Q = b(s) + c log(π / p), of which b(s) tilts nothing

Differs from the paper: a mean value is what the paper has. A scalar head says V of one
prefix a call: tokens beyond the engine's `candidates` best then have no probability.
"""

from alignax.batch import LM
from alignax.decoders import proxy
from alignax.sampling import guide_models
from alignax.sampling.guides import Guide

HEADS = ("scalar", "q")
RANGES = {"beta": "(0, inf)", "radius": "(0, inf]", "scale": "(0, inf)"}


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

    Exact is the law token by token, given V, on the engine's best tokens if it is scalar.
    That of whole responses is the tilt by their reward only if V is the soft value of the
    same beta.

    Args:
      lms: has the value model, which shares the target's vocabulary.
      values: its name.
      head: 'scalar' reads its scalar head; 'q' the ratio of its law to the reference's.
      beta: unit of V a nat; for a soft value, the one it was trained with.
      centre, radius: of 'scalar': V = centre + radius tanh(head / radius), as it was
        trained. A finite radius gives g the bounds (centre ± radius) / beta, which
        verification by rejection needs.
      reference: of 'q': name of the law that was rolled out.
      scale: of 'q': as it was trained.

    Returns:
      A Guide whose state is the cache of the value model, of 'q' also the reference's.

    Raises:
      ValueError: a name that `lms` does not have, another head, or an LM without one.
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r} is not one of {', '.join(HEADS)}")
    if head == "q":
        return proxy.guide(lms, expert=values, base=reference, weight=scale / beta)
    (model,) = guide_models.find(lms, values, value_head=True)
    return guide_models.of_values(model, 1 / beta, centre=centre, radius=radius)
