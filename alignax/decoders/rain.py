"""RAIN: a frozen model, aligned by tree search over its own partial responses.

Li et al. 2023, https://arxiv.org/abs/2309.07124

  search  a tree of sets of 1, 2, 4, 10, 10, .. tokens (`tree_search`), whose leaves are
          continued to the end of a clause and judged in [-1, 1]
  emit    the most visited set, keep its subtree, and search on

It helps a model that is moderately harmful, and fails where harmful tokens dominate the
prior: decisions are by visits, and visits depend on the prior too.

Differs from the paper: the constants are those of the authors' code where the two differ.
The evaluation is a judge, an argument; `rewards.self_evaluation` is the paper's, the
mean of two votes of the model with the options swapped. Texts are compared by `embed`, or by the mean of the model's final
hidden states; the paper has a sentence embedder, for which `alike` was chosen. Masses of
token sets are under the full distribution, not that of the top tokens. A set that is added
later is one more token or sample; its prior is its mass relative to the others'.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated
from alignax.search import hypotheses, tree_search
from alignax.search.hypotheses import Hypotheses, Judge
from alignax.search.tree_search import Text

RANGES = {
    "sets": "[1, inf)", "top_k": "[1, inf)", "rollout": "[1, inf)", "heat": "(0, inf)",
    "simulations": "[1, inf)", "extra": "[1, inf)", "uniform": "[0, 1]",
    "share": "[0, 1]", "exploration": "[0, inf)",
    "settled_value": "(-inf, inf)", "alike": "(-inf, inf)",
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
    embed: Callable[..., Any] | None = None,
    clause_ids: Sequence[int] = (),
    sizes: Sequence[int] = (1, 2, 4, 10),
    sets: int = 10,
    top_k: int = 15,
    heat: float = 1.0,
    rollout: int = 32,
    exploration: float = 2.0,
    simulations: int = 50,
    extra: int = 15,
    settled_visits: int = 6,
    settled_value: float = 0.8,
    uniform: float = 0.25,
    alike: float = 0.95,
    share: float = 0.2,
    most: int = 20,
    spread: float = 0.03,
) -> Generated:
    """Tree search. *Approximate*: the response is a heuristic's choice.

    Args:
      lm: the policy, also of rollouts; its hidden states if `embed` is None.
      lms: not used.
      prompts: ids [B, P], right-padded; one after the other, each with its own tree.
      lengths: real tokens of each prompt, [B].
      key: `jax.random.key`.
      max_new: most tokens of a response.
      judge: evaluation in [-1, 1] of a response or its beginning; once per text.
      temperature: of rollouts.
      eos_ids: end a response.
      stops: over the vocabulary; they also end a response.
      embed: batch [1, K, T] -> [1, K, D]: of the tokens where the mask is True.
      clause_ids: end a rollout; a text that ends in one has no rollout.
      sizes: tokens of a set at depth 0, 1, ..; the last one at all greater depths.
      sets: children of a leaf: its most likely tokens; of sets of several tokens, the greedy
        one and samples.
      top_k: of samples.
      heat: temperature of samples.
      rollout: most tokens of a rollout.
      exploration: c of PUCT.
      simulations: before a decision, counting those of the subtree that was kept.
      extra: fewest new simulations per decision.
      settled_visits: a decision is early if the best has more visits than this
      settled_value: and a higher value than this.
      uniform: share of the root's priors.
      alike: least cosine at which a sibling is updated with a value; above 1 is off.
      share: of a visit, for such a sibling.
      most: children of a node, with those added later.
      spread: norm of the variance of children's embeddings, per token, below which one is
        added if all values are below 0.

    Returns:
      Generated, G = 1; feedback is the judge's score of the response, old_logps None.
      stats: 'tokens_sampled', 'judge_calls' (texts judged), 'simulations'.

    Raises:
      ValueError: an argument out of its range, or a judge outside [-1, 1].
    """
    del lms
    if min(sets, top_k, rollout, simulations, extra) < 1 or heat <= 0 or not sizes:
        raise ValueError(
            f"sets={sets}, top_k={top_k}, rollout={rollout}, simulations={simulations}, "
            f"extra={extra}, heat={heat}, sizes={sizes}; expected counts >= 1, heat > 0 "
            "and some sizes"
        )
    rules = tree_search.Rules(
        exploration, simulations, extra, settled_visits, settled_value, uniform, alike,
        share, most, spread,
    )  # fmt: skip
    stats = dict.fromkeys(("tokens_sampled", "judge_calls", "simulations"), 0)
    every = hypotheses.start(prompts, lengths, max_new, stops)
    responses = []
    for b in range(len(every.ends)):
        empty = hypotheses.prompt(every, b)
        world = _world(
            lm, empty, jax.random.fold_in(key, b), judge, embed, frozenset(eos_ids),
            frozenset(clause_ids), tuple(sizes), sets, top_k, heat, temperature, rollout,
            most, stats,
        )  # fmt: skip
        text, many = tree_search.respond(world, rules)
        stats["simulations"] += many
        responses.append(_response(empty, text, eos_ids))
    h = hypotheses.concatenate(responses, axis=0)
    h = hypotheses.with_logps(lm, h)
    scores = hypotheses.judged(judge, h, low=-1.0, high=1.0)
    stats["judge_calls"] += scores.size
    return hypotheses.generated(h, scores, stats)


def _response(empty: Hypotheses, text: Text, eos_ids) -> Hypotheses:
    """The response `text` [1, 1], without its log-probabilities."""
    tokens, first = empty.tokens.copy(), int(empty.starts[0, 0])
    tokens[0, 0, first : first + len(text)] = text
    h = hypotheses.until_stop(empty, tokens, empty.starts + len(text))
    by_eos = np.array([[bool(text) and text[-1] in eos_ids]])
    return h._replace(ended=h.ended | by_eos)


def _world(
    lm, empty, key, judge, embed, eos_ids, clause_ids, sizes, sets, top_k, heat,
    temperature, rollout, most, stats,
) -> tree_search.World:  # fmt: skip
    """The functions of one tree, by calls of the sampler with constant shapes."""
    first, calls = int(empty.starts[0, 0]), itertools.count()
    judged: dict[Text, float] = {}
    heats = np.full((1, sets), heat)
    heats[0, 0] = 0

    def draw(text, **how):
        h, many = hypotheses.extend(
            lm, _response(empty, text, eos_ids), jax.random.fold_in(key, next(calls)),
            eos_ids=sorted(eos_ids), **how,
        )  # fmt: skip
        stats["tokens_sampled"] += many
        return h

    def size_at(depth):
        return sizes[min(depth, len(sizes) - 1)]

    def most_likely(text):
        logps, ids = hypotheses.next_best(
            lm, _response(empty, text, eos_ids), max(sets, most)
        )
        masses = np.exp(logps[0, 0].astype(np.float64))
        return [((int(i),), p) for i, p in zip(ids[0, 0], masses, strict=True)]

    def samples(text, size):
        """The greedy set, then others: each once, with its mass."""
        h = draw(
            text, tokens=max(sizes), limit=size, group=sets, temperature=heats,
            sampling={"top_k": top_k},
        )  # fmt: skip
        begin = first + len(text)
        masses = np.exp(h.raw[0].sum(-1, dtype=np.float64))
        found: dict[Text, float] = {}
        for ids, end, mass in zip(h.tokens[0], h.ends[0], masses, strict=True):
            found.setdefault(tuple(ids[begin:end].tolist()), mass)
        return list(found.items())

    def propose(text, depth):
        size = size_at(depth)
        if size == 1:
            return most_likely(text)[:sets]
        found = samples(text, size)
        (greedy, mass), others = found[0], [m for _, m in found[1:]]
        if others:  # bounded, so that the other sets are tried too
            mass = max(min(mass, sum(others)), max(others) + min(others))
        return [(greedy, mass), *found[1:]]

    def another(text, depth, known):
        size = size_at(depth)
        found = most_likely(text) if size == 1 else samples(text, size)
        return next((x for x in found if x[0] not in known), None)

    def over(text):
        return bool(_response(empty, text, eos_ids).done[0, 0])

    def evaluate(text):
        whole = text
        if not over(text) and not (text and text[-1] in clause_ids):
            h = draw(
                text, tokens=rollout, temperature=temperature, until=sorted(clause_ids)
            )
            whole = tuple(h.tokens[0, 0, first : h.ends[0, 0]].tolist())
        if whole not in judged:
            h = _response(empty, whole, eos_ids)
            judged[whole] = float(hypotheses.judged(judge, h, low=-1.0, high=1.0)[0, 0])
            stats["judge_calls"] += 1
        return judged[whole], whole

    def embeddings(text, begins):
        if not begins:
            return np.zeros((0, 1))
        h = _response(empty, text, eos_ids)
        if embed is None:
            width = hypotheses.bucket(int(h.ends[0, 0]), h.tokens.shape[2])
            states = np.asarray(_states(lm, h.tokens[0, :, :width]))[0]
            ends = h.ends[0, 0]
            return np.stack([states[first + i : ends].mean(0) for i in begins])
        batch = hypotheses.as_batch(hypotheses.take(h, np.zeros((1, len(begins)), int)))
        late = np.arange(h.tokens.shape[2]) >= first + np.array(begins)[:, None]
        return np.asarray(embed(batch._replace(mask=batch.mask & late)))[0]

    return tree_search.World(propose, another, evaluate, embeddings, over)


@jax.jit
def _states(lm, tokens):
    return transformer.hidden(lm, tokens)[0]
