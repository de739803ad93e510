"""RAIN: a frozen model aligns itself by evaluating and rewinding what it says.

Li et al. 2023, https://arxiv.org/abs/2309.07124

  search  a tree of sets of 1, 2, 4, 10, 10, .. tokens (`rewind`), whose leaves are rolled
          out to the end of a clause and judged in [-1, 1]
  say     the most visited set, keep its subtree, and search on

It rescues a model that is moderately harmful, and fails where harm dominates the prior:
decisions are by visits, and visits follow the prior too.

Differs from the paper: the constants are those of the authors' code where the two differ.
The self-evaluation is a judge that is handed in, the mean of two votes with the options
swapped there. Texts are compared by an embedder that is handed in, or by the mean of the
model's final hidden states, where the paper has a sentence embedder: `alike` was made for
that one. Masses of token sets are under the model itself, not under its top tokens. One
that is added later is one more token or sample, with its mass beside the others'.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling.decode import Generated
from alignax.search import hypotheses, tree_search
from alignax.search.hypotheses import Hypotheses, Judge
from alignax.search.tree_search import Text

RANGES = {
    "sets": "[1, inf)", "top_k": "[1, inf)", "rollout": "[1, inf)", "heat": "(0, inf)",
    "simulations": "[1, inf)", "extra": "[1, inf)", "uniform": "[0, 1]",
    "share": "[0, 1]", "exploration": "[0, inf)",
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
    """Tree search with rewind. *Approximate*: what it says is a heuristic's choice.

    Args:
      lm: proposes, rolls out, and compares texts if `embed` is None.
      lms: not read.
      prompts: ids [B, P], right-padded; one after the other, each with its own tree.
      lengths: real tokens of each prompt, [B].
      key: `jax.random.key`.
      max_new: most tokens of a response.
      judge: evaluation in [-1, 1] of a response or its beginning; once for each text.
      temperature: of rollouts.
      eos_ids: end a response.
      embed: batch [1, K, T] -> [1, K, D]: of the tokens where the mask is True.
      clause_ids: end a rollout; a text that ends in one needs none.
      sizes: tokens of a set at depth 0, 1, ..; the last one at all that are deeper.
      sets: children of a leaf: its likeliest tokens, or of more than one token the greedy
        set and samples.
      top_k: samples are of this many tokens.
      heat: temperature of samples.
      rollout: most tokens of a rollout.
      exploration: c of PUCT.
      simulations: before a decision, counting those of the subtree that was kept.
      extra: fewest new ones.
      settled_visits: a decision is early if the best has more visits than this
      settled_value: and a higher value than this.
      uniform: share of the root's priors.
      alike: cosine from which on a sibling hears of a value; above 1 is off.
      share: of a visit that it hears.
      most: children of a node, with those added later.
      spread: norm of the variance of children's embeddings, per token, below which one is
        added if all values are below 0.

    Returns:
      Generated, G = 1; feedback is the judge's word on the response, old_logps None.
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
    every = hypotheses.start(prompts, lengths, max_new)
    said = []
    for b in range(len(every.ends)):
        empty = hypotheses.prompt(every, b)
        world = _world(
            lm, empty, jax.random.fold_in(key, b), judge, embed, frozenset(eos_ids),
            frozenset(clause_ids), tuple(sizes), sets, top_k, heat, temperature, rollout,
            most, stats,
        )  # fmt: skip
        text, many = tree_search.respond(world, rules)
        stats["simulations"] += many
        said.append(_saying(empty, text, eos_ids))
    h = hypotheses.concatenate(said, axis=0)
    h = hypotheses.with_logps(lm, h)
    scores = hypotheses.judged(judge, h, low=-1.0, high=1.0)
    stats["judge_calls"] += scores.size
    return hypotheses.generated(h, scores, stats)


def _saying(empty: Hypotheses, text: Text, eos_ids) -> Hypotheses:
    """The response `text` [1, 1], without its log-probabilities."""
    tokens, first = empty.tokens.copy(), int(empty.starts[0, 0])
    tokens[0, 0, first : first + len(text)] = text
    ended = np.array([[bool(text) and text[-1] in eos_ids]])
    return empty._replace(tokens=tokens, ends=empty.starts + len(text), ended=ended)


def _world(
    lm, empty, key, judge, embed, eos_ids, clause_ids, sizes, sets, top_k, heat,
    temperature, rollout, most, stats,
) -> tree_search.World:  # fmt: skip
    """The questions of one tree, by calls of the engine whose shapes never change."""
    first, calls = int(empty.starts[0, 0]), itertools.count()
    judged: dict[Text, float] = {}
    heats = np.full((1, sets), heat)
    heats[0, 0] = 0

    def draw(text, **how):
        h, many = hypotheses.extend(
            lm, _saying(empty, text, eos_ids), jax.random.fold_in(key, next(calls)),
            eos_ids=sorted(eos_ids), **how,
        )  # fmt: skip
        stats["tokens_sampled"] += many
        return h

    def size_at(depth):
        return sizes[min(depth, len(sizes) - 1)]

    def likeliest(text):
        logps, ids = hypotheses.next_best(
            lm, _saying(empty, text, eos_ids), max(sets, most)
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
            return likeliest(text)[:sets]
        found = samples(text, size)
        (greedy, mass), others = found[0], [m for _, m in found[1:]]
        if others:  # no set is so likely that the others are never tried
            mass = max(min(mass, sum(others)), max(others) + min(others))
        return [(greedy, mass), *found[1:]]

    def another(text, depth, known):
        size = size_at(depth)
        found = likeliest(text) if size == 1 else samples(text, size)
        return next((x for x in found if x[0] not in known), None)

    def over(text):
        return len(text) >= empty.max_new or (bool(text) and text[-1] in eos_ids)

    def evaluate(text):
        whole = text
        if not over(text) and not (text and text[-1] in clause_ids):
            h = draw(
                text, tokens=rollout, temperature=temperature, until=sorted(clause_ids)
            )
            whole = tuple(h.tokens[0, 0, first : h.ends[0, 0]].tolist())
        if whole not in judged:
            h = _saying(empty, whole, eos_ids)
            judged[whole] = float(hypotheses.judged(judge, h, low=-1.0, high=1.0)[0, 0])
            stats["judge_calls"] += 1
        return judged[whole], whole

    def embeddings(text, begins):
        if not begins:
            return np.zeros((0, 1))
        h = _saying(empty, text, eos_ids)
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
