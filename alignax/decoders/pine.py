"""PINE: responses that do not depend on the order in which a prompt gives its documents.

A prompt has its documents between separators:

  prefix SEP document 1 SEP .. SEP document K SEP suffix

Prefix and suffix keep their positions; the attention is in `alignax.models.pine`. For a
judge of two answers the prefix is the question, each answer is a document, and the
suffix asks for the contents of the better one, not for its number.

Source: Wang et al. 2024, https://arxiv.org/abs/2407.01100
Differs from the paper: as `models/pine.py`; several prompts are one batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from alignax.batch import LM
from alignax.models import pine
from alignax.sampling import decode
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated
from alignax.sampling.prefill import Reader
from alignax.search import hypotheses
from alignax.search.hypotheses import Judge
from alignax.text.documents import SEPARATOR, pieces
from alignax.text.tokenizer import Tokenizer

RANGES = {"group": "[1, inf)"}
AT_ONCE = True  # whole responses are drawn: they may begin with forced text


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
    tokenizer: Tokenizer | None = None,
    separator: str = SEPARATOR,
    group: int = 1,
    sampling: Mapping[str, Any] | None = None,
) -> Generated:
    """Samples responses whatever the order of documents. *Exact*, up to rounding.

    Args:
      lm: the policy; a model without local attention.
      lms: not used.
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      key: `jax.random.key`.
      max_new: most tokens of a response.
      judge: not used.
      temperature: of `generate`; 0 is greedy.
      eos_ids: end a response.
      stops: over the vocabulary; they also end a response.
      tokenizer: encodes the text between separators, each piece on its own.
      separator: before, between and after the documents; not a part of the input.
      group: G, responses to each prompt.
      sampling: further settings of `decode.generate`, but no prefill: add it to the suffix.

    Returns:
      Generated. old_logps are under PINE, raw_logps under the policy on the prompt as
      written, with separators. stats: those of `generate`,
      'tokens_sampled' and 'judge_calls' (0).

    Raises:
      ValueError: an argument out of its range, no tokenizer, a prompt that has fewer than
        two separators or whose text has other ids, an empty document or suffix, or a
        model with local layers.
    """
    del lms, judge
    if tokenizer is None:
        raise ValueError("pine splits text: it needs the tokenizer")
    if group < 1 or not separator:
        raise ValueError(
            f"group={group}, separator={separator!r}; expected group >= 1 and a separator"
        )
    out = decode.generate(
        lm, prompts, lengths, key, max_new=max_new, group=group,
        temperature=temperature, eos_ids=eos_ids, stops=stops,
        reader=reader(tokenizer, prompts, lengths, separator), **(sampling or {}),
    )  # fmt: skip
    stats = {"tokens_sampled": out.batch.mask.sum(), "judge_calls": 0, **out.stats}
    raw = hypotheses.score(lm, out.batch).logps
    return out._replace(raw_logps=raw, stats=stats)


def reader(text: Tokenizer, prompts: Any, lengths: Any, separator: str) -> Reader:
    """Prefill of these prompts by PINE, for `generate` and `speculate`. *Exact*.

    A draft and guide models read the prompts as written. A search may sample whole
    responses with this reader, but not continue one.

    Args:
      text: tokenizer of the model.
      prompts: ids [B, P], right-padded.
      lengths: [B].
      separator: as in `search`.

    Raises:
      ValueError: as in `search`.
    """
    prompts, lengths = np.asarray(prompts), np.asarray(lengths)
    asked = [row[:n].tolist() for row, n in zip(prompts, lengths, strict=True)]
    rows = [pieces(text, ids, separator=separator) for ids in asked]
    many = [sum(map(len, row)) for row in rows]
    count = 1 << (max(map(len, rows)) - 3).bit_length()
    # the pieces together may have more ids than the prompt
    width = max(prompts.shape[1], 1 << (max(many) - 1).bit_length())
    laid = [pine.lay(p, d, s, width, count) for p, *d, s in rows]
    ids = jnp.stack([jnp.asarray(ids) for ids, _ in laid])
    layouts = jax.tree.map(lambda *x: jnp.stack(x), *(layout for _, layout in laid))

    def check(others, sizes):
        rows = zip(others, sizes, strict=True)
        if [row[:n].tolist() for row, n in rows] != asked:
            raise ValueError(
                "the reader has the documents of other prompts; nothing may stand behind "
                "them: a prefill is part of their suffix, a response that has begun is not"
            )

    return Reader(Partial(_begin, ids, jnp.asarray(many), layouts), _step, check)


class _State(NamedTuple):
    cache: pine.Cache  # each field [N, ...]
    layout: pine.Layout  # likewise
    shift: Array  # [N] from a position in the row to one in the layout
    size: Array  # [N] tokens of the prompt in the layout
    last: Array  # [N] the last of them; in the row it may be another


def _begin(ids, many, layouts, lm, prompts, lengths, slots):
    room = ids.shape[1] + slots - prompts.shape[1]

    def one(args):
        tokens, size, layout = args
        layout = pine.lengthen(layout, room)
        h, cache = pine.read(lm, tokens, layout, pine.empty(lm.config, room))
        return h[size - 1][None], cache, layout

    h, cache, layout = jax.lax.map(one, (ids, many, layouts))
    last = jnp.take_along_axis(ids, many[:, None] - 1, 1)[:, 0]
    return h, _State(cache, layout, many - lengths, many, last)


def _step(lm, state, tokens, positions):
    at = positions + state.shift[:, None]
    again = at == state.size[:, None] - 1
    tokens = jnp.where(again, state.last[:, None], tokens)
    h, cache = jax.vmap(pine.read, (None, 0, 0, 0, 0))(
        lm, tokens, state.layout, state.cache, at[:, 0]
    )
    return h, state._replace(cache=cache)


check = pieces  # called on every prompt before weights are loaded
