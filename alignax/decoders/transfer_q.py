"""Transfer Q*: values of candidate tokens, by rollouts of an aligned baseline.

  π_alg(v | s) ∝ π_BL(v | s) e^{TQ(s, v) / α}   on the k best tokens of π_BL

  direct    TQ(s, v) = E_{τ ~ ρ_BL(· | s v)} r(s v τ)
  indirect  TQ(s, v) = E_{τ ~ ρ_BL(· | s v)} [ω r] / E[ω],   ω = e^{(r - r_BL) / β}
  released  argmax of logit + r / α, one rollout of 20 tokens per candidate

Chakraborty et al. 2024, https://arxiv.org/abs/2405.20495. ρ_BL is the distribution of
whole responses of the baseline, which was aligned with the reward r_BL: with r itself
(direct) or with another one (indirect, where the mean is that under ρ_r ∝ ρ_sft e^{r /
β}).

This is a search with a loop of its own, not a guide: host code judges rollouts as text,
and in the compiled loop of `generate` every token would wait for the host. The key of a
rollout is derived from the key and a hash of (prefix, v), so that TQ is a function of
the prefix.

Differs from the paper: r_BL is given in the paper; here it is computed from the
baseline and the model it was tuned from, r_BL / β = log ρ_BL / ρ_sft up to a constant
that cancels. The paper does not define the distribution that is tilted; the released
code tilts π_BL. Its rollouts use the generation settings of the checkpoint, here
`rollout_temperature`. Its indirect form has no E[ω] and the same reward model twice,
and is not reproduced.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from alignax.batch import LM
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated, generate
from alignax.sampling.guide_models import find
from alignax.search import hypotheses
from alignax.search.hypotheses import Hypotheses, Judge

VARIANTS = ("direct", "indirect", "released")
RELEASED_HORIZON = 20
RANGES = {
    "candidates": "[1, inf)", "rollouts": "[1, inf)", "horizon": "[0, inf)",
    "alpha": "(0, inf)", "beta": "(0, inf)", "rollout_temperature": "[0, inf)",
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
    variant: str = "direct",
    reference: str = "ref",
    candidates: int = 10,
    rollouts: int = 4,
    horizon: int = 0,
    alpha: float = 1.0,
    beta: float = 1.0,
    rollout_temperature: float = 1.0,
) -> Generated:
    """*Approximate*: the tilt is by means over `rollouts`, not by TQ itself.

    e^{TQ / α} of a noisy TQ is too large on average; the error of the distribution falls
    as 1 / rollouts.

    Args:
      lm: the baseline π_BL, which is tilted and makes the rollouts.
      lms: has the model that the baseline was tuned from, for 'indirect'.
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      key: `jax.random.key`.
      max_new: most tokens of a response.
      judge: r, of responses that are complete or cut at the horizon.
      temperature: of π_BL, before the tilt; 0 is greedy, as 'released' always is.
      eos_ids: end a response.
      stops: over the vocabulary; they also end a response.
      variant: one of VARIANTS.
      reference: name of the model that the baseline was tuned from.
      candidates: k.
      rollouts: of each candidate; 'released' makes one.
      horizon: most tokens of a rollout; 0 is to the end of the response, or 20
        tokens for 'released'.
      alpha: α, units of reward per nat.
      beta: β of the weights of 'indirect'.
      rollout_temperature: of the rollouts; 1 is ρ_BL, 0 is greedy.

    Returns:
      Generated, G = 1; feedback is r of the response, old_logps are under the tilted
      distribution. stats: 'tokens_sampled' (of rollouts and of responses), 'judge_calls'
      (texts judged).

    Raises:
      ValueError: an argument out of its range, no judge or scores that are not numbers, or
        'indirect' without its reference.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
    if min(candidates, rollouts) < 1 or horizon < 0 or min(alpha, beta) <= 0:
        raise ValueError(
            f"candidates={candidates}, rollouts={rollouts}, horizon={horizon}, "
            f"alpha={alpha}, beta={beta}; expected >= 1, >= 1, >= 0, > 0, > 0"
        )
    source = None
    if variant == "indirect":
        (source,) = find(lms, reference)
        if rollout_temperature == 0:
            raise ValueError(
                "rollout_temperature=0 has one rollout, which cannot be weighted: "
                "'indirect' expects it above 0"
            )
    greedy = temperature == 0 or variant == "released"
    if variant == "released":
        rollouts, horizon = 1, horizon or RELEASED_HORIZON
    horizon = min(horizon or max_new, max_new)
    roll_key, draw_key = jax.random.split(key)
    h = hypotheses.start(prompts, lengths, max_new, stops)
    sampled_logps = np.zeros(h.tokens.shape, np.float32)
    stats = {"tokens_sampled": 0, "judge_calls": 0}
    for step in range(max_new):
        live = ~h.done
        if not live.any():
            break
        raw, best = (x[:, 0] for x in hypotheses.next_best(lm, h, candidates))  # [B, K]
        tried, ratio, drawn = _roll_out(
            lm, source, h, best, roll_key, rollouts, horizon, rollout_temperature, eos_ids
        )  # fmt: skip
        r = hypotheses.judged(judge, tried, np.broadcast_to(live, tried.ends.shape))
        r = r.reshape(*best.shape, rollouts)
        q = mean(r, None if ratio is None else r / beta + ratio)
        score = raw / (1.0 if greedy else temperature) + q / alpha
        place, logp = _draw(jax.random.fold_in(draw_key, step), score, greedy)
        here = (np.arange(h.tokens.shape[2]) == h.ends[..., None]) & live[..., None]
        sampled_logps = np.where(here, logp[..., None], sampled_logps)
        token, logp = (np.take_along_axis(x, place, 1) for x in (best, raw))
        h = hypotheses.append(h, token, logp, eos_ids, live)
        stats["tokens_sampled"] += drawn + int(live.sum())
        stats["judge_calls"] += int(live.sum()) * best.shape[1] * rollouts
    stats["judge_calls"] += len(h.ends)
    out = hypotheses.generated(h, hypotheses.judged(judge, h), stats)
    old_logps = jnp.asarray(sampled_logps, jnp.float32)
    return out._replace(batch=out.batch._replace(old_logps=old_logps))


