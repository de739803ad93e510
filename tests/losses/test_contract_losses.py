"""Contract of every loss in alignax/losses; a new file needs no edit here.

The batch that a loss is given has every field filled (two responses to a prompt), and
whatever else its NEEDS names is put into `extra`.
"""

import functools
import importlib
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob, masked, plugin, ratios
from alignax.batch import FORMS, Batch, Scores
from alignax.configs import common
from alignax.text import tokenizer
from alignax.training import build

TK = tokenizer.load("bytes")

NAMES = plugin.available("losses")
B, G = 4, 2
SECOND = 3  # a seed of other numbers in the shapes of seed 0


@pytest.fixture(params=NAMES)
def bound(request) -> plugin.Bound:
    return plugin.load("losses", request.param)


@pytest.fixture(params=NAMES)
def module(request):
    return importlib.import_module(f"alignax.losses.{request.param}")


def given(bound, make_batch, seed=0) -> tuple[Scores, Batch]:
    """Scores and a Batch with everything that a loss may read."""
    fields = {*Scores._fields, *Batch._fields}
    return made(make_batch, tuple(n for n in bound.needs if n not in fields), seed)


@functools.cache
def made(make_batch, needs, seed) -> tuple[Scores, Batch]:
    batch = jax.tree.map(np.asarray, make_batch(B, G, 16, seed))
    longest = int(batch.lengths.max())  # one row has no padding, the others do
    batch = jax.tree.map(lambda x: x[..., :longest] if x.ndim == 3 else x, batch)
    rng = np.random.default_rng(seed)

    def column(low, high):
        x = rng.uniform(low, high, batch.mask.shape).astype(np.float32)
        return np.where(batch.mask, x, np.float32(0))

    extra = {name: column(-3, 0) for name in needs}
    policy = Scores(
        logps=column(-3, 0), entropy=column(0.1, 3), kl=column(0, 1),
        values=column(-1, 1), forward_kl=column(0, 1), collision=column(-3, 0),
        state_values=column(-1, 1),
    )  # fmt: skip
    batch = batch._replace(
        ref_logps=column(-3, 0), old_logps=column(-3, 0), advantages=column(-1, 1),
        extra=extra,
        feedback=np.float32([[1, 0], [0, 1], [1, 1], [0, 0]]),  # labels, all pairs of them
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, (policy._replace(best=column(-3, 0)), batch))


def call(bound, policy, batch, **hyper):
    ema = (
        {"ema": {k: jnp.float32(v) for k, v in bound.ema.items()}} if bound.ema else {}
    )
    with jax.numpy_rank_promotion("raise"):
        return bound(policy, batch, **hyper, **ema)


@functools.cache
def program(name, choices):
    """One compiled program: (policy, batch, numbers) -> values, metrics, gradient."""
    bound = plugin.load("losses", name.removeprefix("losses."))

    def total(policy, batch, numbers):
        value, metrics = call(bound, policy, batch, **dict(choices), **numbers)
        return value.sum(), (value, metrics)

    return jax.jit(jax.grad(total, has_aux=True))


def numbers_of(hyper):
    return {k: v for k, v in hyper.items() if type(v) in (int, float)}


def evaluated(bound, policy, batch, **hyper):
    """(values, metrics, gradient), compiled; numbers are arguments, as in a step."""
    numbers = numbers_of({**bound.hyper, **hyper})
    choices = frozenset((k, v) for k, v in hyper.items() if k not in numbers)
    grads, (value, metrics) = program(bound.name, choices)(policy, batch, numbers)
    return jax.tree.map(np.asarray, (value, metrics, grads))


def values(bound, policy, batch):
    return evaluated(bound, policy, batch)[0]


def values_of_another_shape(bound, policy, batch):
    return jax.jit(functools.partial(call, bound))(policy, batch)[0]


def policy_gradient(bound, policy, batch):
    return evaluated(bound, policy, batch)[2]


