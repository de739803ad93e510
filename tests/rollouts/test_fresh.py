"""Responses of the very parameters that a step changes: their ratios are 1 by construction."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import plugin, ratios, shaping
from alignax.batch import LM, Example, Scores
from alignax.losses import gspo
from alignax.models.sharding import make_mesh, put_batch
from alignax.rollouts import sampler as samplers
from alignax.rollouts.source import rollout_source
from alignax.text import tokenizer
from alignax.training import loading, loop, optim, parallel, step

pytestmark = pytest.mark.slow

TK = tokenizer.load("bytes")
PROMPTS = [Example(f"p{i}", "abcdefgh"[: i + 1] * 2, ()) for i in range(8)]
GRPO = ("logps", "old_logps", "advantages")


def codes(batch, texts, lms) -> np.ndarray:
    """A number that differs between nearly all responses."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    at = np.arange(1, mask.shape[-1] + 1)
    return (np.where(mask, tokens, 0) * at).sum(-1) % 101.0


@pytest.fixture(scope="module")
def one():
    return make_mesh((1, 1, 1))


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def lm(request, make_lm):
    config = loading.model_config(tiny.config(), TK.vocab_size)
    return make_lm(
        dataclasses.replace(config, num_layers=2, width=64, dtype=request.param)
    )


class Counting:
    """`parallel.scorer` of plain rows, and the LMs that it was asked to score."""

    def __init__(self, mesh):
        self.scorer, self.asked = parallel.scorer(mesh), []

    def __call__(self, lm, batch, *args, **more):
        self.asked.append(lm)
        return self.scorer(lm, batch, *args, **more)


def rolled(lm, mesh, *names, needs=GRPO, lms=None, **more):
    """A source of packed batches, and its scorer."""
    score = Counting(mesh)
    steps = shaping.in_order(plugin.load("shaping", n) for n in names or ("rloo",))
    sampler = samplers.Sampler(
        parallel.generator(TK, mesh), plugin.bind(codes), lms or {}, TK, 16
    )
    settings = {"batch_size": 8, "length": 40, "seed": 0, "group": 4, "grid": (1, 1)}
    source = rollout_source(
        PROMPTS, sampler, policy=lambda params: LM(lm.config, params), score=score,
        shaping=steps, needs=needs, **{**settings, **more},
    )  # fmt: skip
    return source, score


def without_gradient(lm, mesh, batch) -> float:
    """Share of responses whose gradient GSPO clips, in the training program."""

    def loss(policy, batch):
        gain = lambda x: gspo.loss(Scores(x), batch)[0].sum()  # noqa: E731
        slope = jnp.abs(jax.grad(gain)(policy.logps)).sum(-1)
        lost = (slope == 0) & batch.valid
        return -policy.logps.sum((1, 2)), {"lost": lost.mean(1)}

    loss.needs = ("logps",)
    bound = plugin.bind(loss)
    tx = optim.make_tx(1e-3)
    train = step.make_train_step(lm.config, tx, bound, mesh)
    state = step.init_state(lm.params, tx, mesh)
    return float(train(state, {}, put_batch(batch, mesh))[1]["lost"])


def test_gspo_keeps_the_gradient_of_every_fresh_response(lm, one):
    """Stored log-probs are of another program: half of the responses lost theirs."""
    source, _ = rolled(lm, one)
    batch = source.next(lm.params, 0)
    assert batch.old_logps is None
    assert without_gradient(lm, one, batch) == 0
    twice, _ = rolled(lm, one, epochs=2)
    stored = twice.next(lm.params, 0)
    rows = np.argsort([bytes(t) for t in stored.tokens[:, 0]])
    mine = np.argsort([bytes(t) for t in batch.tokens[:, 0]])
    np.testing.assert_array_equal(stored.tokens[rows], batch.tokens[mine])
    lost = without_gradient(lm, one, stored)
    assert (lost > 0.1) == (lm.config.dtype == "bfloat16")


@pytest.mark.parametrize("name", ["gspo", "policy_gradient", "cispo"])
def test_in_float32_a_step_is_what_it_was_with_stored_log_probabilities(lm, one, name):
    if lm.config.dtype != "float32":
        pytest.skip("in bfloat16 it is not")
    batch = rolled(lm, one)[0].next(lm.params, 0)
    stored = parallel.scorer(one)(lm, batch).logps
    tx = optim.make_tx(1e-3, name="lion")
    found = []
    for given in (batch, batch._replace(old_logps=np.asarray(stored))):
        train = step.make_train_step(
            lm.config, tx, plugin.load("losses", name, {}), one, accumulate=2
        )
        given = given._replace(layout=None)
        state = step.init_state(lm.params, tx, one)
        found.append(train(state, {}, put_batch(given, one))[1])
    assert found[0]["ratio"] == 1
    assert found[0]["clipped"] == found[0]["approx_kl"] == 0
    for key in ("loss", "grad_norm", "ratio"):
        np.testing.assert_allclose(found[0][key], found[1][key], rtol=1e-3, atol=5e-6)
    # of another program, the ratios have rounding, which is reported
    assert 0 < found[1]["range_used"] < found[1]["range_used_max"] < 0.1
    assert "range_used" not in found[0]
    # the sampler's log-probabilities are compared with the step's own
    assert 0 < float(found[0]["rollout/logp_gap"]) < 1e-5
    assert "rollout/logp_gap" not in found[1]


