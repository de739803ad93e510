"""Reward-guided speculative decoding: a drafted step is kept if its reward is high.

Liao et al. 2025, https://arxiv.org/abs/2501.19324

  y ~ p_draft(. | s);   keep y if r(s y) >= delta,  otherwise  z ~ p(. | s),  keep z

A step has the distribution 1[r(y) >= delta] p_draft(y) + p_draft(r < delta) p(y), which is
no tilt of p: steps that the draft prefers stay more likely.

Differs from the paper: the reward is a judge, an argument. A step ends after `step`
tokens or with one of `step_ids` (in the paper, an empty line).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from alignax.batch import LM
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated
from alignax.search import hypotheses
from alignax.search.hypotheses import Judge

RANGES = {"step": "[1, inf)", "delta": "(-inf, inf)"}


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
    step: int = 64,
    step_ids: Sequence[int] = (),
    delta: float = 0.7,
) -> Generated:
    """Steps of the draft, or of p. *Approximate*: its own distribution, not a tilt of p.

    Args:
      lm: p.
      lms: has the draft, of p's vocabulary.
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      key: `jax.random.key`.
      max_new: most tokens of a response.
      judge: r, of responses up to the end of a step.
      temperature: of both models.
      eos_ids: end a response.
      stops: over the vocabulary; they also end a response.
      draft: its name.
      step: most tokens of a step; part of the shape.
      step_ids: end a step.
      delta: least r of a drafted step that is kept; -inf is the draft alone, inf is p.

    Returns:
      Generated, G = 1; feedback is r of the response, old_logps None. stats:
      'tokens_sampled', 'draft_tokens' and 'target_tokens' of them, 'judge_calls' (drafts,
      and the responses), 'rounds', 'accepted' (share of steps drafted).

    Raises:
      ValueError: an argument out of its range, a draft that `lms` does not have or that
        has another tokenizer, or scores that are not [B, 1].
    """
    if step < 1:
        raise ValueError(f"step={step}, expected at least 1")
    models = hypotheses.with_draft(lm, lms, draft)
    h = hypotheses.start(prompts, lengths, max_new, stops)
    one = np.zeros(h.ends.shape, int)
    drawn, kept, steps, rounds = [0, 0], 0, 0, 0

    def grow(role, where):
        new, many = hypotheses.extend(
            models[role], h, jax.random.fold_in(key, 2 * rounds + role), tokens=step,
            temperature=temperature, eos_ids=eos_ids, until=step_ids, active=where,
        )  # fmt: skip
        drawn[role] += many
        return new

    while not h.done.all():
        going = ~h.done
        drafted = grow(0, going)
        keep = going & (hypotheses.judged(judge, drafted, going) >= delta)
        written = grow(1, going & ~keep)  # from the same h as the draft
        h = hypotheses.put(hypotheses.put(h, one, drafted, keep), one, written, ~keep)
        steps, kept, rounds = (
            steps + int(going.sum()),
            kept + int(keep.sum()),
            rounds + 1,
        )
    stats = {
        "tokens_sampled": sum(drawn), "draft_tokens": drawn[0],
        "target_tokens": drawn[1], "judge_calls": steps + h.ends.size,
        "rounds": rounds, "accepted": kept / steps,
    }  # fmt: skip
    h = hypotheses.with_logps(lm, h)
    return hypotheses.generated(h, hypotheses.judged(judge, h), stats)
