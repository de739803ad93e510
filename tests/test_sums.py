"""Weighted sums of losses: values, gradients and what the parts declare."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from alignax import plugin
from alignax.batch import Scores
from alignax.losses import bco, bco_pair, dpo, entropy, nll_chosen
from alignax.training import loop

pytestmark = pytest.mark.slow

MPO = {
    "name": "sum",
    "parts": {
        "dpo": {"weight": 0.8, "beta": 0.3},
        "quality": {"name": "bco_pair", "weight": 0.2, "beta": 0.5},
        "nll_chosen": {},
    },
}


def load(loss, **more):
    config = {"loss": loss, "reweight": {}, "lms": {"ref": "init"}, **more}
    return plugin.load_loss(ConfigDict(config))


@pytest.fixture
def given(make_batch):
    batch = make_batch(4, 2, 16)
    rng = np.random.default_rng(0)

    def column():
        x = rng.uniform(-3, 0, batch.mask.shape).astype(np.float32)
        return jnp.where(batch.mask, x, 0)

    return column(), batch._replace(ref_logps=column())


def test_a_sum_is_the_sum_of_its_parts_with_their_weights(given):
    logps, batch = given
    bound = load(MPO)
    values, metrics = bound(Scores(logps), batch)
    parts = {
        "dpo": dpo.loss(Scores(logps), batch, beta=0.3),
        "quality": bco_pair.loss(Scores(logps), batch, beta=0.5),
        "nll_chosen": nll_chosen.loss(Scores(logps), batch),
    }
    want = 0.8 * parts["dpo"][0] + 0.2 * parts["quality"][0] + parts["nll_chosen"][0]
    np.testing.assert_allclose(values, want, rtol=1e-6)
    for label, (mine, found) in parts.items():
        np.testing.assert_array_equal(metrics[f"{label}/loss"], mine)
        for name, value in found.items():
            np.testing.assert_array_equal(metrics[f"{label}/{name}"], value)
    assert bound.needs == ("logps", "ref_logps")
    assert bound.forms == ("pairs",)
    assert bound.hyper["dpo.weight"] == 0.8
    assert bound.hyper["nll_chosen.weight"] == 1.0
    again = bound(Scores(logps), batch, **{"dpo.weight": 0.0, "quality.weight": 0.0})[0]
    np.testing.assert_allclose(again, parts["nll_chosen"][0])


def test_running_means_have_the_name_of_their_part(given):
    logps, batch = given
    bound = load({"name": "sum", "parts": {"entropy": {}, "one": {"name": "bco", "weight": 2.0}}})  # fmt: skip
    assert bound.coupled
    assert bound.ema == {"one/desirable": 0.0, "one/undesirable": 0.0}
    ema = {"one/desirable": jnp.float32(0.5), "one/undesirable": jnp.float32(-0.25)}
    policy = Scores(logps, entropy=-logps)
    values, metrics = bound(policy, batch, ema=ema)
    own = {"desirable": ema["one/desirable"], "undesirable": ema["one/undesirable"]}
    want, found = bco.loss(policy, batch, ema=own)
    bonus = entropy.loss(policy, batch)[0]
    np.testing.assert_allclose(values, bonus + 2 * want, rtol=1e-6)
    assert {"ema/one/desirable", "ema/one/undesirable"} <= {*metrics}
    np.testing.assert_array_equal(metrics["ema/one/desirable"], found["ema/desirable"])


def test_parts_share_a_reduction():
    parts = {"sft": {"reduction": "token"}, "entropy": {"reduction": "sequence"}}
    with pytest.raises(ValueError, match=r"different reductions, \{'entropy': 'sequence', 'sft': 'token'\}: set loss\.reduction"):  # fmt: skip
        load({"name": "sum", "parts": parts})
    bound = load({"name": "sum", "parts": parts, "reduction": "constant"})
    assert bound.hyper["reduction"] == "constant"
    assert "sft.reduction" not in bound.hyper
    with pytest.raises(ValueError, match="reduction='mean' is not one of"):
        load({"name": "sum", "parts": parts, "reduction": "mean"})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "sum"}, "loss 'sum' has no parts"),
        ({"name": "sum", "parts": {"dpoo": {}}}, r"loss\.parts\.dpoo: unknown name 'dpoo'"),
        ({"name": "sum", "parts": {"dpo": {"betta": 1}}}, r"loss\.parts\.dpo: .* no hyper-parameter 'betta'"),
        ({"name": "sum", "parts": {"dpo": {"weight": "x"}}}, r"loss\.parts\.dpo\.weight is 'x', expected a number"),
        ({"name": "sum", "beta": 1, "parts": {"dpo": {}}}, r"'sum' has no hyper-parameter 'beta'"),
        ({"name": "sum", "parts": {"dpo": {}, "reinforce": {}}}, "reinforce reads prompts, those before it pairs"),
        ({"name": "sum", "parts": {"a": {"name": "bonbon", "n": 4}, "b": {"name": "bonbon", "n": 8}}}, r"different values of rollout\.group"),
    ],
)  # fmt: skip
def test_what_cannot_be_summed_is_said(loss, message):
    with pytest.raises(ValueError, match=message):
        load(loss)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_on_a_sum_steps_as_the_sum_of_the_gradients(tmp_path, accumulate):
    """And its weights are traced: another weight of 0 gives the step of the other part."""

    def trained(loss, name):
        config = tiny.config("pairs", num_steps=2, accumulate=accumulate)
        config.loss = loss
        return loop.train(config, str(tmp_path / name))

    both = {"dpo": {"weight": 1.0}, "nll_chosen": {"weight": 0.0}}
    one = trained({"name": "sum", "parts": both}, "sum").params
    want = trained({"name": "dpo"}, "dpo").params
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), one, want)