def test_the_losses_are_found():
    assert {"sft", "dpo", "reward_model"} <= set(NAMES)


def test_it_returns_finite_values_and_metrics_per_prompt(bound, make_batch):
    value, metrics, _ = evaluated(bound, *given(bound, make_batch))
    assert value.shape == (B,)
    assert value.dtype == jnp.float32
    assert np.isfinite(value).all()
    for name, metric in metrics.items():
        # what a running mean takes in may be one number; all else is one per prompt
        shapes = [(B,), ()] if name.startswith("ema/") else [(B,)]
        assert metric.shape in shapes, name
        assert np.isfinite(metric).all(), name


def test_compiled_with_traced_numbers_equals_eager(bound, make_batch):
    """The step hands them in as arguments of one program, so that a sweep compiles once."""
    policy, batch = given(bound, make_batch)
    eager = call(bound, policy, batch)
    compiled = evaluated(bound, policy, batch)
    assert eager[1].keys() == compiled[1].keys()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        eager, compiled[:2],
    )  # fmt: skip


def test_gradient_reaches_the_policy_through_its_needs(bound, make_batch):
    policy, batch = given(bound, make_batch)
    to_policy = policy_gradient(bound, policy, batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(to_policy))
    reached = {k for k, v in to_policy._asdict().items() if v.any()}
    assert reached, "no gradient reaches the policy"
    assert reached <= set(bound.needs), "a gradient without a declared need"


def test_it_reads_only_what_it_needs(bound, make_batch):
    """Fields that NEEDS does not name may be None, so they must not be read."""
    policy, batch = given(bound, make_batch)
    want = call(bound, policy, batch)[0]
    bare = policy._replace(
        **{k: None for k in Scores._fields if k not in ("logps", *bound.needs)}
    )
    spare = batch._replace(
        **{k: None for k in ("ref_logps", "old_logps", "advantages", "extra")
           if k not in bound.needs and not (k == "extra" and batch.extra)}
    )  # fmt: skip
    np.testing.assert_array_equal(call(bound, bare, spare)[0], want)


def test_every_need_is_read(bound, make_batch):
    policy, batch = given(bound, make_batch)
    want = values(bound, policy, batch)
    for need in bound.needs:
        # not a multiple of what stands there, so that a ratio or a mean sees it too
        ramp = jnp.linspace(-0.3, 0.7, batch.mask.shape[-1])
        ramp = jnp.where(batch.mask, ramp, 0)
        if need in Scores._fields:
            changed = policy._replace(**{need: getattr(policy, need) + ramp}), batch
        elif need in Batch._fields:
            changed = policy, batch._replace(**{need: getattr(batch, need) + ramp})
        else:
            extra = {**batch.extra, need: batch.extra[need] + ramp}
            changed = policy, batch._replace(extra=extra)
        assert not np.allclose(values(bound, *changed), want), f"{need} is not read"


def test_padding_changes_nothing(bound, make_batch):
    policy, batch = given(bound, make_batch)

    def grow(x):
        if x.ndim < 3:
            return x
        return jnp.pad(x, ((0, 0), (0, 0), (0, 6)))

    longer = jax.tree.map(grow, (policy, batch))
    np.testing.assert_allclose(
        values_of_another_shape(bound, *longer),
        values(bound, policy, batch),
        rtol=1e-5,
        atol=1e-6,
    )


