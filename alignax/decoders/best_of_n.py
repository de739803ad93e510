"""Best of N: draw N responses, keep the one with the best score of the judge.

  best   y = argmax_i r(y_i)        worst   y = argmin_i r(y_i)
  soft   y = y_i with probability exp(r(y_i) / lam) / Σ_j exp(r(y_j) / lam)

With F(t) = P(r <= t) and F⁻(t) = P(r < t) under p, the best has the distribution p(y)
(F^N - F⁻^N) / (F - F⁻) at t = r(y); ties are in proportion to p. Its KL divergence from
p is at most log N - (N - 1) / N nats (Beirami et al. 2024,
https://arxiv.org/abs/2401.01879). Soft: Verdun et al. 2025,
https://arxiv.org/abs/2505.03156; the best as lam -> 0, p as lam -> ∞, and within log(1
+ χ² / N) nats of p exp(r / lam) / Z.

Differs from the paper: nothing. The worst of N is the best on -r, InfAlign's adversary
(https://arxiv.org/abs/2412.19792).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from alignax.batch import LM
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated
from alignax.sampling.prefill import WHOLE, Reader
from alignax.search import hypotheses
from alignax.search.hypotheses import Judge

SELECTS = ("best", "worst", "soft")
AT_ONCE = True  # whole responses are drawn: they may begin with forced text
RANGES = {"n": "[1, inf)", "lam": "(0, inf)"}


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
    n: int = 16,
    select: str = "best",
    lam: float = 1.0,
    sampling: Mapping[str, Any] | None = None,
    reader: Reader = WHOLE,
) -> Generated:
    """The best, the worst, or a soft best of n. *Exact*: the distribution above.

    Args:
      lm: p, the policy.
      lms: not used.
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      key: `jax.random.key`.
      max_new: most tokens of a response.
      judge: r, of complete responses.
      temperature: of p.
      eos_ids: end a response.
      stops: over the vocabulary; they also end a response.
      n: N.
      select: one of SELECTS.
      lam: temperature of 'soft', in units of r.
      sampling: further settings of `decode.generate`, which are a part of p.
      reader: of `decode.generate`.

    Returns:
      Generated, G = 1; feedback is r of the response, old_logps None. stats:
      'tokens_sampled', 'judge_calls' (responses judged).

    Raises:
      ValueError: an argument out of its range, no judge, or scores that are not [B, n].
    """
    del lms
    if n < 1 or lam <= 0 or select not in SELECTS:
        raise ValueError(
            f"n={n}, lam={lam}, select={select!r}; expected n >= 1, lam > 0 and one of "
            f"{', '.join(SELECTS)}"
        )
    h = hypotheses.start(prompts, lengths, max_new, stops)
    h, drawn = hypotheses.extend(
        lm, h, jax.random.fold_in(key, 0), tokens=max_new, group=n,
        temperature=temperature, eos_ids=eos_ids, sampling=sampling, reader=reader,
    )  # fmt: skip
    scores = hypotheses.judged(judge, h)
    if select == "soft":
        role, logits = jax.random.fold_in(key, 1), jnp.asarray(scores / lam)
        index = np.asarray(jax.random.categorical(role, logits, axis=1))
    else:
        index = (-scores if select == "worst" else scores).argmax(1)
    index = index[:, None]
    return hypotheses.generated(
        hypotheses.take(h, index),
        np.take_along_axis(scores, index, 1),
        {"tokens_sampled": drawn, "judge_calls": scores.size},
    )
