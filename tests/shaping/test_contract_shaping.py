"""Contract of every shaping in alignax/shaping; a new file needs no edit here.

The batch has every column that a module's NEEDS names, three responses to a prompt, and,
for every stage after the first, rewards of tokens that an earlier shaping left.
"""

import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import plugin, shaping
from alignax.batch import Batch
from alignax.rollouts import rollout

NAMES = plugin.available("shaping")
B, G, K = 4, 3, 9
COLUMNS = ("old_logps", "ref_logps", "old_values", "members")  # what a rollout can fill


@pytest.fixture(params=NAMES)
def bound(request) -> plugin.Bound:
    return plugin.load("shaping", request.param)


@pytest.fixture(params=NAMES)
def module(request):
    return importlib.import_module(f"alignax.shaping.{request.param}")


def given(bound, make_batch, seed=0):
    """A Batch with everything that a shaping may read, and the baseline it asks for."""
    batch = make_batch(B, G, 16, seed)
    longest = int(batch.lengths.max())  # one row has no padding, the others do
    batch = jax.tree.map(lambda x: x[..., :longest] if x.ndim == 3 else x, batch)
    rng = np.random.default_rng(seed)

    def column(low, high):
        x = rng.uniform(low, high, batch.mask.shape).astype(np.float32)
        return jnp.where(batch.mask, x, 0)

    batch = batch._replace(
        feedback=jnp.float32(rng.normal(size=(B, G))),
        old_logps=column(-3, 0), ref_logps=column(-3, 0),
        extra={
            "old_values": column(-1, 1),
            **{f"reward/{k}": jnp.float32(rng.normal(size=(B, G))) for k in "ab"},
        },
        # the first stage finds nothing; each later one what a KL penalty would leave
        advantages=None if bound.stage == "reward" else column(-1, 1),
    )  # fmt: skip
    width = {"reference": K, "greedy": 1}.get(bound.baseline)
    baseline = rng.normal(size=(B, width)).astype(np.float32) if width else None
    if bound.baseline == "reference":  # ties, and rewards beyond all K
        baseline[:, 0] = batch.feedback[:, 0]
        batch = batch._replace(feedback=batch.feedback.at[0, 1].set(9).at[1, 2].set(-9))
    if bound.baseline == "running":
        baseline = rng.uniform(0.2, 1, (1, len(bound.running))).astype(np.float32)
    return batch, None if baseline is None else jnp.asarray(baseline)


def rows_of(bound, order, batch, baseline):
    """Some prompts; numbers that a run keeps are not of any prompt."""
    some = jax.tree.map(lambda x: x[order], batch)
    of_prompts = baseline is not None and bound.baseline != "running"
    return some, baseline[order] if of_prompts else baseline


def call(bound, batch, baseline, **hyper):
    with jax.numpy_rank_promotion("raise"):
        return bound(batch, baseline, **hyper)


def scored(batch):
    return np.asarray(batch.mask & batch.valid[..., None])


def holes(batch):
    """One response and one whole prompt are not valid."""
    return batch._replace(valid=batch.valid.at[0, 1].set(False).at[2].set(False))