READERS = {
    "nothing": ({}, 0),
    "the KL in the loss": ({"needs": (*GRPO, "ref_logps")}, 0),
    "the KL in the reward": ({"names": ("kl", "rloo")}, 1),
    "another pass": ({"epochs": 2}, 1),
    "another batch": ({"batches": 2}, 2),
    "an anchor": ({"anchor": True}, 1),
    "a preference loss": ({"needs": ("ref_logps",), "names": (), "keep": "best_worst"}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_the_policy_scores_its_responses_where_something_reads_that(make_lm, one, name):
    more, count = READERS[name]
    more, model = dict(more), loading.model_config(tiny.config(), TK.vocab_size)
    lm, ref = make_lm(model), make_lm(model, 1)
    names = more.pop("names", ("rloo",))
    if more.pop("anchor", False):
        more["anchor"] = lambda _: ref
    source, score = rolled(lm, one, *names, lms={"ref": ref}, **more)
    batch = source.next(lm.params, 0)
    assert sum(asked.params is lm.params for asked in score.asked) == count
    metrics = source.report()["metrics"]
    assert ("rollout/logp_gap" in metrics) == (count > 0)
    fresh = name not in ("another pass", "another batch", "an anchor")
    assert (batch.old_logps is None) == fresh
    assert ("sampler_logps" in (batch.extra or {})) == fresh
    if fresh:
        own = np.asarray(parallel.scorer(one)(lm, batch).logps)
        np.testing.assert_allclose(batch.extra["sampler_logps"], own, atol=2e-5)
    if "kl" in names or "ref_logps" in more.get("needs", ()):
        assert np.isfinite(metrics["rollout/kl"])


def test_the_sampler_s_log_probabilities_are_a_column_that_a_loss_may_ask_for(lm, one):
    needs = (*GRPO, "sampler_logps")
    twice = rolled(lm, one, needs=needs, epochs=2)[0].next(lm.params, 0)
    gap = np.abs(twice.old_logps - twice.extra["sampler_logps"])
    assert 0 < gap.max() < (0.2 if lm.config.dtype == "bfloat16" else 1e-4)
    assert plugin.frozen_lm("sampler_logps") is None


def test_a_critic_s_values_are_computed_though_ratios_are_not(make_lm, one):
    config = loading.model_config(tiny.config(), TK.vocab_size)
    lm = make_lm(dataclasses.replace(config, value_head=True))
    needs = (*GRPO, "state_values", "old_values", "returns")
    batch = rolled(lm, one, "gae", needs=needs)[0].next(lm.params, 0)
    assert batch.old_logps is None
    assert np.abs(batch.extra["old_values"]).max() > 0


def test_without_a_rollout_nothing_is_behaviour():
    zeros = jnp.zeros((1, 1, 2))
    policy = Scores(zeros - 1.0)
    batch = tiny_batch()
    with pytest.raises(ValueError, match="advantages is None"):
        ratios.log_ratio(policy, batch)
    given = batch._replace(advantages=zeros)

    def log_rho(x):
        return ratios.log_ratio(Scores(x), given).sum()

    value, slope = jax.value_and_grad(log_rho)(policy.logps)
    assert value == 0
    assert slope.tolist() == [[[0, 1]]]


def tiny_batch():
    from alignax.batch import from_groups

    return jax.tree.map(jnp.asarray, from_groups([[1]], [[[2]]], length=2))


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_says_how_much_of_the_clip_range_rounding_takes(tmp_path, caplog, epochs):
    from alignax.models import fallback

    fallback.say_once.cache_clear()
    config = tiny.config("sft", length=24, num_steps=2)
    config.truncate_prompts = "left"
    config.model.dtype, config.accumulate = "bfloat16", 2
    config.rollout.reward = {"name": "test_fresh.codes"}
    config.rollout.update(max_new=6, batches=1, epochs=epochs)
    config.loss = {"name": "gspo", "clip_low": 1e-7, "clip_high": 1e-7}
    config.shaping = {"rloo": {}}
    loop.train(config, str(tmp_path))
    rows = [json.loads(r) for r in (tmp_path / "metrics.jsonl").open()]
    assert ("train/range_used" in rows[0]) == (epochs > 1)
    assert "train/rollout/logp_gap" in rows[0]
    said = "more than half of the clip range" in caplog.text
    assert said == (epochs > 1), rows[0]
    assert not said or rows[0]["train/range_used_max"] > 0.5
