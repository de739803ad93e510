"""Several rewards, each normalised by itself: by hand, and what GRPO cannot tell apart."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from shaping_groups import group

from alignax.configs import gdpo as config_of_gdpo
from alignax.shaping import constant, gdpo, group_norm
from alignax.training import checks, loop


def made(**members):
    """Groups with these rewards [B, G] of members; their sum is the feedback."""
    members = {k: np.asarray(v, np.float32) for k, v in members.items()}
    batch = group(sum(members.values()), lengths=2)
    return batch._replace(
        extra={f"reward/{k}": jnp.asarray(v) for k, v in members.items()}
    )


def sums(out):
    return np.asarray(out).sum(-1)


def test_random_rewards_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5))
    batch = made(a=a, b=100 * b)
    got = sums(gdpo.shape(batch, None, weights=(("b", 0.5),), eps=1e-6))

    def normal(x):
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True, ddof=1)

    np.testing.assert_allclose(got, normal(a) + 0.5 * normal(b), rtol=1e-3, atol=1e-4)
    out = np.asarray(gdpo.shape(batch, None))
    assert (np.count_nonzero(out, -1) == 1).all()  # the last token


def test_it_tells_apart_what_the_normalised_sum_does_not():
    """(0, 0), (1, 0) and (0, 0), (1, 1): the second is better by two rewards."""
    batch = made(a=[[0, 1], [0, 1]], b=[[0, 0], [0, 1]])
    both = np.asarray(group_norm.shape(batch, None))[..., 2]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-3)
    got = sums(gdpo.shape(batch, None))
    np.testing.assert_allclose(got[1], 2 * got[0], rtol=1e-3)


def test_a_member_without_a_difference_adds_nothing_and_the_invalid_do_not_count():
    batch = made(a=[[0.0, 1.0, 9.0]], b=[[3.0, 3.0, 7.0]])
    batch = batch._replace(valid=jnp.array([[True, True, False]]))
    got = sums(gdpo.shape(batch, None, eps=1e-7))
    np.testing.assert_allclose(got, [[-(0.5**0.5), 0.5**0.5, 0]], rtol=1e-5)
    after = batch._replace(advantages=gdpo.shape(batch, None, eps=1e-7))
    every = np.asarray(constant.shape(after, None))[0, 1]
    np.testing.assert_allclose(every[every != 0], 0.5**0.5, rtol=1e-5)
    assert np.count_nonzero(every) == 2


def test_rewards_without_members_and_weights_of_none_are_refused():
    with pytest.raises(ValueError, match=r"set rollout\.reward to an ensemble"):
        gdpo.shape(group([[0.0, 1.0]]), None)
    with pytest.raises(
        ValueError, match=r"weights of \['c'\], which are not among \['a'\]"
    ):
        gdpo.shape(made(a=[[0.0, 1.0]]), None, weights=(("c", 1.0),))
    config = config_of_gdpo.get_config("smoke")
    config.rollout.reward = {"name": "constraints", "pattern": "a"}
    with pytest.raises(
        ValueError, match=r"'shaping.gdpo'\], which need several rewards"
    ):
        checks.check(config)


def test_a_run_hands_the_rewards_of_members_to_it(tmp_path, monkeypatch):
    seen = []
    real = gdpo.shape

    def spy(batch, baseline, **hyper):
        seen.append(sorted(batch.extra))
        return real(batch, baseline, **hyper)

    monkeypatch.setattr(gdpo, "shape", spy)
    config = config_of_gdpo.get_config("smoke")
    config.model.sizes = tiny.config().model.sizes
    config.plots, config.evals = False, {}
    loop.train(config, str(tmp_path / "run"))
    assert seen
    assert all({"reward/marked", "reward/right"} <= {*names} for names in seen)
