"""Blockwise controlled decoding: best of n, block by block.

Mudgal et al. 2023, https://arxiv.org/abs/2310.17022

  b_1 .. b_n ~ p(. | s), blocks of `block` tokens         s <- s b_i,  i = argmax V(s b_i)

Each block has the distribution of the best of n, at a KL divergence of at most
log n - (n - 1) / n nats from p; the divergence of a response is at most that times the
number of blocks. One block as long as the response is the best of n; blocks of one token
approach a greedy choice by V.

Differs from the paper: V is a judge, an argument, not a value head trained for it. The
token-level rules are in `controlled`.
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

RANGES = {"n": "[1, inf)", "block": "[1, inf)"}


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
    block: int = 32,
    sampling: Mapping[str, Any] | None = None,
    reader: Reader = WHOLE,
) -> Generated:
    """The best of n at every block. *Exact*: its own distribution, which is no tilt of p.

    Args:
      lm: p.
      lms: not used.
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      key: `jax.random.key`.
      max_new: most tokens of a response.
      judge: V, of responses and of their beginnings.
      temperature: of p.
      eos_ids: end a response, and so a block.
      stops: over the vocabulary; they also end a response.
      n: K of the paper.
      block: M, tokens of a block; at least max_new is the best of n.
      sampling: further settings of `decode.generate` that do not depend on earlier
        tokens of the response.
      reader: of `decode.generate`.

    Returns:
      Generated, G = 1; feedback is V of the response, old_logps None. stats:
      'tokens_sampled', 'judge_calls' (blocks judged), 'rounds' (blocks of the
      longest response).

    Raises:
      ValueError: an argument out of its range, or scores that are not [B, n].
    """
    del lms
    if n < 1 or block < 1:
        raise ValueError(f"n={n}, block={block}; expected both at least 1")
    h = hypotheses.start(prompts, lengths, max_new, stops)
    score = np.zeros(h.ends.shape)
    rounds = drawn = calls = 0
    while not h.done.all():
        going = ~h.done
        wide, more = hypotheses.extend(
            lm, h, jax.random.fold_in(key, rounds), tokens=block, group=n,
            temperature=temperature, eos_ids=eos_ids, sampling=sampling, reader=reader,
        )  # fmt: skip
        where = np.repeat(going, n, 1)
        scores = hypotheses.judged(judge, wide, where)
        index = scores.argmax(1)[:, None]  # all are equal of a response that is done
        h = hypotheses.take(wide, index)
        score = np.where(going, np.take_along_axis(scores, index, 1), score)
        drawn, calls, rounds = drawn + more, calls + int(where.sum()), rounds + 1
    stats = {"tokens_sampled": drawn, "judge_calls": calls, "rounds": rounds}
    return hypotheses.generated(h, score, stats)