def mean(rewards: np.ndarray, log_weights: np.ndarray | None = None) -> np.ndarray:
    """TQ [...] from rollouts [..., M]: the plain mean, or one of normalised weights."""
    if log_weights is None:
        return rewards.mean(-1)
    w = np.exp(log_weights - log_weights.max(-1, keepdims=True))
    return (w * rewards).sum(-1) / w.sum(-1)


def _roll_out(
    lm: LM, source: LM | None, h: Hypotheses, best: np.ndarray, key: Array, rollouts: int,
    horizon: int, temperature: float, eos_ids: Sequence[int],
) -> tuple[Hypotheses, np.ndarray | None, int]:  # fmt: skip
    """Every candidate with its rollouts, [B, K * M]; their log ρ_sft / ρ_BL; tokens drawn."""
    (b, k), t = best.shape, h.tokens.shape[2]
    live = np.broadcast_to(~h.done, (b, k))
    wide = hypotheses.take(h, np.zeros((b, k), int))
    wide = hypotheses.append(wide, best, np.zeros(best.shape), eos_ids, live)
    going = ~wide.done & live
    rows = wide.tokens.reshape(b * k, t)
    # a row without room draws one token, which is ignored
    room = np.where(going, np.minimum(horizon, wide.max_new - wide.sizes), 1)
    hashes = [
        zlib.crc32(row[:end].tobytes())
        for row, end in zip(rows, wide.ends.reshape(-1), strict=True)
    ]
    out = generate(
        lm, rows, wide.ends.reshape(-1), key, max_new=horizon, group=rollouts,
        temperature=temperature, eos_ids=eos_ids, limits=room.reshape(-1),
        seeds=np.array(hashes, np.uint32),
    )  # fmt: skip
    batch = jax.tree.map(np.asarray, out.batch)
    tried = hypotheses.rows_of(wide, lambda x: np.repeat(x, rollouts, 1))
    again = np.repeat(going, rollouts, 1)
    ends = np.where(again, batch.lengths.reshape(b, -1), tried.ends)
    at = np.arange(t)
    fresh = (at >= tried.ends[..., None]) & (at < ends[..., None])
    words = np.where(fresh, batch.tokens[..., :t].reshape(b, -1, t), tried.tokens)
    tried = tried._replace(tokens=words, ends=ends)
    ratio = None
    if source is not None:
        rolled: Any = fresh
        asked = hypotheses.as_batch(tried)._replace(mask=rolled)
        theirs = np.asarray(hypotheses.score(source, asked).logps, np.float64).sum(-1)
        ours = np.asarray(batch.old_logps, np.float64)[..., :t].reshape(b, -1, t)
        ratio = (theirs - np.where(fresh, ours, 0).sum(-1)).reshape(b, k, rollouts)
    return tried, ratio, int(fresh.sum())


def _draw(key: Array, score: np.ndarray, greedy: bool) -> tuple[np.ndarray, np.ndarray]:
    """An index in each row [B, 1] and its log-probability; each row has its own key."""
    if greedy:
        return score.argmax(1)[:, None], np.zeros((len(score), 1))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(len(score)))
    noise = jax.vmap(lambda one: jax.random.gumbel(one, score.shape[1:]))(keys)
    place = (score + np.asarray(noise)).argmax(1)[:, None]
    top = score.max(1, keepdims=True)
    total = top + np.log(np.exp(score - top).sum(1, keepdims=True))
    return place, np.take_along_axis(score, place, 1) - total