def test_returns_finite_numbers_on_scored_tokens_alone(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    for some in (batch, holes(batch)):
        out = call(bound, some, baseline)
        assert out.shape == some.mask.shape
        assert out.dtype == jnp.float32
        assert np.isfinite(out).all()
        assert np.asarray(out)[scored(some)].any()
        assert not np.asarray(out)[~scored(some)].any()


def test_what_is_not_scored_does_not_matter(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    batch = holes(batch)
    want = call(bound, batch, baseline)

    def spoil(x):
        if x is not None and x.ndim == 2:
            return jnp.where(batch.valid, x, 777.0)
        return None if x is None else jnp.where(scored(batch), x, -777.0)

    spoilt = batch._replace(
        feedback=jnp.where(batch.valid, batch.feedback, 777.0),
        advantages=spoil(batch.advantages),
        old_logps=spoil(batch.old_logps), ref_logps=spoil(batch.ref_logps),
        extra={k: spoil(v) for k, v in batch.extra.items()},
    )  # fmt: skip
    np.testing.assert_array_equal(call(bound, spoilt, baseline), want)


def test_nothing_valid_gives_nothing(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    batch = batch._replace(valid=jnp.zeros_like(batch.valid))
    assert not np.asarray(call(bound, batch, baseline)).any()


def test_one_response_a_prompt_is_a_group_too(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    batch = jax.tree.map(lambda x: x[:, :1], batch)
    assert np.isfinite(call(bound, batch, baseline)).all()


def test_it_reads_what_an_earlier_shaping_left_and_not_the_feedback(bound, make_batch):
    if bound.stage == "reward":
        pytest.skip("the first stage")
    batch, baseline = given(bound, make_batch)
    want = np.asarray(call(bound, batch, baseline))
    other = batch._replace(feedback=batch.feedback + 5 * jnp.arange(1.0, 1 + B * G).reshape(B, G))  # fmt: skip
    np.testing.assert_array_equal(call(bound, other, baseline), want)
    raw = np.asarray(call(bound, batch._replace(advantages=None), baseline))
    assert not np.allclose(raw, want)
    raw = np.asarray(call(bound, other._replace(advantages=None), baseline)) - raw
    assert np.abs(raw).max() > 0.1, "the raw feedback is not read where nothing is left"


def test_the_rollout_keeps_the_feedback_raw(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    want = call(bound, batch, baseline)
    batch = jax.tree.map(np.array, batch)
    feedback, values = batch.feedback.copy(), batch.extra["old_values"].copy()
    host = None if baseline is None else np.asarray(baseline)
    out, kept = rollout.shaped(bound, batch, host)
    assert len(kept) == len(bound.running)
    np.testing.assert_array_equal(out.feedback, feedback)
    np.testing.assert_array_equal(out.advantages, want)
    assert ("returns" in out.extra) == bound.returns
    if bound.returns:
        np.testing.assert_allclose(out.extra["returns"], out.advantages + values)
    changed = {f for f in Batch._fields if getattr(out, f) is not getattr(batch, f)}
    assert changed <= {"advantages", "extra"}


def test_compiled_equals_eager(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    compiled = jax.jit(lambda *xs: call(bound, *xs))(holes(batch), baseline)
    np.testing.assert_allclose(
        compiled, call(bound, holes(batch), baseline), rtol=1e-5, atol=1e-6
    )


def column_of(key):
    """What NEEDS calls a column of `extra`."""
    return "members" if key.startswith("reward/") else key


def test_it_reads_only_what_it_needs(bound, make_batch):
    """Columns that NEEDS does not name may be missing, so they must not be read."""
    batch, baseline = given(bound, make_batch)
    want = call(bound, batch, baseline)
    bare = batch._replace(
        **{k: None for k in ("old_logps", "ref_logps") if k not in bound.needs},
        extra={k: v for k, v in batch.extra.items() if column_of(k) in bound.needs}
        or None,
    )
    np.testing.assert_array_equal(call(bound, bare, baseline), want)


def test_every_need_is_read_and_missed(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    want = np.asarray(call(bound, batch, baseline))
    ramp = jnp.where(batch.mask, jnp.linspace(-0.3, 0.7, batch.mask.shape[-1]), 0)
    for need in bound.needs:
        assert need in COLUMNS, f"who fills {need!r}?"
        if need in Batch._fields:
            changed = batch._replace(**{need: getattr(batch, need) + ramp})
            without = batch._replace(**{need: None})
        elif need == "members":
            other = {"reward/a": batch.feedback, "reward/b": batch.feedback}
            changed = batch._replace(extra=other)
            without = batch._replace(extra=None)
        else:
            changed = batch._replace(extra={need: batch.extra[need] + ramp})
            without = batch._replace(extra=None)
        assert not np.allclose(call(bound, changed, baseline), want), need
        with pytest.raises(ValueError, match=need):
            call(bound, without, baseline)


def test_the_baseline_is_read_if_it_is_declared(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    if baseline is None:
        assert bound.baseline in ("", "group")
        return
    want = np.asarray(call(bound, batch, baseline))
    assert not np.allclose(call(bound, batch, baseline + 0.5), want)


def test_padding_changes_nothing(bound, make_batch):
    batch, baseline = given(bound, make_batch)

    def grow(x):
        return x if x.ndim < 3 else jnp.pad(x, ((0, 0), (0, 0), (0, 6)))

    want = call(bound, batch, baseline)
    got = call(bound, jax.tree.map(grow, batch), baseline)
    np.testing.assert_allclose(got, grow(want), rtol=1e-5, atol=1e-6)


def test_permuting_prompts_permutes(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    batch = holes(batch)
    order = np.array([2, 0, 3, 1])
    shuffled = rows_of(bound, order, batch, baseline)
    want = call(bound, batch, baseline)[order]
    np.testing.assert_allclose(call(bound, *shuffled), want, rtol=1e-5, atol=1e-6)


def test_permuting_responses_permutes(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    batch = holes(batch)
    order = np.array([2, 0, 1])
    shuffled = jax.tree.map(lambda x: x[:, order], batch)
    want = call(bound, batch, baseline)[:, order]
    np.testing.assert_allclose(
        call(bound, shuffled, baseline), want, rtol=1e-5, atol=1e-6
    )


def test_prompts_see_each_other_exactly_if_coupled(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    alone = call(bound, *rows_of(bound, slice(2), batch, baseline))
    together = call(bound, batch, baseline)[:2]
    assert np.allclose(alone, together, rtol=1e-5, atol=1e-6) != bound.coupled


def test_hyper_parameters_are_keywords_with_defaults(bound):
    parameters = list(inspect.signature(bound.function).parameters.values())
    assert [p.name for p in parameters[:2]] == ["batch", "baseline"]
    for p in parameters[2:]:
        assert p.kind is p.KEYWORD_ONLY, p.name
        assert p.default is not p.empty, p.name


def alternatives(bound, name):
    """Other values that binding accepts."""
    default = bound.hyper[name]
    if isinstance(default, str):  # 'transform' is one of TRANSFORMS beside the shaping
        known = getattr(inspect.getmodule(bound.function), f"{name.upper()}S", None)
        assert known, f"list the values of {name} in {name.upper()}S"
        tried = known
    elif isinstance(default, bool):
        tried = [not default]
    elif default == float("inf"):  # a bound that does not bind
        tried = [0.5]
    elif isinstance(default, tuple):  # weights of members
        tried = [(("a", 3.0),)]
    else:
        tried = [type(default)(x) for x in (default * 1.5 + 1, default * 0.75)]
    found = []
    for value in tried:
        try:
            plugin.bind(bound.function, {name: value})
        except ValueError:
            continue  # outside its range
        found += [value] if value != default else []
    assert found, f"no other value of {name} is allowed"
    return found


def outcome(bound, batch, baseline, **hyper):
    """All numbers that a shaping gives: rewards of tokens, and what a run keeps of it."""
    found = [np.ravel(call(bound, batch, baseline, **hyper))]
    if bound.update:
        hyper = {**bound.hyper, **hyper}
        for nats in np.linspace(0, 2, 9):  # some of them near a target
            far = batch._replace(old_logps=batch.old_logps + nats * batch.mask)
            found += [np.ravel(bound.update(far, baseline, **hyper))]
        found += [[*plugin.bind(bound.function, hyper).running.values()]]
    return np.concatenate(found)


def test_what_a_run_keeps_depends_on_what_is_scored_alone(bound, make_batch):
    if not bound.update:
        pytest.skip("keeps nothing")
    batch, baseline = given(bound, make_batch)
    batch = holes(batch)
    want = bound.update(batch, baseline, **bound.hyper)
    assert want.shape == baseline.shape
    assert not np.allclose(want, baseline)
    worse = jnp.where(scored(batch), batch.advantages, 50.0)
    spoilt = batch._replace(advantages=worse, old_logps=batch.old_logps - 50 * ~scored(batch))  # fmt: skip
    np.testing.assert_array_equal(bound.update(spoilt, baseline, **bound.hyper), want)
    none = batch._replace(valid=jnp.zeros_like(batch.valid))
    np.testing.assert_array_equal(bound.update(none, baseline, **bound.hyper), baseline)


def test_every_hyper_parameter_changes_something(bound, make_batch):
    """By itself, or beside one other choice: a floor is one of logarithms."""
    batch, baseline = given(bound, make_batch)
    choices = {k for k, v in bound.hyper.items() if isinstance(v, str)}
    for name in bound.hyper:
        beside = [{}] + [
            {k: v} for k in sorted(choices - {name}) for v in alternatives(bound, k)
        ]
        changed = (
            not np.allclose(
                outcome(bound, batch, baseline, **{name: value}, **other),
                outcome(bound, batch, baseline, **other),
            )
            for other in beside
            for value in alternatives(bound, name)
        )
        assert any(changed), f"{name} changes nothing"


def test_every_choice_gives_finite_numbers(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    for name, default in bound.hyper.items():
        for value in alternatives(bound, name) if isinstance(default, str) else ():
            out = call(bound, batch, baseline, **{name: value})
            assert np.isfinite(out).all(), value


def test_an_unknown_choice_is_refused(bound, make_batch):
    batch, baseline = given(bound, make_batch)
    for name, default in bound.hyper.items():
        if isinstance(default, str):
            with pytest.raises(ValueError, match=f"{name} 'nonsense'.*{default}"):
                call(bound, batch, baseline, **{name: "nonsense"})


def test_a_range_is_that_of_a_hyper_parameter_and_holds_its_default(module):
    bound = plugin.bind(module.shape, plugin.bind(module.shape).hyper)
    assert set(getattr(module, "RANGES", {})) <= set(bound.hyper)


def test_the_module_declares_when_it_applies(module):
    assert module.STAGE in shaping.STAGES
    assert plugin.bind(module.shape).baseline in shaping.BASELINES
    if getattr(module, "RETURNS", False):
        assert module.STAGE == "advantage"
        assert "old_values" in module.NEEDS


def test_the_module_states_its_source(module):
    doc = module.__doc__ or ""
    assert re.search(r"https?://\S+", doc), "no URL"
    assert re.search(r"^ +\S.* (=|←) \S", doc, re.MULTILINE), "no equation"


def test_the_function_states_its_arguments(bound):
    doc = inspect.getdoc(bound.function) or ""
    assert "Args:" in doc
    assert "Returns:" in doc
    for name in inspect.signature(bound.function).parameters:
        assert f"{name}:" in doc or f"{name}," in doc, f"{name} is not described"


def test_every_shaping_has_its_own_tests(request):
    folder = request.path.parent
    missing = [n for n in NAMES if not [*folder.glob(f"test_{n}*.py")]]
    assert not missing


# -- the folder


def test_shapings_apply_by_stage_then_by_name():
    names = ["whiten", "rloo", "kl", "ctrl", "gae"]
    found = shaping.in_order(plugin.load("shaping", n) for n in names)
    want = [
        "shaping.ctrl",
        "shaping.kl",
        "shaping.gae",
        "shaping.rloo",
        "shaping.whiten",
    ]
    assert [s.name for s in found] == want


@pytest.mark.parametrize(
    "wrong, message",
    [({"stage": ""}, "STAGE = ''"), ({"stage": "first"}, "STAGE = 'first'.*'reward'"),
     ({"baseline": "best"}, "BASELINE = 'best'.*'greedy'")],
)  # fmt: skip
def test_what_a_module_declares_is_checked(wrong, message):
    bound = plugin.load("shaping", "kl")._replace(**wrong)
    with pytest.raises(ValueError, match=message):
        shaping.in_order([bound])
