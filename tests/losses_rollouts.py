"""One prompt made of ratios and advantages, and random ones: for losses on rollouts."""

import jax
import jax.numpy as jnp
import numpy as np
from losses_compiled import graded
from oracles import losses as oracle

from alignax.batch import Batch, Scores, from_groups
from alignax.shaping import group_norm

OLD = -1.0  # log-probability of every token when it was sampled, nats


def group(
    log_rho, advantages, *, log_ref=None, valid=None, values=None, old_values=None,
    returns=None,
) -> tuple[Scores, Batch]:  # fmt: skip
    """One prompt; every argument but `valid` holds a list of tokens for each response.

    Args:
      log_rho: log π/π_old; its lengths are those of the responses.
      advantages: A.
      log_ref: log π/π_ref, 0 by default.
      valid: of each response, True by default.
      values, old_values, returns: of the critic, 0 by default.
    """
    lengths = [len(row) for row in log_rho]
    batch = from_groups([[1]], [[[2] * n for n in lengths]], length=max(lengths) + 2)

    def fill(rows):
        out = np.zeros(batch.mask.shape, np.float32)
        for g, row in enumerate(rows or []):
            out[0, g, batch.mask[0, g]] = row
        return out

    rho, old = fill(log_rho), np.where(batch.mask, np.float32(OLD), np.float32(0))
    batch = batch._replace(
        old_logps=old, advantages=fill(advantages), ref_logps=old + rho - fill(log_ref),
        extra={"old_values": fill(old_values), "returns": fill(returns)},
    )  # fmt: skip
    if valid is not None:
        batch = batch._replace(valid=np.array([valid]))
    policy = Scores(old + rho, state_values=fill(values))
    return jax.tree.map(jnp.asarray, (policy, batch))


def cost(loss, log_rho, advantages, **more):
    """What the loss of that prompt is; arguments of `group` apart from the loss's own."""
    columns, hyper = _apart(more)
    policy, batch = group(log_rho, advantages, **columns)
    return float(graded(loss, policy, batch, **hyper)[0][0])


def slopes(loss, log_rho, advantages, *, field="logps", **more):
    """Its derivatives by the scored tokens' log-probabilities, response after response."""
    columns, hyper = _apart(more)
    policy, batch = group(log_rho, advantages, **columns)
    grads = gradient(loss, policy, batch, field=field, **hyper)
    return grads[np.asarray(batch.mask)]


def _apart(more):
    own = ("log_ref", "valid", "values", "old_values", "returns")
    columns = {k: v for k, v in more.items() if k in own}
    return columns, {k: v for k, v in more.items() if k not in own}


def gradient(loss, policy, batch, *, field="logps", **hyper):
    """[B, G, T] of the sum over prompts, by a field of the scores."""

    return getattr(graded(loss, policy, batch, **hyper)[1], field)


def random_rollout(make_batch, *, spread=0.6, b=5, g=3) -> tuple[Scores, Batch]:
    """Prompts with up to `g` valid responses, the policy `spread` nats off the sampler."""
    batch = make_batch(b, g, 14)
    rng = np.random.default_rng(0)

    def column(low, high):
        x = rng.uniform(low, high, batch.mask.shape).astype(np.float32)
        return jnp.where(batch.mask, x, 0)

    valid = rng.random((b, g)) < 0.8
    valid[0] = False  # a whole prompt that was filtered
    valid[1:, 0] = True
    old = column(-3, -0.5)
    critic = {"old_values": column(-1, 1), "returns": column(-1, 1)}
    batch = batch._replace(
        old_logps=old, advantages=column(-1, 1), ref_logps=old + column(-1, 1),
        valid=jnp.asarray(valid), extra=critic,
    )  # fmt: skip
    return Scores(old + column(-spread, spread), state_values=column(-1, 1)), batch


def assert_oracle(loss, want, make_batch, **hyper):
    """Random rollouts: float32 sums of some ten tokens."""
    policy, batch = random_rollout(make_batch)
    got = loss(policy, batch, **hyper)[0]
    np.testing.assert_allclose(got, want(policy, batch, **hyper), rtol=2e-5, atol=2e-6)


def assert_first_step_is_reinforce(loss, make_batch, reduction, atol=1e-6, **hyper):
    """On the policy that sampled, whatever is clipped later."""
    policy, batch = random_rollout(make_batch, spread=0.0)
    # one advantage a response, as all outcome rewards have it
    one = jnp.where(batch.mask, batch.feedback[..., None] - 0.7, 0)
    batch = batch._replace(advantages=one)
    got = gradient(loss, policy, batch, reduction=reduction, **hyper)
    want = oracle.reinforce(batch.advantages, batch.mask, batch.valid, reduction)
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(np.where(batch.mask, got, 0), want, rtol=1e-5, atol=atol)


def assert_no_variance_no_gradient(loss, make_batch, **hyper):
    """The advantages of a group whose responses earned the same."""
    policy, batch = random_rollout(make_batch)
    feedback = jnp.broadcast_to(jnp.float32([[0.3]]), batch.feedback.shape)
    raw = batch._replace(feedback=feedback.at[2, 1].set(1.0), advantages=None)
    batch = batch._replace(advantages=group_norm.shape(raw, None))
    got = gradient(loss, policy, batch, **hyper)
    assert np.abs(got[2]).max() > 1e-3  # there is a difference here
    np.testing.assert_array_equal(np.delete(got, 2, 0), 0)
