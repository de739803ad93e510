"""DeAL: heuristic search with a look-ahead from each candidate token.

Huang et al. 2024, https://arxiv.org/abs/2402.06147

  C = { y v : y a beam, v of its top_k tokens }
  score(y v) = log p(y v | x) + lam h(y v ỹ)       ỹ: `lookahead` greedy tokens after y v
  beams <- the best of C;     at the end  argmax log p(y | x) + lam h(y)

Differs from the paper: two options give the same output with less work.
* prune: lo <= h <= hi bounds every score. Look-aheads are computed, most likely candidate
  first, only until it is certain which candidates are best.
* self_draft: the look-ahead of the best candidate is a draft of the next choices. The
  look-aheads at all of its positions are computed in one batch, and its tokens are kept
  as far as the search itself chooses them.
A look-ahead is not longer than the response may be. Ties go to the more likely candidate.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from alignax.batch import LM
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated
from alignax.search import hypotheses, pruning
from alignax.search.hypotheses import Hypotheses, Judge

RANGES = {
    "top_k": "[1, inf)", "lookahead": "[0, inf)", "lam": "[0, inf)", "beams": "[1, inf)",
    "self_draft": "[0, inf)",
    "lo": "(-inf, inf)", "hi": "(-inf, inf)",
}  # fmt: skip


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
    top_k: int = 10,
    lookahead: int = 16,
    lam: float = 1.0,
    beams: int = 1,
    prune: bool = False,
    self_draft: int = 0,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Generated:
    """Heuristic search. *Exact*: `prune` and `self_draft` change no token of the output.

    With lam = 0 it is beam search, which asks no judge; with one beam, greedy decoding. The
    response need not have the best score of all responses: the beam is narrow, and h of a
    look-ahead an estimate.

    Args:
      lm: p, also of the look-ahead.
      lms: not used.
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      key: not used: nothing is random.
      max_new: most tokens of a response.
      judge: h, of responses and of their beginnings; not used if lam = 0.
      temperature: not used: p is the unmodified model.
      eos_ids: end a response.
      stops: over the vocabulary; they also end a response.
      top_k: candidates of each beam.
      lookahead: greedy tokens after a candidate; 0 judges the candidate itself.
      lam: nats for one unit of h.
      beams: hypotheses that are kept.
      prune: use the bounds lo and hi.
      self_draft: most tokens of the look-ahead that are used as a draft; one beam only.
      lo: h is never below it.
      hi: h is never above it.

    Returns:
      Generated, G = 1; feedback is log p + lam h of the response, old_logps are 0. stats:
      'rollouts' (candidates with a look-ahead), 'judge_calls' (those and the final ones; 0
      if lam = 0), 'tokens_sampled' (in look-aheads), 'rounds' (sequential choices), 'steps'
      (sequential calls of the model).

    Raises:
      ValueError: an argument out of its range, no judge although lam > 0, or h outside
        lo..hi where `prune`.
    """
    del lms, temperature
    if min(top_k, beams) < 1 or min(lookahead, lam, self_draft) < 0:
        raise ValueError(
            f"top_k={top_k}, lookahead={lookahead}, lam={lam}, beams={beams}, "
            f"self_draft={self_draft}; expected top_k and beams >= 1, the others >= 0"
        )
    if prune and not -np.inf < lo <= hi < np.inf:
        raise ValueError(f"lo={lo}, hi={hi}; to prune, expected finite lo <= hi")
    if self_draft and (beams > 1 or self_draft > lookahead):
        raise ValueError(
            f"self_draft={self_draft}, beams={beams}, lookahead={lookahead}; expected one "
            "beam, and a draft no longer than the look-ahead"
        )
    stats = dict.fromkeys(
        ("rollouts", "judge_calls", "tokens_sampled", "rounds", "steps"), 0
    )

    def look(h, where):
        """lam h of hypotheses [B, K], and the first tokens of their look-aheads."""
        far = h
        if lookahead:
            far, drawn = hypotheses.extend(
                lm, h, key, tokens=lookahead, temperature=0.0, eos_ids=eos_ids,
                active=where,
            )  # fmt: skip
            stats["tokens_sampled"] += drawn
        stats["steps"] += int((far.ends - h.ends).max(initial=0, where=where))
        stats["rollouts"] += int(where.sum())
        return weigh(far, where), _after(far, h.ends, self_draft)

    def weigh(h, where):
        if not lam:
            return np.zeros(h.ends.shape)
        bounds = dict(low=lo, high=hi) if prune else {}
        stats["judge_calls"] += int(where.sum())
        return lam * hypotheses.judged(judge, h, where, **bounds)

    def choose(logps, candidates):
        bounds = (lam * lo, lam * hi) if prune else None
        return pruning.settle(logps, candidates, look, beams, self_draft, bounds)

    h = hypotheses.start(prompts, lengths, max_new, stops)
    b = np.arange(len(h.ends))[:, None]
    final = hypotheses.take(h, np.zeros((len(b), 2 * beams - 1), int))
    final_logp = np.full(final.ends.shape, -np.inf)
    h = hypotheses.take(h, np.zeros((len(b), beams), int))
    logp = np.where(np.arange(beams) == 0, 0.0, -np.inf) + np.zeros(b.shape)
    draft = np.full((len(b), self_draft), -1)
    while np.isfinite(logp).any():
        stats["rounds"] += 1
        stats["steps"] += 1
        h, logp, draft = _round(lm, h, logp, draft, top_k, eos_ids, choose)
        now = np.isfinite(logp) & h.done
        count = np.isfinite(final_logp).sum(1, keepdims=True)
        index = np.minimum(count + now.cumsum(1) - 1, final.ends.shape[1] - 1)
        final = hypotheses.put(final, index, h, now)
        at, w = np.nonzero(now)
        final_logp[at, index[at, w]] = logp[at, w]
        logp[now | (np.isfinite(final_logp).sum(1, keepdims=True) >= beams)] = -np.inf
    score = final_logp + weigh(final, np.isfinite(final_logp))
    best, index = score.max(1, keepdims=True), score.argmax(1)[:, None]
    return hypotheses.generated(
        hypotheses.take(final, index), best, stats, certain=True
    )


def _after(far: Hypotheses, ends: np.ndarray, many: int) -> np.ndarray:
    """The first tokens [B, K, many] of look-aheads that begin at `ends`; -1 is none."""
    at = ends[..., None] + np.arange(many)
    inside = np.minimum(at, far.tokens.shape[2] - 1)
    ids = np.take_along_axis(far.tokens, inside, 2)
    return np.where(at < far.ends[..., None], ids, -1)


def _along(h: Hypotheses, draft, logps, eos_ids) -> tuple[Hypotheses, np.ndarray]:
    """The prefixes h, h d_1, h d_1 d_2, ... side by side, and which of them exist."""
    parts, here = [h], ~h.done
    exist = [here]
    for i in range(draft.shape[1]):
        token = draft[:, i : i + 1]
        where = here & (token >= 0)
        h = hypotheses.append(h, token, logps[:, i : i + 1], eos_ids, where)
        here = where & ~h.done
        parts.append(h)
        exist.append(here)
    return hypotheses.concatenate(parts), np.concatenate(exist, 1)


def _round(lm, h, logp, draft, top_k, eos_ids, choose):
    """The next beams, several tokens later if the draft agrees with the search.

    Args:
      h: beams [B, W].
      logp: [B, W] float64, -inf where there is none.
      draft: [B, D] ids, -1 is none; W = 1 unless D = 0.
      choose: of (logps [B, S, C], candidates [B, S * C]): `pruning.settle`.

    Returns:
      The same three.
    """
    (n, w), many = logp.shape, draft.shape[1]
    prefixes, exist = _along(h, draft, np.zeros(draft.shape), eos_ids)
    logps, ids = hypotheses.next_best(lm, prefixes, top_k)
    if many:  # the draft is greedy: its tokens are the first candidates
        prefixes, exist = _along(h, draft, logps[..., 0], eos_ids)
        agrees = draft == ids[:, :-1, 0]
        exist[:, 1:] &= np.logical_and.accumulate(agrees, 1)
        steps = np.where(exist[:, 1:], logps[:, :-1, 0].astype(np.float64), -np.inf)
        logp = np.cumsum(np.concatenate([logp, steps], 1), 1)
    total = np.where(exist, logp, -np.inf)[..., None] + logps
    total = total.reshape(n, many + 1, -1)  # [B, S, C] candidates of each position
    order = np.argsort(-total, 2, kind="stable")
    total = np.take_along_axis(total, order, 2)
    c = total.shape[2]
    flat = (order + c * np.arange(many + 1)[:, None]).reshape(n, -1)
    token, step = (np.take_along_axis(x.reshape(n, -1), flat, 1) for x in (ids, logps))
    candidates = hypotheses.append(
        hypotheses.take(prefixes, flat // logps.shape[2]), token, step, eos_ids,
        np.isfinite(total).reshape(n, -1),
    )  # fmt: skip
    picked, alive, ahead = choose(total, candidates)  # [B, S, W], same, [B, S, W, D]
    chosen = np.take_along_axis(token.reshape(n, -1, c), picked, 2)[..., 0]
    goes_on = (chosen[:, :-1] == draft) & exist[:, w:]
    stop = np.logical_and.accumulate(goes_on, 1).sum(1)  # drafts that were chosen
    row = np.arange(n)
    index = stop[:, None] * c + picked[row, stop]
    new = np.where(alive, np.take_along_axis(total, picked, 2), -np.inf)[row, stop]
    return hypotheses.take(candidates, index), new, ahead[row, stop, 0]
