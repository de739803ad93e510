"""Verification of drafted tokens: two *exact* rules of speculative sampling.

A draft x_1 .. x_γ was drawn from q(· | s_0) .. q(· | s_γ-1), s_i = s x_1 .. x_i; one call
of the target gives p(· | s_0) .. p(· | s_γ). A rule turns them into a plan: the
probability that exactly τ drafted tokens are accepted, and the distribution of the token
after them. A draw from the plan is a draw from p, for any q. p may be a guided target; q
has to be the distribution from which the draft was drawn, after all logits processors.

  token  (Leviathan et al. 2022, https://arxiv.org/abs/2211.17192)
         x_i is accepted with probability min(1, p/q) if all before it are; at the first
         that is not, the next token is from max(0, p - q), normalised
  block  (Sun et al. 2024, https://arxiv.org/abs/2403.10444)
         P_i = min(1, P_i-1 p/q), A_i = Σ max(0, P_i p - q), h_i = A_i / (A_i + 1 - P_i),
         h_γ = P_γ; τ is the last i for which a draw of probability h_i succeeds, and the
         next token is from max(0, P_τ p - q), normalised. On average it accepts at least
         as many.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TINY = 1e-9  # a residual of less mass is rounding: p and q are equal there


def token(
    drafts: Int[Array, " K"], p: Float[Array, "K1 V"], q: Float[Array, "K V"]
) -> tuple[Float[Array, " K1"], Float[Array, "K1 V"]]:
    """The plan of token verification, of one row.

    Args:
      drafts: K = γ ids.
      p: probabilities of the target at s_0 .. s_γ.
      q: probabilities that the drafts were drawn from, at s_0 .. s_γ-1.

    Returns:
      (stop, rows): stop[τ] is the probability that exactly τ drafts are accepted, rows[τ]
      the distribution of the token after them.
    """
    at = jnp.arange(drafts.shape[0])
    accept = jnp.minimum(1.0, _ratio(p[at, drafts], q[at, drafts]))
    one = jnp.ones(1, p.dtype)
    reach = jnp.concatenate([one, jnp.cumprod(accept)])  # all before i are accepted
    stop = reach * jnp.concatenate([1 - accept, one])
    return stop, jnp.concatenate([residual(p[:-1], q), p[-1:]])


def block(
    drafts: Int[Array, " K"], p: Float[Array, "K1 V"], q: Float[Array, "K V"]
) -> tuple[Float[Array, " K1"], Float[Array, "K1 V"]]:
    """The plan of block verification; see `token`."""
    at = jnp.arange(drafts.shape[0])
    ratios = _ratio(p[at, drafts], q[at, drafts])

    def step(mass, ratio):
        mass = jnp.minimum(1.0, mass * ratio)
        return mass, mass

    one = jnp.ones(1, p.dtype)
    mass = jnp.concatenate([one, jax.lax.scan(step, one[0], ratios)[1]])  # P_0 .. P_γ
    scaled = mass[:-1, None] * p[:-1]
    excess = jnp.maximum(scaled - q, 0).sum(-1)  # A_0 .. A_γ-1
    below = excess + 1 - mass[:-1]
    # 0 / 0 is p = q after a block that is surely accepted: so is the next token
    h = jnp.where(below > 0, excess / jnp.where(below > 0, below, 1), 1.0)
    # rounded above 1 it would make stop negative, and a certain stop impossible
    h = jnp.minimum(1.0, jnp.concatenate([one, h[1:], mass[-1:]]))
    later = jnp.cumprod((1 - h)[::-1])[::-1]  # no draw from i on succeeds
    stop = h * jnp.concatenate([later[1:], one])
    return stop, jnp.concatenate([residual(scaled, q, p[:-1]), p[-1:]])


RULES: dict[str, Callable] = {"token": token, "block": block}


def verify(
    keys: Array,
    drafts: Int[Array, "N K"],
    p: Float[Array, "N K1 V"],
    q: Float[Array, "N K V"],
    *,
    rule: str = "block",
) -> tuple[Int[Array, " N"], Int[Array, " N"], Float[Array, "N K1"]]:
    """Draws from the plan of every row.

    Args:
      keys: one per row, never used before, not even in a round that was rejected.
      drafts: see `token`, for N rows.
      p: likewise.
      q: likewise.
      rule: a name in RULES.

    Returns:
      (how many drafts are accepted, the token after them, the plan's stop).

    Raises:
      ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {sorted(RULES)}")
    stop, rows = jax.vmap(RULES[rule])(drafts, p, q)

    def draw(key, stop, rows):
        first, second = jax.random.split(key)
        stays = jax.random.categorical(first, jnp.log(stop))
        return stays, jax.random.categorical(second, jnp.log(rows[stays]))

    stays, after = jax.vmap(draw)(keys, stop, rows)
    return stays, after, stop


def _ratio(p, q):
    return p / jnp.maximum(q, jnp.finfo(q.dtype).tiny)


def residual(p: Array, q: Array, otherwise: Array | None = None) -> Array:
    """max(0, p - q) [..., V], normalised; `otherwise` (p) where its mass is 0."""
    rest = jnp.maximum(p - q, 0)
    total = rest.sum(-1, keepdims=True)
    otherwise = p if otherwise is None else otherwise
    return jnp.where(total < TINY, otherwise, rest / jnp.maximum(total, TINY))
