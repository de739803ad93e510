"""Shapings that keep numbers from rollout to rollout: what they keep, and after a stop."""

import json

import numpy as np
import pytest
from test_rollout import equal, lm, make, one, sampler, steps  # noqa: F401

from alignax import plugin, shaping

PARTS = ("adaptive_kl", "moving_average")
HYPER = {"adaptive_kl": {"target": 1.0, "horizon": 20.0}, "moving_average": {"start": 40.0}}  # fmt: skip


def source(lm, one, teacher, **more):  # noqa: F811
    sample = sampler(one, lms={"ref": teacher})
    return make(lm, one, sample, shaping=steps(*PARTS, **HYPER), **more)


@pytest.fixture(scope="module")
def teacher(make_lm, lm):  # noqa: F811
    return make_lm(lm.config, 7)


def test_the_baseline_is_of_the_rollouts_before(lm, one, teacher):  # noqa: F811
    given = source(lm, one, teacher)
    earned, told = [], []
    for at in range(3):
        batch = given.next(lm.params, at)
        metrics = given.report()["metrics"]
        told.append(metrics["rollout/moving_average/baseline"])
        advantages = np.where(batch.mask, batch.advantages, -np.inf).max(-1)
        earned.append((advantages + told[-1]).mean())
    assert told[0] == 40
    assert told[1] == pytest.approx(earned[0], rel=1e-5)
    assert told[2] == pytest.approx((0.9 * earned[0] + earned[1]) / 1.9, rel=1e-5)


def test_what_is_kept_survives_a_stop(lm, one, teacher):  # noqa: F811
    for stop in (1, 2, 3):
        given = source(lm, one, teacher, batches=2)
        for at in range(stop):
            given.next(lm.params, at)
        resumed = source(lm, one, teacher, batches=2)
        resumed.restore(json.loads(json.dumps(given.state())))
        for at in range(stop, 6):
            equal(resumed.next(lm.params, at), given.next(lm.params, at))
            kept = [s.report()["metrics"] for s in (given, resumed)]
            for name in ("adaptive_kl/beta", "moving_average/baseline"):
                one_, other = (k.get(f"rollout/{name}") for k in kept)
                assert one_ == other
                assert one_ is None or one_ != 40 or at < 2


def test_a_shaping_without_its_numbers_is_refused():
    bound = plugin.load("shaping", "moving_average")
    for missing in ({"running": {}}, {"update": None}):
        with pytest.raises(ValueError, match=r"without RUNNING and `update`"):
            shaping.in_order([bound._replace(**missing)])
