"""Verification of drafts under a guide, against the tilted distribution π* ∝ p exp(g).

One call of the target gives p at s_0 .. s_γ, one call of the guide evaluates the same
block. Every mode is *exact* for its own distribution.

  vector  g of all tokens is known: verify π* itself
  topk    of the `candidates` best tokens of p, scored in one wide call: verify π* on them
  lazy    the same distribution and the token rule; Σ p exp(g) is bounded by lo <= g <= hi,
          and candidates are scored until the outcome of the coin is certain
  thin    speculation supplies v ~ p, which is kept with probability exp(g(v) - hi), else
          drawn again from p: rejection sampling, on the whole vocabulary

Under topk and lazy only the best tokens of p have probability; under thin the normaliser
of π* is never computed.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignax.sampling import guides
from alignax.sampling.verify import residual, verify

MODES = {"vector": ("vector",), "scalar": ("topk", "lazy", "thin"), "block": ("block",)}
FAULTS = (  # messages, by the index that `fault` has
    "",
    "the guide gave NaN",
    "the guide left its bounds lo .. hi",
    "the guide kept nothing in all tries: hi is far above what it gives",
    "no token is left to draw: the grammar, the logit bias or the guide masks all",
)
NAN, BOUNDS, TRIES, EMPTY = 1, 2, 3, 4


class Round(NamedTuple):
    """The inputs of a verification."""

    keys: Array  # [N], never used before
    drafts: Int[Array, "N K"]
    q: Float[Array, "N K V"]  # the distributions that they were drawn from
    block: Int[Array, "N K1"]  # the last token, and the drafts
    start: Int[Array, " N"]  # position of block[:, 0]
    logits: Float[Array, "N K1 V"]  # the target's after each of them, processed
    live: Any  # [N] False: the row is done
    state: Any  # the guide's, before block
    probabilities: Callable[..., Array]  # of processed logits [N, K1, V]


class Verdict(NamedTuple):
    """The outcome: `stays` drafts are accepted, and `after` follows them."""

    stays: Int[Array, " N"]
    after: Int[Array, " N"]
    probabilities: Any  # [N, K1, V] of π*, or None where they are not known
    state: Any  # the guide's, before `after`
    fault: Int[Array, "N K1"]  # an index of FAULTS, for the token at each position
    scored: Int[Array, " N"]  # prefixes that the guide scored
    redraws: Int[Array, " N"]


def plain(r: Round, *, rule: str) -> Verdict:
    """No guide: π* = p."""
    p = r.probabilities(r.logits)
    stays, after, _ = verify(r.keys, r.drafts, p, r.q, rule=rule)
    none = jnp.zeros_like(stays)
    return Verdict(stays, after, p, None, _empty(r.logits), none, none)


def vector(r: Round, update, keep, *, rule: str) -> Verdict:
    """π* is known at every position."""
    logits, states = update(r.state, r.block, r.start, r.logits)
    target = r.probabilities(logits)
    stays, after, _ = verify(r.keys, r.drafts, target, r.q, rule=rule)
    none = jnp.zeros_like(stays)
    fault = _empty(logits)
    scored = none + r.block.shape[1]
    return Verdict(stays, after, target, keep(states, stays + 1), fault, scored, none)


def topk(r: Round, update, keep, *, rule: str, candidates: int) -> Verdict:
    """π* on the best tokens of p, all of which are scored."""
    n, k1, v = r.logits.shape
    _, states = update(r.state, r.block, r.start, None)
    logits = guides.over_best(
        update, _every(states, keep, n, k1), _ahead(r.start, k1),
        r.logits.reshape(n * k1, v), candidates,
    ).reshape(n, k1, v)  # fmt: skip
    target = r.probabilities(logits)
    stays, after, _ = verify(r.keys, r.drafts, target, r.q, rule=rule)
    none = jnp.zeros_like(stays)
    fault = _empty(logits)
    scored = none + k1 * (1 + candidates)
    return Verdict(stays, after, target, keep(states, stays + 1), fault, scored, none)


def lazy(r: Round, update, keep, *, candidates: int, lo, hi) -> Verdict:
    """As topk with the token rule; a candidate is scored only if a coin depends on it.

    The coin u accepts if u q Z < p exp(g), Z = Σ p exp(g) over the candidates. In
    logarithms, because exp(hi) may overflow float32.
    """
    n, k = r.drafts.shape
    row, spot = jnp.arange(n), jnp.arange(k)
    values, states = update(r.state, r.block, r.start, None)
    full = r.probabilities(r.logits)
    best, ids = jax.lax.top_k(full, candidates)
    p = best / best.sum(-1, keepdims=True)
    g = values[:, 1:]
    drafted = ids[:, :k] == r.drafts[:, :, None]
    mass = (p[:, :k] * drafted).sum(-1)
    mine = jnp.log(mass) + g
    coin_key, draw_key = _split(r.keys, 2)
    u = jax.vmap(lambda key: jax.random.uniform(key, (k,)))(coin_key)
    coin = jnp.log(u) + jnp.log(r.q[row[:, None], spot, r.drafts])

    def decide(j, mass, weight):
        """(accepted, rejected) for certain, after j candidates are scored."""
        left = jnp.log(jnp.where(j < candidates, jnp.maximum(1 - mass, 0), 0))
        low, high = jnp.logaddexp(weight, left + lo), jnp.logaddexp(weight, left + hi)
        return coin + high < mine, coin + low >= mine

    def needs(j, mass, weight):
        accepted, rejected = decide(j, mass, weight)
        before = jnp.cumsum(rejected, -1) - rejected == 0
        return before & ~accepted & ~rejected & r.live[:, None]

    here, ahead = _every(states, keep, n, k), _ahead(r.start, k)

    def score(carry):
        j, mass, weight, scored, fault = carry
        need = needs(j, mass, weight)
        one = jax.lax.dynamic_slice_in_dim(ids[:, :k], j, 1, 2).reshape(n * k, 1)
        value = guides.at_each(update, here, ahead, one).reshape(n, k)
        new = ~jax.lax.dynamic_index_in_dim(drafted, j, 2, False)
        share = jax.lax.dynamic_index_in_dim(p[:, :k], j, 2, False)
        share = jnp.where(new, share, 0.0)
        return (
            j + 1, mass + share, jnp.logaddexp(weight, jnp.log(share) + value),
            scored + (need & new).sum(-1),
            jnp.where(need, jnp.maximum(fault, fault_of(value, lo, hi)), fault),
        )  # fmt: skip

    scored = jnp.zeros(n, jnp.int32) + k + 1
    start = jnp.int32(0), mass, mine, scored, fault_of(g, lo, hi)
    j, mass, weight, scored, fault = jax.lax.while_loop(
        lambda c: (c[0] < candidates) & needs(*c[:3]).any(), score, start
    )
    accepted, _ = decide(j, mass, weight)
    stays = jnp.cumprod(accepted, -1).sum(-1)
    # the token after them: all candidates of this one position are scored
    at = stays + 1
    some = ids[row, stays]
    value = guides.at_each(update, keep(states, at), r.start + at, some)
    star = jax.nn.softmax(jnp.log(p[row, stays]) + value, -1)
    whole = jnp.zeros_like(full[:, 0]).at[row[:, None], some].set(star)
    rest = residual(whole, r.q[row, jnp.minimum(stays, k - 1)])
    rest = jnp.where((stays < k)[:, None], rest, whole)
    after = jax.vmap(jax.random.categorical)(draw_key, jnp.log(rest))
    last = fault_of(value, lo, hi).max(-1)
    fault = jnp.maximum(_places(fault, stays, last), _empty(r.logits))
    scored = scored + candidates
    redraws = jnp.zeros_like(stays)
    return Verdict(stays, after, None, keep(states, at), fault, scored, redraws)


def thin(r: Round, update, keep, *, candidates: int, hi, tries: int) -> Verdict:
    """Tokens of p, kept with probability exp(g - hi); `candidates` at a time.

    Where p has only one token, that is taken without a test.
    """
    n, k = r.drafts.shape
    row, spot = jnp.arange(n), jnp.arange(k)
    values, states = update(r.state, r.block, r.start, None)
    p = r.probabilities(r.logits)
    sure = (p > 0).sum(-1) == 1
    g = values[:, 1:]
    coin_key, draw_key = _split(r.keys, 2)
    u, w = jax.vmap(lambda key: jax.random.uniform(key, (2, k)), out_axes=1)(coin_key)
    supplied = u * r.q[row[:, None], spot, r.drafts] < p[row[:, None], spot, r.drafts]
    kept = (w < jnp.exp(g - hi)) | sure[:, :k]
    stays = jnp.cumprod(supplied & kept, -1).sum(-1)
    stop = jnp.minimum(stays, k - 1)
    here = p[row, stays]
    refused = (stays < k) & ~supplied[row, stop]
    first = jnp.where(refused[:, None], residual(here, r.q[row, stop]), here)
    at = stays + 1
    state, certain = keep(states, at), sure[row, stays]

    def more(carry):
        i, open_, after, fault, redraws = carry

        def draw(key, first, here):
            names, leader, coins = jax.random.split(jax.random.fold_in(key, i), 3)
            some = jax.random.categorical(names, jnp.log(here), shape=(candidates,))
            one = jax.random.categorical(leader, jnp.log(first))
            some = some.at[0].set(jnp.where(i == 0, one, some[0]))
            return some, jax.random.uniform(coins, (candidates,))

        some, coins = jax.vmap(draw)(draw_key, first, here)
        value = guides.at_each(update, state, r.start + at, some)
        good = (coins < jnp.exp(value - hi)) | certain[:, None]
        which = jnp.argmax(good, -1)
        found = good.any(-1)
        after = jnp.where(open_ & found, some[row, which], after)
        seen = jnp.arange(candidates) <= jnp.where(found, which, candidates)[:, None]
        bad = jnp.where(seen, fault_of(value, -jnp.inf, hi), 0).max(-1)
        fault = jnp.where(open_, jnp.maximum(fault, bad), fault)
        redraws += jnp.where(open_, jnp.where(found, which, candidates), 0)
        return i + 1, open_ & ~found & (fault == 0), after, fault, redraws

    none = jnp.zeros(n, jnp.int32)
    _, open_, after, last, redraws = jax.lax.while_loop(
        lambda c: c[1].any() & (c[0] * candidates < tries), more,
        (jnp.int32(0), jnp.broadcast_to(r.live, (n,)), none, none, none),
    )  # fmt: skip
    last = jnp.where(open_, TRIES, last)
    fault = _places(fault_of(g, -jnp.inf, hi), stays, last)
    fault = jnp.maximum(fault, _empty(r.logits))
    scored = none + k + 1 + redraws + 1
    killed = ((stays < k) & ~refused).astype(jnp.int32)
    return Verdict(stays, after, None, state, fault, scored, redraws + killed)


def judge(mode: str, guide: Any, **how: Any) -> Callable[[Round], Verdict]:
    """The mode as a function of a Round alone.

    Args:
      mode: of MODES; '' and 'block' do not tilt single tokens.
      guide: (init, update, keep), or None.
      **how: rule, candidates, lo, hi, tries: the mode takes those that it needs.
    """
    tilted: dict[str, Callable[..., Verdict]] = {
        "vector": vector, "topk": topk, "lazy": lazy, "thin": thin,
    }  # fmt: skip
    function = tilted.get(mode, plain)
    takes = inspect.signature(function).parameters
    more = {k: v for k, v in how.items() if k in takes}
    parts = () if function is plain else guide[1:]
    return lambda r: function(r, *parts, **more)


def _split(keys, many):
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, many))(keys), 1, 0)


def _every(states, keep, n, k):
    """States [N * K] after each of the first K tokens of a block."""
    each = [keep(states, jnp.full(n, i + 1)) for i in range(k)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x, 1), *each)
    return jax.tree.map(lambda x: x.reshape(n * k, *x.shape[2:]), stacked)


def _ahead(start, k):
    """Positions [N * K] of the token after each of the first K tokens of a block."""
    return (start[:, None] + 1 + jnp.arange(k)).reshape(-1)


def _empty(logits):
    """Faults [N, K1] of distributions without a token to draw."""
    best = logits.max(-1)  # NaN if any is
    return jnp.where(jnp.isnan(best), NAN, jnp.where(jnp.isfinite(best), 0, EMPTY))


def _places(drafted, stays, last):
    """Faults [N, K1] of the accepted drafts [N, K], and of the token after them [N]."""
    at = jnp.arange(drafted.shape[1] + 1)
    stay = jnp.where(at[:-1] < stays[:, None], drafted, 0)
    wide = jnp.pad(stay, ((0, 0), (0, 1)))
    return jnp.where(at == stays[:, None], last[:, None], wide)


def fault_of(g: Array, lo: Array | float, hi: Array | float) -> Array:
    """Faults of a guide's values against its bounds, with a tolerance for rounding."""
    slack = 1e-4
    out = (g > hi + slack) | (g < lo - slack)
    return jnp.where(jnp.isnan(g), NAN, jnp.where(out, BOUNDS, 0))
