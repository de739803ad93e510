"""Guided speculative inference: a small model drafts steps, tilted by a reward.

Geuter, Mroueh and Alvarez-Melis 2025, https://arxiv.org/abs/2506.04118

  y_1 .. y_n ~ p_draft(. | s)       r̃_i = r(s y_i) + beta log p(y_i | s) / p_draft(y_i | s)
  i ~ softmax(r̃ / beta);  keep y_i if r̃_i >= u
  otherwise  z_1 .. z_n ~ p(. | s),  j ~ softmax(r(s z) / beta),  keep z_j

The target is π* = p exp(r / beta) / Z of each step. As n grows, the distribution becomes
π*(y) (1[r̃(y) >= u] + π*(r̃ < u)) instead: the threshold is a bias for every n.

Differs from the paper: beta is the temperature of the tilt, 1 / beta of theirs. A step
ends after `step` tokens or with one of `step_ids`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignax import logprob
from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated
from alignax.search import hypotheses
from alignax.search.hypotheses import Hypotheses, Judge

RANGES = {"n": "[1, inf)", "step": "[1, inf)", "beta": "(0, inf)", "u": "(-inf, inf)"}


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
    draft: str = "draft",
    n: int = 16,
    step: int = 64,
    step_ids: Sequence[int] = (),
    beta: float = 0.05,
    u: float = 0.5,
) -> Generated:
    """Steps from about p exp(r / beta). *Approximate*, for every n; see the module.

    Args:
      lm: p.
      lms: has the draft, of p's vocabulary.
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      key: `jax.random.key`.
      max_new: most tokens of a response.
      judge: r, of responses up to the end of a step.
      temperature: of both models, above 0.
      eos_ids: end a response.
      stops: over the vocabulary; they also end a response.
      draft: its name.
      n: drafts of a step, and samples of p if they are rejected.
      step: most tokens of a step; part of the shape.
      step_ids: end a step.
      beta: in units of r.
      u: least r̃ of a draft that is kept.

    Returns:
      Generated, G = 1; feedback is r of the response, old_logps None. stats:
      'tokens_sampled', 'draft_tokens' and 'target_tokens' of
      them, 'judge_calls' (steps judged), 'rounds', 'accepted' (share of steps drafted).

    Raises:
      ValueError: an argument out of its range, a draft that `lms` does not have or that
        has another tokenizer, or scores that are not [B, n].
    """
    if n < 1 or step < 1 or beta <= 0 or temperature <= 0:
        raise ValueError(
            f"n={n}, step={step}, beta={beta}, temperature={temperature}; expected n and "
            "step >= 1, beta and temperature > 0"
        )
    small, lm = hypotheses.with_draft(lm, lms, draft)
    h = hypotheses.start(prompts, lengths, max_new, stops)
    score = np.zeros(h.ends.shape)
    one = np.zeros(h.ends.shape, int)
    stats = dict.fromkeys(
        ("tokens_sampled", "draft_tokens", "target_tokens", "judge_calls", "rounds"), 0
    )
    kept = steps = 0

    def choose(h, where, role):
        """n steps of each response, and of them one by exp(r̃ / beta)."""
        keys = jax.random.split(jax.random.fold_in(key, 2 * stats["rounds"] + role))
        wide, drawn = hypotheses.extend(
            (small, lm)[role], h, keys[0], tokens=step, group=n, eos_ids=eos_ids,
            until=step_ids, active=where, temperature=temperature,
        )  # fmt: skip
        where = np.repeat(where, n, 1)
        r = hypotheses.judged(judge, wide, where)
        tilted = r
        if role == 0:
            tilted = r + beta * _log_ratio(lm, h, wide, step, temperature)
        logits = jnp.asarray(tilted / beta)
        index = np.asarray(jax.random.categorical(keys[1], logits, axis=1))[:, None]
        stats[("draft_tokens", "target_tokens")[role]] += drawn
        stats["judge_calls"] += int(where.sum())
        chosen = (np.take_along_axis(x, index, 1) for x in (r, tilted))
        return hypotheses.take(wide, index), *chosen

    while not h.done.all():
        going = ~h.done
        new, r, tilted = choose(h, going, 0)
        keep = going & (tilted >= u)
        again = going & ~keep
        old, h, score = h, hypotheses.put(h, one, new, keep), np.where(keep, r, score)
        if again.any():
            new, r, _ = choose(old, again, 1)
            h, score = hypotheses.put(h, one, new, again), np.where(again, r, score)
        stats["rounds"] += 1
        kept, steps = kept + int(keep.sum()), steps + int(going.sum())
    stats["tokens_sampled"] = stats["draft_tokens"] + stats["target_tokens"]
    h = hypotheses.with_logps(lm, h)
    return hypotheses.generated(h, score, stats | {"accepted": kept / steps})


def _log_ratio(lm, h: Hypotheses, wide: Hypotheses, step: int, temperature):
    """log p / p_draft of the last step of `wide` [B, n], which began where `h` ends."""
    b, n, t = wide.tokens.shape
    begins = np.broadcast_to(h.ends, (b, n))
    fresh = np.arange(t) >= begins[..., None]
    width = hypotheses.bucket(int(wide.ends.max()), t)
    logps = _step_logps(
        lm, wide.tokens.reshape(b * n, t)[:, :width], begins.reshape(-1),
        wide.ends.reshape(-1), jnp.float32(temperature), step=min(step, h.max_new),
    )  # fmt: skip
    return np.asarray(logps).reshape(b, n) - (wide.sampled_logps * fresh).sum(-1)


@functools.partial(jax.jit, static_argnames="step")
def _step_logps(lm, tokens, begins, ends, temperature, *, step) -> Float[Array, " N"]:
    h, _ = transformer.hidden(lm, tokens)
    at = begins[:, None] + jnp.arange(step)
    inside = jnp.minimum(at, tokens.shape[1] - 1)
    row = jnp.arange(tokens.shape[0])[:, None]

    def position(x):  # one at a time: [N, step, V] never exists
        return logprob.token_logps(transformer.unembed(lm, x[0]) / temperature, x[1])

    logps = jax.lax.map(
        position, (h[row, inside - 1].swapaxes(0, 1), tokens[row, inside].T)
    )
    return jnp.where(at < ends[:, None], logps.T, 0.0).sum(-1)
