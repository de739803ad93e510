"""Conditional beam search: the most likely response with an attribute.

Yoshida 2024, https://arxiv.org/abs/2408.16241

  beams <- the best of  log p(y_<=t | x) + log P_phi(A | x, y_<=t)
  at the end  argmax  log p(y | x) + log P_phi(A | x, y)

P_phi is the probability that the completed response has A, given its beginning or all of
it. By Bayes the sum is log p(y_<=t, A | x), so that the result is the mode of the
conditional distribution. The mode of p itself may be an empty or a copied response, even
if samples of p are good.

Differs from the paper: P_phi is a judge, an argument, not a classifier on the model's
hidden states. The beam search is `deal` without a look-ahead, at lam = 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from alignax.batch import LM
from alignax.decoders import deal
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated
from alignax.search import hypotheses
from alignax.search.hypotheses import Judge

RANGES = {"beams": "[1, inf)", "top_k": "[1, inf)"}


def search(
    lm: LM,
    lms: dict[str, LM],
    prompts: Any,
    lengths: Any,
    key: Array,
    *,
    max_new: int,
    judge: Judge | None = None,
    temperature: float = 1.0,
    eos_ids: Sequence[int] = (),
    stops: Automaton | None = None,
    beams: int = 5,
    top_k: int = 10,
) -> Generated:
    """Beam search by log p(y, A). *Approximate*; the exact mode if the beam is wide enough.

    Args:
      lm: p.
      lms: not used.
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      key: not used: nothing is random.
      max_new: most tokens of a response.
      judge: P(A | x, y) in [0, 1], of beginnings and of complete responses. Candidates
        with 0 are dropped, unless all have 0.
      temperature: not used: p is the unmodified model.
      eos_ids: end a response.
      stops: over the vocabulary; they also end a response.
      beams: hypotheses that are kept.
      top_k: candidates of each.

    Returns:
      Generated, G = 1; feedback is log p(y, A), old_logps are 0. stats as of `deal`.

    Raises:
      ValueError: an argument out of its range, or scores that are not probabilities.
    """

    def log_probability(batch):
        p = hypotheses.scored(judge, batch, low=0.0, high=1.0)
        with np.errstate(divide="ignore"):
            return np.log(p)

    return deal.search(
        lm, lms, prompts, lengths, key, max_new=max_new, judge=log_probability,
        temperature=temperature, eos_ids=eos_ids, top_k=top_k, lookahead=0, lam=1.0,
        beams=beams, stops=stops,
    )  # fmt: skip
