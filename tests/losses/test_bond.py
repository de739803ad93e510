"""BOND: its two ends are known losses, and its gradient is that of the Jeffreys mix."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_rollouts import (
    OLD,
    assert_oracle,
    cost,
    gradient,
    group,
    random_rollout,
    slopes,
)
from oracles import losses as oracle

from alignax.batch import Scores, from_groups
from alignax.configs import bond as bond_config
from alignax.configs import vbon
from alignax.losses import bond, policy_gradient, sft
from alignax.shaping import ctrl
from alignax.training import build

loss = bond.loss


def test_golden_number():
    """Ratios 1.5 | 1 with advantages 2 | -1, two own responses; the anchor's has -2 nats.

    Gains are 1.2 * 2 and -1; the anchor's own ratio and advantage are not read.
    """
    rows = [[math.log(1.5)], [0.0], [0.0, 0.0]], [[2], [-1], [9, 9]]
    own = -(2.4 - 1) / 2
    assert cost(loss, *rows, gamma=0.25) == pytest.approx(0.75 * 2 + 0.25 * own)
    assert OLD == -1.0  # nats of each of the anchor's tokens


def rollout(make_batch):
    """Three own responses and the anchor's, all valid, so that no mean is another."""
    policy, batch = random_rollout(make_batch, g=4)
    return policy, batch._replace(valid=jnp.ones_like(batch.valid), extra=None)


def slots(tree, at):
    return jax.tree.map(lambda x: x[:, at], tree)


def test_at_one_it_is_a_policy_gradient_on_the_own_responses(make_batch):
    """The constant reduction divides by the tokens of a row, which this one does not."""
    policy, batch = rollout(make_batch)
    own = slots((policy, batch), slice(0, -1))
    length = batch.mask.shape[-1]
    got, _ = loss(policy, batch, gamma=1.0)
    want, _ = policy_gradient.loss(*own, reduction="constant")
    np.testing.assert_allclose(got, want * length, rtol=1e-5)
    got = gradient(loss, policy, batch, gamma=1.0)
    want = gradient(policy_gradient.loss, *own, reduction="constant") * length
    np.testing.assert_allclose(got[:, :-1], want, rtol=1e-5, atol=1e-7)
    assert not got[:, -1].any()


def test_at_zero_it_is_fine_tuning_on_the_last_response(make_batch):
    policy, batch = rollout(make_batch)
    best = slots((policy, batch), slice(-1, None))
    length = batch.mask.shape[-1]
    got, metrics = loss(policy, batch, gamma=0.0)
    want, _ = sft.loss(*best, reduction="constant")
    np.testing.assert_allclose(got, want * length, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], got, rtol=1e-6)
    got = gradient(loss, policy, batch, gamma=0.0)
    np.testing.assert_array_equal(got[:, -1], -1.0 * batch.mask[:, -1])
    assert not got[:, :-1].any()


def test_random_rollouts_are_those_of_the_oracle(make_batch):
    hyper = dict(gamma=0.3, clip_low=0.1, clip_high=0.3)
    assert_oracle(loss, oracle.bond, make_batch, **hyper)


def test_a_prompt_without_its_best_of_n_learns_from_its_own():
    rows = [[0.0], [0.0], [0.0]], [[1], [-2], [0]]
    got = slopes(loss, *rows, gamma=0.5, valid=[True, True, False])
    np.testing.assert_allclose(got, [-0.5 * 1 / 2, 0.5 * 2 / 2, 0.0])
    got = slopes(loss, *rows, gamma=0.5, valid=[True, False, True])
    np.testing.assert_allclose(got, [-0.5, 0.0, -0.5])


def test_metrics_are_of_the_own_responses():
    policy, batch = group([[1.0], [0.0], [5.0]], [[1], [1], [0]])
    metrics = loss(policy, batch)[1]
    assert float(metrics["clipped"][0]) == pytest.approx(1 / 2)
    assert float(metrics["ratio"][0]) == pytest.approx((math.e + 1) / 2, rel=1e-6)
    assert float(metrics["nll"][0]) == pytest.approx(-4.0)