def test_permuting_prompts_permutes_values(bound, make_batch):
    policy, batch = given(bound, make_batch)
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[order], (policy, batch))
    want, got = values(bound, policy, batch)[order], values(bound, *shuffled)
    if bound.coupled:  # prompts depend on each other: only the whole is the same
        want, got = want.sum(), got.sum()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_prompts_do_not_see_each_other_unless_coupled(bound, make_batch):
    """With the whole step's weights handed down, as under accumulation."""
    policy, batch = given(bound, make_batch)
    if bound.coupled:
        pytest.skip("declared COUPLED")
    batch = batch._replace(valid=batch.valid.at[3, 1].set(False))
    if "reduction" in bound.hyper:
        weights = masked.token_weights(batch, bound.hyper["reduction"])
        batch = batch._replace(extra={**batch.extra, "token_weights": weights})
    first = jax.tree.map(lambda x: x[:2], (policy, batch))
    np.testing.assert_allclose(
        values_of_another_shape(bound, *first), values(bound, policy, batch)[:2],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_an_invalid_response_has_no_gradient(bound, make_batch):
    policy, batch = given(bound, make_batch)
    batch = batch._replace(valid=batch.valid.at[0, 1].set(False).at[2].set(False))
    for name, grad in policy_gradient(bound, policy, batch)._asdict().items():
        assert np.isfinite(grad).all(), name
        assert not grad[0, 1].any(), name
        assert not grad[2].any(), name


def test_no_gradient_off_the_mask(bound, make_batch):
    policy, batch = given(bound, make_batch)
    off = ~np.asarray(batch.mask)
    for name, grad in policy_gradient(bound, policy, batch)._asdict().items():
        if name in ("logps", *logprob.READ):
            continue  # exactly 0 there, whatever its cotangent: the kernel drops it
        assert not grad[off].any(), name


@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
def test_hopeless_log_probabilities_stay_finite(bound, make_batch, side):
    policy, batch = given(bound, make_batch)
    rows = {"chosen": [0], "rejected": [1], "both": [0, 1]}[side]
    low = jnp.where(batch.mask, jnp.float32(-1e4), 0)
    logps = policy.logps.at[:, np.array(rows)].set(low[:, np.array(rows)])
    policy = policy._replace(logps=logps)
    assert np.isfinite(values(bound, policy, batch)).all()
    grads = policy_gradient(bound, policy, batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_hopeless_log_probabilities_of_other_models_stay_finite(bound, make_batch):
    """Of a reference, or of the behaviour policy: the ratio is as large as can be."""
    policy, batch = given(bound, make_batch)
    low = jnp.where(batch.mask, jnp.float32(-1e4), 0)
    for need in bound.needs:
        if not need.endswith("_logps"):
            continue
        if need in Batch._fields:
            changed = batch._replace(**{need: low})
        else:
            changed = batch._replace(extra={**batch.extra, need: low})
        for x in jax.tree.leaves(evaluated(bound, policy, changed)):
            assert np.isfinite(x).all(), need


def test_nothing_valid_costs_nothing_and_gives_no_nan(bound, make_batch):
    policy, batch = given(bound, make_batch)
    batch = batch._replace(valid=jnp.zeros_like(batch.valid))
    assert np.isfinite(values(bound, policy, batch)).all()
    grads = policy_gradient(bound, policy, batch)
    assert all(not x.any() for x in jax.tree.leaves(grads))


def test_hyper_parameters_are_keywords_with_defaults(bound):
    parameters = list(inspect.signature(bound.function).parameters.values())
    assert [p.name for p in parameters[:2]] == ["policy", "batch"]
    for p in parameters[2:]:
        assert p.kind is p.KEYWORD_ONLY, p.name
        if p.name not in plugin.HANDED:
            assert p.default is not p.empty, p.name


def alternatives(bound, name, default):
    if isinstance(default, str):  # 'constraint' is one of CONSTRAINTS beside the loss
        module = inspect.getmodule(bound.function)
        shared = {"reduction": masked.MODES, "estimator": ratios.ESTIMATORS}
        known = shared.get(name) or getattr(module, f"{name.upper()}S", None)
        assert known, f"list the values of {name} in {name.upper()}S"
        return [value for value in known if value != default]
    if isinstance(default, bool):
        return [not default]
    if default == float("inf"):  # a bound that is not there
        return [1.5]
    if isinstance(default, int | float):
        return [type(default)(default * 1.5 + 1), type(default)(default * 0.5 + 0.25)]
    pytest.fail(f"no rule to perturb {name}={default!r}")


def test_every_hyper_parameter_changes_the_value_or_its_gradient(bound, make_batch):
    policy, batch = given(bound, make_batch, seed=SECOND)

    def both(**hyper):
        value, _, grads = evaluated(bound, policy, batch, **hyper)
        return jax.tree.leaves((value, grads))

    want = both()
    for name, default in bound.hyper.items():
        changed = (
            not all(map(np.allclose, both(**{name: value}), want))
            for value in alternatives(bound, name, default)
        )
        assert any(changed), f"{name} changes nothing"


def test_a_range_is_that_of_a_hyper_parameter_and_holds_its_default(module):
    """Binding the defaults has checked them against the ranges already."""
    bound = plugin.bind(module.loss)
    ranges = getattr(module, "RANGES", {})
    assert set(ranges) - {"weight"} <= set(
        bound.hyper
    )  # in a sum of losses, of the sum
    assert "beta" not in bound.hyper or ranges["beta"].startswith("(0,")


def test_the_module_states_its_source(module):
    doc = module.__doc__ or ""
    assert re.search(r"https?://\S+", doc), "no URL"
    assert re.search(r"^ +\S.* = \S", doc, re.MULTILINE), "no equation"
    assert "Differs from the paper" in doc
    assert isinstance(module.NEEDS, tuple)
    known = {*Scores._fields, *Batch._fields, "old_values", "returns"}
    for need in module.NEEDS:
        assert need in known or need.endswith("_logps"), f"nothing fills {need!r}"


def test_the_module_declares_the_forms_of_its_rows(module):
    assert isinstance(module.FORMS, tuple)
    assert module.FORMS
    assert set(module.FORMS) <= set(FORMS)
    rollouts = {"old_logps", "advantages"} & set(module.NEEDS)
    assert (module.FORMS == ("prompts",)) == bool(rollouts)


ROWS = {
    "prompts": {"prompt": "Q"},
    "demonstrations": {"prompt": "Q", "response": "an answer"},
    "labelled": {"prompt": "Q", "response": "an answer", "label": 0},
    "mismatched": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "pairs": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "groups": {"prompt": "Q", "responses": ["a", "b", "c"], "scores": [2, 9, 1]},
    "unscored": {"prompt": "Q", "responses": ["a", "b", "c"]},
}


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """form -> config.data of rows of this form."""
    folder, out = tmp_path_factory.mktemp("forms"), {}
    for kind, row in ROWS.items():
        path = folder / f"{kind}.jsonl"
        rows = [{**row, "prompt": f"Q{i}"} for i in range(4)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out[kind] = {"name": "jsonl", "split": "train", "path": str(path)}
    source = out["mismatched"]
    out["mismatched"] = {"name": "unpaired", "split": "train", "source": source}
    return out


# One loss of those that declare the same forms: nothing else of it decides.
DECLARING = sorted({plugin.load("losses", name).forms: name for name in NAMES}.values())


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", DECLARING)
def test_rows_are_read_exactly_where_the_declaration_says_so(name, kind, data_of):
    bound, config = plugin.load("losses", name), common.get_config()
    config.num_steps, config.data = 1, data_of[kind]
    if kind in bound.forms and kind != "prompts":
        assert len(build.training_examples(config, bound, TK)) in (4, 8)
        return
    # prompts alone are no rows: they serve rollouts
    with pytest.raises(ValueError, match="reads " + bound.forms[0]) as error:
        build.training_examples(config, bound, TK)
    assert FORMS[kind] in str(error.value)


def test_the_function_states_its_arguments(bound):
    doc = inspect.getdoc(bound.function) or ""
    assert "Args:" in doc
    assert "Returns:" in doc
    for name in inspect.signature(bound.function).parameters:
        assert f"{name}:" in doc or f"{name}," in doc, f"{name} is not described"


def test_every_loss_has_its_own_tests(request):
    folder = request.path.parent
    missing = [n for n in NAMES if not (folder / f"test_{n}.py").exists()]
    assert not missing
