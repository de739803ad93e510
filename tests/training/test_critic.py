"""A critic learns at a rate of its own what it cannot at the policy's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import plugin
from alignax.batch import LM
from alignax.logprob import score
from alignax.models.sharding import make_mesh, put_batch
from alignax.rollouts import rollout
from alignax.training import optim
from alignax.training.step import init_state, make_train_step

pytestmark = pytest.mark.slow


def trained(config, lm, target, batches, critic_lr) -> list[float]:
    """Explained variance before each step of PPO on rollouts whose returns `target` gives."""
    settings = tiny.config(num_steps=len(batches))
    settings.optim.lr, settings.optim.schedule = 1e-6, "constant"
    settings.optim.critic_lr = critic_lr
    tx = optim.from_config(settings)[1]
    mesh = make_mesh((1, 1, 1))
    loss = plugin.load("losses", "ppo", {"value_weight": 1.0})
    train = make_train_step(config, tx, loss, mesh)
    values = jax.jit(lambda lm, b: score(lm, b, needs=("state_values",)).state_values)
    state, found = init_state(lm.params, tx, mesh), []
    for batch in batches:
        old = values(LM(config, state.params), batch)
        returns = values(target, batch)
        batch = batch._replace(
            advantages=jnp.where(batch.mask, returns - old, 0.0),
            extra={"old_values": old, "returns": returns},
        )
        found.append(rollout.explained(jax.device_get(batch))["explained_variance"])
        state, _ = train(state, {}, put_batch(batch, mesh))
    return found


def test_explained_variance_rises_where_the_critic_has_a_rate_of_its_own(
    tiny_config, make_lm, make_batch
):
    """The returns are what another head says of the same states: a head can learn them.

    At the rate of the policy, which is 1e-6 for language models, the head stays at 0.
    """
    config = dataclasses.replace(tiny_config, value_head=True)
    lm = make_lm(config)
    target = LM(
        config, {**lm.params, "value_head": make_lm(config, 1).params["value_head"]}
    )
    zero = jax.tree.map(jnp.zeros_like, lm.params["value_head"])
    lm = LM(config, {**lm.params, "value_head": zero})
    batches = [
        jax.tree.map(jnp.asarray, make_batch(16, 2, 16, seed)) for seed in range(60)
    ]
    slow = trained(config, lm, target, batches, 0.0)
    fast = trained(config, lm, target, batches, 3e-2)
    assert slow[0] == fast[0] == pytest.approx(0, abs=1e-6)
    assert np.abs(slow).max() < 1e-2
    assert fast[10] > 0.1
    assert np.mean(fast[-5:]) > 0.8


def test_explained_variance_by_hand(make_batch):
    batch = make_batch(2, 2, 8)
    batch = batch._replace(valid=np.array([[True, True], [True, False]]))
    keep = batch.mask & batch.valid[..., None]
    rng = np.random.default_rng(0)
    returns, values = rng.normal(size=(2, *batch.mask.shape))
    values[~keep] = 1e6
    batch = batch._replace(extra={"returns": returns, "old_values": values})
    want = 1 - np.var((returns - values)[keep]) / np.var(returns[keep])
    assert rollout.explained(batch) == {"explained_variance": pytest.approx(want)}
    perfect = batch._replace(extra={"returns": returns, "old_values": returns + 3})
    assert rollout.explained(perfect)["explained_variance"] == pytest.approx(1)
    constant = batch._replace(extra={"returns": 0 * returns, "old_values": values})
    assert rollout.explained(constant) == {}
    assert rollout.explained(batch._replace(extra=None)) == {}
