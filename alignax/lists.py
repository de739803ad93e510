"""Lists of responses: inputs, shared terms and metrics of losses on groups of two or more.

Feedback orders the responses of a prompt, higher is better. Arrays [b, i, j] are over
pairs of responses. Tied responses are not ordered, nor is an invalid response.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

CONSTRAINTS = ("none", "detached", "boundary")  # of `constrained_alignment`


def check(batch: Batch, what: str, hint: str = "") -> None:
    """Raises ValueError if the batch holds a single response per prompt.

    Args:
      batch: [B, G, T].
      what: start of the message, such as 'rrhf ranks'; 'responses' follows.
      hint: end of the message.
    """
    if batch.tokens.shape[1] < 2:
        more = f", {hint}" if hint else ""
        raise ValueError(
            f"{what} responses, but the batch holds one per prompt: use data with two or "
            f"more (from a file config.data.kind='groups', or 'pairs'){more}"
        )


def above(batch: Batch) -> Bool[Array, "B G G"]:
    """True at [b, i, j] where response i has the higher feedback and both are valid."""
    higher = batch.feedback[:, :, None] > batch.feedback[:, None, :]
    return higher & batch.valid[:, :, None] & batch.valid[:, None, :]


def best(batch: Batch) -> Bool[Array, "B G"]:
    """True on the valid responses with the highest feedback: several if they tie."""
    return batch.valid & ~above(batch).any(1)


def gaps(x: Float[Array, "B G"]) -> Float[Array, "B G G"]:
    """x_i - x_j at [b, i, j]."""
    return x[:, :, None] - x[:, None, :]


def mean_log_probs(policy: Scores, batch: Batch) -> Float[Array, "B G"]:
    """1/|y| Σ_t log π(y_t), nats per scored token; the end-of-turn token counts."""
    return masked.token_mean(policy.logps, batch)


def first(x: Float[Array, "B G"], where: Bool[Array, "B G"]) -> Float[Array, " B"]:
    """x of the first response where `where`; 0 for a prompt without one."""
    index = jnp.argmax(where, -1)[:, None]
    return jnp.take_along_axis(jnp.where(where, x, 0.0), index, -1)[:, 0]


def best_nll(score: Float[Array, "B G"], batch: Batch) -> Float[Array, " B"]:
    """-score of the best response (the first of several); 0 without a valid response."""
    return -first(score, best(batch))


def log1p_sum_exp(
    where: Bool[Array, "B G G"],
    *terms: Float[Array, "B G G"],
    axis: int | tuple[int, ...] = -1,
) -> Float[Array, "B ..."]:
    """log(1 + Σ exp(term)) over the pairs where `where`, of one term or several.

    Args:
      where: the pairs that count.
      *terms: finite there, however large.
      axis: axes of the sum: -1 for the second response of a pair, (1, 2) for all pairs.
    """
    term = jnp.concatenate([jnp.where(where, t, -jnp.inf) for t in terms], -1)
    # relative to the largest exponent, so that exp does not overflow
    top = jax.lax.stop_gradient(jnp.maximum(term.max(axis, keepdims=True), 0.0))
    spread = jnp.exp(term - top).sum(axis)
    top = top.squeeze(axis)
    return top + jnp.log(jnp.exp(-top) + spread)


def outcome(
    batch: Batch,
    value: Float[Array, " B"],
    pairs: Bool[Array, "B G G"],
    gap: Float[Array, "B G G"],
    **more: Float[Array, " B"],
) -> tuple[Float[Array, " B"], Metrics]:
    """Values and metrics of a loss on lists.

    Args:
      batch: valid [B, G].
      value: the loss of each prompt.
      pairs: True on the pairs that the loss compares, the better response first.
      gap: score of the first response of a pair minus that of the second.
      **more: further metrics.

    Returns:
      `value`, 0 without a valid response, and metrics 'accuracy' (share of the pairs that
      are ranked right, ties count half; 0.5 where there are none), 'margin' (mean gap of
      a pair) and `more`.
    """
    ahead = jnp.where(pairs, gap, 0.0)
    compared = jnp.maximum(pairs.sum((1, 2)), 1)
    return jnp.where(batch.valid.any(-1), value, 0.0), {
        "accuracy": (jnp.sign(ahead).sum((1, 2)) / compared + 1) / 2,
        "margin": ahead.sum((1, 2)) / compared,
        **more,
    }


def hinge(
    batch: Batch,
    score: Float[Array, "B G"],
    asked: Float[Array, "B G G"] | float,
    lam: Number,
) -> tuple[Float[Array, " B"], Metrics]:
    """Σ_{i above j} max(0, asked_ij - (s_i - s_j)) - λ s_best.

    Args:
      batch: feedback, valid [B, G].
      score: s.
      asked: margin asked of each pair, in units of s.
      lam: λ, weight of the best response's score.

    Returns:
      As `outcome`, of s; 'nll' (-s_best).
    """
    ordered, gap = above(batch), gaps(score)
    short = jnp.where(ordered, jax.nn.relu(asked - gap), 0.0)
    nll = best_nll(score, batch)
    return outcome(batch, short.sum((1, 2)) + lam * nll, ordered, gap, nll=nll)


def plackett_luce(
    batch: Batch, reward: Float[Array, "B G"]
) -> tuple[Float[Array, " B"], Metrics]:
    """Σ_k log [1 + Σ_{i below k} exp(r_i - r_k)]: nats, 0 where nothing is ordered.

    Args:
      batch: feedback, valid [B, G].
      reward: r.

    Returns:
      As `outcome`, of r.
    """
    ordered, gap = above(batch), gaps(reward)  # [b, k, i]: i below k
    return outcome(batch, log1p_sum_exp(ordered, -gap).sum(-1), ordered, gap)


def constrained_alignment(
    score: Float[Array, "B G"],
    pairs: Bool[Array, "B G G"],
    constraint: str,
    slack: Number,
) -> Float[Array, " B"]:
    """AFT's log [1 + Σ_{(i, j) in pairs} (exp(s_j - s_i) + exp(T_ij - s_j))].

    T_ij = 2 B_j - s_i is a constant for the gradient, and the boundary of response j is
    B_j = min_i s_i - slack, over the responses i that are paired with it. Constraint
    'boundary' is this; 'detached' drops the second exponential and the gradient of s_j in
    the first; 'none' only drops the second exponential.

    Args:
      score: s.
      pairs: True at [b, i, j] where response i is to stay above response j.
      constraint: one of CONSTRAINTS.
      slack: read by 'boundary' alone, in units of s.
    """
    better, worse = score[:, :, None], score[:, None, :]
    pushed = jax.lax.stop_gradient(worse) if constraint == "detached" else worse
    terms = [pushed - better]
    if constraint == "boundary":
        boundary = jnp.where(pairs, better, jnp.inf).min(1, keepdims=True) - slack
        terms.append(jax.lax.stop_gradient(2 * boundary - better) - worse)
    return log1p_sum_exp(pairs, *terms, axis=(1, 2))


def check_constraint(constraint: str, what: str) -> None:
    """Raises ValueError, beginning with `what`, unless `constraint` is in CONSTRAINTS."""
    if constraint not in CONSTRAINTS:
        raise ValueError(
            f"{what}: unknown constraint {constraint!r}; known: {', '.join(CONSTRAINTS)}"
        )
