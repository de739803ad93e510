"""Draft models: they propose the tokens that a target then verifies.

`speculate` is exact for any proposal, as long as q is the distribution from which it was
drawn. The closer q is to the target's distribution, the more drafted tokens are accepted.

  model    a smaller LM; also the policy of a DPO pair, or `some_layers` of the target
  ngram    what followed the last tokens where they last occurred; calls no model
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Int

from alignax import logprob
from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling import decode, response_state
from alignax.sampling.response_state import ResponseState, Rules


class Draft(NamedTuple):
    """A pair of pure functions; `jax.tree_util.Partial` keeps their LMs arguments.

    Attributes:
      init: (prompts [B, P], lengths [B], length) -> state before the last token; B rows
        first in every leaf. It is indexed by position: entries after a row's last token
        are never read, so nothing is removed when proposals are rejected.
      propose: (state, Ask) -> (drafts [N, γ], q [N, γ, V], state), V = Ask.size.
      vocab_size: the only V that it can propose for; None: any.
    """

    init: Callable[..., Any]
    propose: Callable[..., Any]
    vocab_size: int | None


class Ask(NamedTuple):
    """The inputs of a draft in a round.

    Attributes:
      tokens: [N, T].
      ends: [N], where the first proposal goes.
      keys: [N], of this round.
      rules: the target's; a draft that follows them has more tokens accepted.
      response: state before the first proposal.
      gamma: how many to propose.
      tilt: (state, token [N], position [N], logits [N, V]) -> (logits, state) of the
        target's guide, if the draft is guided too.
      guide: that guide's state before the last token.
      size: V, how many ids the target decodes; None: as many as the draft.
    """

    tokens: Int[Array, "N T"]
    ends: Int[Array, " N"]
    keys: Array
    rules: Rules
    response: ResponseState
    gamma: int
    tilt: Callable[..., Any] | None = None
    guide: Any = None
    size: int | None = None


def model(lm: LM) -> Draft:
    """An LM of the target's tokenizer, under the target's logits processors.

    Its table may have another size: ids that the target lacks are not proposed, and ids
    that the draft lacks have q = 0, so that only the target itself draws them.
    """
    logprob.check_tokenizer(lm, "draft")
    return Draft(Partial(_init, lm), Partial(_sample, lm), None)


def ngram(vocab_size: int, longest: int = 3) -> Draft:
    """Prompt lookup: repeats what followed the longest earlier copy of the last tokens.

    Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding. Of equally long
    copies the last is used. A copy that reaches the end is continued with its period.
    Without a copy of even one token, the last token is proposed.

    Args:
      vocab_size: the target's.
      longest: most tokens of a copy that are compared, at least 1.

    Raises:
      ValueError: longest below 1.
    """
    if longest < 1:
        raise ValueError(f"longest={longest}, expected at least 1")
    lookup = Partial(_lookup, _Static(vocab_size, longest))
    return Draft(Partial(_nothing), lookup, vocab_size)


def some_layers(lm: LM, keep: Sequence[int]) -> LM:
    """The LM of some of its own layers, in their order, with its last norm and head.

    The first few are an early exit (Elhoushi et al. 2024,
    https://arxiv.org/abs/2404.16710), which is a good draft of a target that was trained
    for it; all but a few layers work without training (Zhang et al. 2023,
    https://arxiv.org/abs/2309.08168). The cost is len(keep) / L of the
    target's.

    Raises:
      ValueError: no layer, or one outside 0 .. L - 1, or out of order.
    """
    many, keep = lm.config.num_layers, tuple(keep)
    if not keep or list(keep) != sorted({*keep}) or not 0 <= keep[0] <= keep[-1] < many:
        raise ValueError(f"keep={keep}, expected layers of 0..{many - 1} in order")
    blocks = lm.params["blocks"]
    if isinstance(blocks, tuple):
        some = tuple(blocks[i] for i in keep)
    else:
        some = jax.tree.map(lambda p: p[np.array(keep)], blocks)
    flags = {k: getattr(lm.config, k) for k in ("local_layers", "rope_layers")}
    flags = {k: x and tuple(x[i] for i in keep) for k, x in flags.items()}
    config = dataclasses.replace(lm.config, num_layers=len(keep), **flags)
    return LM(config, {**lm.params, "blocks": some})


def as_draft(draft: LM | Draft) -> Draft:
    """An LM as `model`."""
    return model(draft) if isinstance(draft, LM) else draft


def _init(lm, prompts, lengths, length):
    del lengths  # padding is never attended
    cache = transformer.init_cache(lm.config, len(prompts), length)
    return transformer.hidden(lm, prompts, cache=cache)[1]


def _sample(lm, cache, ask):
    rules, temperature = ask.rules, ask.rules.processors.temperature
    size = lm.config.vocab_size if ask.size is None else ask.size
    lm = transformer.limit_ids(lm, size)
    lacks = ((0, 0), (0, size - lm.config.vocab_size))
    live = jnp.ones(len(ask.ends), bool)

    def step(carry, i):
        token, cache, response, guide = carry
        position = ask.ends - 1 + i
        h, cache = transformer.hidden(
            lm, token[:, None], position[:, None], cache=cache
        )
        logits = decode.read(lm, h, rules)[1][:, 0]
        logits = jnp.pad(logits, lacks, constant_values=-jnp.inf)
        logits = response_state.processed_logits(rules, response, logits)
        if ask.tilt is not None:
            logits, guide = ask.tilt(guide, token, position, logits)
        logits = response_state.force(rules, response, logits)
        keys = jax.vmap(jax.random.fold_in, (0, None))(ask.keys, i)
        new, logps = response_state.draw(keys, logits, temperature)
        new = new.astype(token.dtype)
        response = response_state.advance(rules, response, new, live)[0]
        return (new, cache, response, guide), (new, jnp.exp(logps))

    last = ask.tokens[jnp.arange(len(live)), ask.ends - 1]
    start = last, cache, ask.response, ask.guide
    # one step more than proposals: the last one may be accepted, and must be in the cache
    (_, cache, _, _), (drafts, q) = jax.lax.scan(step, start, jnp.arange(ask.gamma + 1))
    return drafts[:-1].T, jnp.moveaxis(q[:-1], 0, 1), cache


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    vocab_size: int
    longest: int


def _nothing(prompts, lengths, length):
    del prompts, lengths, length
    return ()


def _lookup(static, state, ask):
    n, t = ask.tokens.shape
    row = jnp.arange(n)[:, None]
    at, last = jnp.arange(t)[None], ask.ends[:, None] - 1
    same, length = jnp.ones((n, t), bool), jnp.zeros((n, t), jnp.int32)
    for back in range(static.longest):  # length of the copy that ends here
        have = (at >= back) & (at < last) & (last >= back)
        here = ask.tokens[row, jnp.maximum(at - back, 0)]
        want = ask.tokens[row, jnp.maximum(last - back, 0)]
        same &= have & (here == want)
        length += same
    copy = jnp.argmax(length * t + at * (length > 0), -1)[:, None]
    found = length[row, copy] > 0
    period = jnp.where(found, last - copy, 1)
    first = jnp.where(found, copy + 1, last)
    ahead = first + jnp.arange(ask.gamma)[None] % period
    drafts = ask.tokens[row, ahead]
    return drafts, jax.nn.one_hot(drafts, static.vocab_size), state