def test_a_batch_without_an_anchor_is_an_error():
    with pytest.raises(ValueError, match="one response per prompt"):
        loss(*group([[0.0]], [[1]]))


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        ("ctrl", "n", 8, r"shaping.ctrl.n is 8, expected 4, which is rollout.anchor_s"),
        ("ctrl", "transform", "exp", "shaping.ctrl.transform is exp, expected best_of"),
        ("kl", "beta", 0.1, r"shaping.kl.beta is 0.1, expected 1"),
        ("kl", None, None, "shaping.kl.beta is absent, expected 1"),
    ],
)
def test_a_reward_that_is_not_of_the_anchors_best_of_n_is_refused(
    name, key, value, message, tmp_path
):
    config = bond_config.get_config("smoke")
    with config.unlocked():
        if key is None:
            del config.shaping[name]
        else:
            config.shaping[name][key] = value
    with pytest.raises(ValueError, match=f"losses.bond.*{message}"):
        build.build(config, str(tmp_path))


def test_quantiles_of_the_reference_beside_an_anchor_that_moves_are_refused(tmp_path):
    config = bond_config.get_config("smoke")
    config.average, config.lms = 0.5, {"ref": "init", "ema": "average"}
    config.rollout.anchor = "ema"
    with pytest.raises(ValueError, match=r"rollout\.anchor='ema' moves, but"):
        build.build(config, str(tmp_path))


@pytest.mark.parametrize("config", [bond_config, vbon], ids=["bond", "vbon"])
def test_the_lowest_of_the_reference_samples_is_not_cut_off(config):
    c = config.get_config()
    k, n = c.rollout.reference_samples, 4
    batch = group([[0.0], [0.0]], [[0], [0]])[1]
    batch = batch._replace(feedback=jnp.float32([[-1.0, 0.5]]), advantages=None)
    hyper = {**c.shaping.ctrl, "n": n}
    got = ctrl.shape(batch, jnp.arange(float(k))[None], **hyper).sum(-1)
    want = (n - 1) * np.log(np.array([[0.5, 1.5]]) / (k + 1))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_expected_gradient_is_that_of_the_jeffreys_mix(gamma):
    """All outcomes of five, weighted by probability, against the divergences' own gradient.

    The advantage holds the reward (N - 1) log u and the penalty at a strength of 1; with u
    the quantile that makes it log π_N/π_anchor exactly, as it is without ties.
    """
    rng = np.random.default_rng(0)
    anchor, best = rng.dirichlet(np.ones(5), 2)
    logits = rng.normal(size=5)
    probs = np.exp(logits) / np.exp(logits).sum()
    reward = np.log(best / anchor)
    advantage = reward - np.log(probs / anchor)
    pairs = [(i, j) for i in range(5) for j in range(5)]
    weight = np.array([probs[i] * best[j] for i, j in pairs])
    batch = from_groups([[0]] * 25, [[[i], [j]] for i, j in pairs], length=2)
    batch = jax.tree.map(jnp.asarray, batch)
    each = jnp.asarray(advantage, jnp.float32)[batch.tokens]
    place = batch.mask.astype(jnp.float32)

    def logps(x):
        return jax.nn.log_softmax(x)[batch.tokens] * place

    start = jnp.asarray(logits, jnp.float32)
    each = each.at[:, -1].set(0.0) * place
    batch = batch._replace(old_logps=logps(start), advantages=each)

    def total(x):
        return (
            jnp.asarray(weight) * loss(Scores(logps(x)), batch, gamma=gamma)[0]
        ).sum()

    got = np.asarray(jax.grad(total)(start))
    # d KL(π_N ‖ π)/dx = π - π_N;  d KL(π ‖ π_N)/dx = π (log π/π_N - KL)
    ratio = np.log(probs / best)
    want = (1 - gamma) * (probs - best) + gamma * probs * (
        ratio - (probs * ratio).sum()
    )
    np.testing.assert_allclose(got, want, atol=2e-6)
