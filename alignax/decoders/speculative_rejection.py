"""Speculative rejection: start with many responses, stop those with low early scores.

Sun et al. 2024, https://arxiv.org/abs/2410.20290

  every `every` tokens:  keep { i : r(x, y_i,<t) >= quantile_reject(r) }, continue those
  at the end:            argmax r(y_i) over the responses that were completed

Differs from the paper: partial responses are judged every so many tokens, not whenever
the memory is full. The quantile is over all responses that were not rejected; complete
ones cost nothing more and are never rejected.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from alignax.batch import LM
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated
from alignax.sampling.prefill import WHOLE, Reader
from alignax.search import hypotheses
from alignax.search.hypotheses import Judge

RANGES = {"n": "[1, inf)", "every": "[1, inf)", "reject": "[0, 1)"}


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
    n: int = 32,
    every: int = 32,
    reject: float = 0.5,
    sampling: Mapping[str, Any] | None = None,
    reader: Reader = WHOLE,
) -> Generated:
    """Best of n at a part of its cost. *Approximate*; with reject = 0 exactly best of n.

    Approximate, because the rank of a beginning may differ from that of the response.

    Args:
      lm: p, the policy.
      lms: not used.
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      key: `jax.random.key`.
      max_new: most tokens of a response.
      judge: r, of complete responses and of their beginnings.
      temperature: of p.
      eos_ids: end a response.
      stops: over the vocabulary; they also end a response.
      n: responses to start with; the number of rows shrinks by powers of two.
      every: tokens between two judgements.
      reject: share that is rejected at each.
      sampling: further settings of `decode.generate` that do not depend on earlier
        tokens of the response.
      reader: of `decode.generate`.

    Returns:
      Generated, G = 1; feedback is r of the response, old_logps None. stats:
      'tokens_sampled', 'judge_calls' (responses judged, each time), 'rejected',
      'tokens_saved' (an upper bound: as if every rejected one had max_new tokens).

    Raises:
      ValueError: an argument out of its range, or scores that are not [B, G].
    """
    del lms
    if n < 1 or every < 1 or not 0 <= reject < 1:
        raise ValueError(
            f"n={n}, every={every}, reject={reject}; expected n >= 1, every >= 1, "
            "0 <= reject < 1"
        )

    def grow(h, step, **how):
        return hypotheses.extend(
            lm, h, jax.random.fold_in(key, step), tokens=every, sampling=sampling, reader=reader,
            temperature=temperature, eos_ids=eos_ids, **how,
        )  # fmt: skip

    h, drawn = grow(hypotheses.start(prompts, lengths, max_new, stops), 0, group=n)
    part, mine = h, np.ones(h.ends.shape, bool)  # rows of the last step
    index = np.broadcast_to(np.arange(n), mine.shape)
    alive = mine.copy()  # not rejected
    scores = np.full(mine.shape, -np.inf)
    step = calls = saved = 0
    while True:
        b, k = np.nonzero(mine)
        scores[b, index[b, k]] = hypotheses.judged(judge, part, mine)[b, k]
        calls += len(b)
        among = np.where(alive, scores, np.nan)
        cut = np.nanquantile(among, reject, axis=1, method="higher", keepdims=True)
        lost = alive & ~h.done & (scores < cut)
        saved += int((max_new - h.sizes)[lost].sum())
        alive &= ~lost
        going = alive & ~h.done
        if not going.any():
            break
        step += 1
        size = min(n, 1 << (int(going.sum(1).max()) - 1).bit_length())
        index = np.argsort(~going, 1, kind="stable")[:, :size]
        mine = np.take_along_axis(going, index, 1)
        seeds = index + n * np.arange(len(index))[:, None]
        part, more = grow(hypotheses.take(h, index), step, active=mine, seeds=seeds)
        drawn += more
        h = hypotheses.put(h, index, part, mine)
    final = np.where(alive, scores, -np.inf)
    index = final.argmax(1)[:, None]
    return hypotheses.generated(
        hypotheses.take(h, index),
        np.take_along_axis(scores, index, 1),
        {
            "tokens_sampled": drawn,
            "judge_calls": calls,
            "rejected": int((~alive).sum()),
            "tokens_saved": saved,
        },
    )
