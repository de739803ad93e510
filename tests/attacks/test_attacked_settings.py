"""Every number of a config and of a method has a range, and every refusal is reached."""

import ast
import inspect
import math
import traceback

import pytest
import tiny
from ml_collections import ConfigDict

from alignax import plugin
from alignax.training import checks, defaults, explain, optim, ranges

NUMBERS = {
    k: v
    for k, v in ranges.keys(defaults.get_config())
    if isinstance(v, int | float) and not isinstance(v, bool)
}
NO_NUMBERS = (True, math.nan, "1", None, (1,), {})  # a ConfigDict makes a float of True


def changed(key, value, config=None):
    """A config with one value, of whatever type."""
    config = config or tiny.config("pairs")
    *above, last = key.split(".")
    section = config
    for name in above:
        section = section[name]
    with section.unlocked(), section.ignore_type():
        section[last] = value
    return config


def refused(config, key):
    with pytest.raises(ValueError, match=rf"^config\.{key} is ") as caught:
        checks.check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- keys of a config


def test_every_number_has_a_range():
    assert set(ranges.RANGES) == set(NUMBERS)
    assert set(ranges.ITEMS) < {k for k, _ in ranges.keys(defaults.get_config())}


def outside(within):
    """Numbers just outside of an interval."""
    low, high = within[1:-1].split(", ")
    out = [float(low)] if within[0] == "(" else [float(low) - 1]
    out += [float(high)] if within[-1] == ")" else [float(high) + 1]
    return [int(x) if math.isfinite(x) and x.is_integer() else x for x in out]


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_outside_of_its_range_is_refused(key):
    within = ranges.RANGES[key]
    no_numbers = NO_NUMBERS[isinstance(NUMBERS[key], float) :]
    for value in (*outside(within), *no_numbers):
        assert within in refused(changed(key, value), key)
    if isinstance(NUMBERS[key], int):
        refused(changed(key, 1.5), key)
        refused(changed(key, 10**400), key)
    ranges.check(changed(key, NUMBERS[key]))


@pytest.mark.parametrize(
    "key, value",
    [
        ("buckets", (0,)), ("buckets", (64, "x")), ("mesh", (1, 1, True)), ("mesh", "1"),
        ("profile", (-1, 2)), ("profile", (1.5, 2)), ("plots", 1), ("date", 3),
        ("eval_at_start", "no"), ("optim", 3), ("model", {}), ("loss", "dpo"),
        ("model.dtype", None), ("lora.targets", "q"), ("checkpoint.asynchronous", 0),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused(key, value):
    if value == {}:
        with pytest.raises((KeyError, ValueError)):
            ranges.check(changed(key, ConfigDict()))
        return
    refused(changed(key, value), key)


def test_explain_refuses_it_too():
    with pytest.raises(ValueError, match=r"config\.optim\.b1 is 2\.0"):
        explain.explain(changed("optim.b1", 2.0))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_what_is_in_range_does_not_turn_an_update_round(name):
    """Sign of the first update of one parameter, at the edges of the ranges."""
    import jax.numpy as jnp

    for clip in (0.0, 1e-3, 1e3):
        for b1, b2 in ((0.0, 0.0), (0.99, 0.999)):
            config = tiny.config(**{"optim.name": name, "optim.clip": clip, "optim.b1": b1, "optim.b2": b2})  # fmt: skip
            ranges.check(config)
            _, tx = optim.from_config(config)
            params = {"embed": jnp.ones((2, 2))}
            update, _ = tx.update({"embed": jnp.ones((2, 2))}, tx.init(params), params)
            assert (update["embed"] <= 0).all()


# -- numbers of methods


def methods():
    for folder in plugin.ROLES:
        for name in plugin.available(folder):
            if not name.startswith("_"):
                function = plugin.find(folder, name)
                for p in inspect.signature(function).parameters.values():
                    number = isinstance(p.default, int | float)
                    own = p.kind is p.KEYWORD_ONLY and p.name not in plugin.SEARCH
                    if own and number and not isinstance(p.default, bool):
                        yield folder, name, p.name, p.default


@pytest.mark.parametrize("folder, name, key, default", [*methods()])
def test_a_number_of_a_method_is_refused_that_none_is(folder, name, key, default):
    function = plugin.find(folder, name)
    within = getattr(inspect.getmodule(function), "RANGES", {}).get(key, "[0, inf)")
    wrong = [math.nan, True, "1"]
    wrong += [x for x in (-1, -math.inf, math.inf) if not plugin.is_inside(x, within)]
    assert plugin.is_inside(default, within), "the default is outside"
    for value in wrong:
        with pytest.raises(ValueError, match=rf"{folder}\.{name}: {key}="):
            plugin.bind(
                function, {key: value}, name=f"{folder}.{name}",
                module=inspect.getmodule(function),
            )  # fmt: skip


def own_loss(policy, batch, *, beta=1, seed: int = 0):
    return policy, batch, beta, seed


def test_a_method_of_the_users_needs_no_ranges_for_that():
    with pytest.raises(ValueError, match=r"beta=-0\.1 is outside \[0, inf\)"):
        plugin.bind(own_loss, {"beta": -0.1})
    with pytest.raises(ValueError, match=r"seed=0\.5 should be a whole number"):
        plugin.bind(own_loss, {"seed": 0.5})
    assert plugin.bind(own_loss, {"beta": 0.5}).hyper["beta"] == 0.5


def test_weights_of_parts_keep_the_sign_of_a_loss():
    def parts(**of):
        return tiny.config(loss={"name": "sum", "parts": {k: {"weight": w} for k, w in of.items()}})  # fmt: skip

    checks.check(parts(sft=0.5, entropy=-0.1))  # the less certain, or the more
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"loss\.parts\.sft: losses\.sft: weight="):
            checks.check(parts(sft=weight))


def test_several_numbers_of_a_method_have_its_range():
    for weights in ({"length": -1.0}, {"length": math.nan}, {"length": "x"}):
        with pytest.raises(ValueError, match=r"rewards\.constraints: weights="):
            plugin.load("rewards", "constraints", {"weights": weights})


# -- every refusal of the checks


ROLL = {
    "loss": {"name": "policy_gradient"}, "shaping": {"rloo": {}}, "lms": {"ref": "init"},
    "rollout.reward": {"name": "constraints", "max_words": 3}, "rollout.max_new": 4,
}  # fmt: skip
RECORDED = {**ROLL, "rollout.source": "r.jsonl"}
ALONE = {"loss": {"name": "sft"}, "rollout.source": "policy", "rollout.group": 1}
PAIRS = {"loss": {"name": "dpo"}, "lms": {"ref": "init"}}
PART = {"name": "synthetic", "split": "train"}
REFUSALS = [
    ({"reweight": {"wpo": 5}}, "expected a section"),
    ({"data": {"split": "x"}}, r"config\.data has no 'name'"),
    ({"loss": {"name": 5}}, r"config\.loss\.name is 5"),
    ({"decoder.lo": 1}, "decoder has no name"),
    ({"lms": {"ref": 3}}, r"lms\.ref is 3"),
    ({"lms": {"ref": ""}}, r"lms\.ref is empty"),
    ({"best_mode": "mx"}, "best_mode is 'mx'"),
    ({"best_metric": "eval/x/y"}, "begins with none of"),
    ({"patience": 2}, "patience needs"),
    ({"average": 0.9, "average_every": 7}, "would not move in 6 steps"),
    ({"optim.critic_lr": 1.0}, "critic_lr is the rate of the value head"),
    ({"model.sizes": {}}, "needs a path to weights, or sizes"),
    ({"lora": {"rank": 4}}, r"config\.lora\.\w+ is missing: give the keys of lora one by one"),
    ({"lora.bias": "all"}, r"lora\.bias is set, but lora\.rank is 0"),
    ({"lora.dora": True}, r"lora\.dora is set, but lora\.rank is 0"),
    ({"optim": {"lr": 0.1}}, r"config\.optim\.\w+ is missing"),
    ({"model.param_dtype": "float16"}, r"model\.param_dtype is 'float16'"),
    ({"model.frozen_dtype": "int4"}, r"model\.frozen_dtype is 'int4'"),
    ({"loss": {"name": "reward_model"}}, "needs config.model.value_head=True"),
    ({**ROLL, "shaping": {"gae": {}}}, "a critic needs config.model.value_head"),
    ({"lora.rank": 2, "lms": {"base": "init"}}, "lms.base is the base"),
    ({"lms": {"ref": "average"}}, "would be the policy itself"),
    ({"loss": {"name": "policy_gradient"}}, "which rollouts bring"),
    ({"loss": {"name": "dpo"}}, r"needs \['ref_logps'\]: add config\.lms"),
    ({"data": {}}, "needs either config.data or config.mixture"),
    ({"data.specials": "x"}, r"config\.data\.specials is 'x'"),
    ({"data.raw": 1}, r"config\.data\.raw is 1"),
    ({"data": {}, "mixture": {"a": PART}}, r"mixture\.a has no 'ratio'"),
    ({"data": {}, "mixture": {"a": {**PART, "ratio": 1}}, "num_epochs": 1.0}, "num_epochs counts passes"),
    ({"trackers": (3,)}, "trackers has 3, expected names"),
    ({**ROLL, "reference_cache": "x"}, "without reference_cache"),
    ({"reference_cache": "x"}, r"need a frozen lms\.ref"),
    ({"evals": {"perplexity": {}}}, "need config.eval_data"),
    ({**ROLL, "rollout.source": "x.txt"}, r"rollout\.source is 'x\.txt'"),
    ({"shaping": {"rloo": {}}}, "config.shaping needs rollouts"),
    ({**ROLL, "data": {}, "mixture": {"a": {**PART, "ratio": 1}}}, "not a mixture"),
    ({**ROLL, "shaping": {}}, "needs advantages: set config.shaping"),
    ({**ROLL, "shaping": {"rloo": {}, "remax": {}}}, "one of them makes advantages"),
    ({**ROLL, "shaping": {"gdpo": {}, "rloo": {}}}, "need several rewards"),
    ({**ROLL, "loss": {"name": "sft"}}, "reads no advantages: empty config.shaping"),
    ({**ROLL, **PAIRS, "shaping": {}, "rollout.group": 2}, "takes two responses for"),
    ({**ROLL, "loss": {"name": "ppo"}, "model.value_head": True}, "needs returns"),
    ({**ROLL, "rollout.turns": 3}, "rollout.turns is 3"),
    ({**RECORDED, "rollout.policy": "ref"}, "leaves no room for rollout.policy"),
    ({**ALONE, "rollout.anchor": "x"}, "rollout.anchor needs rewards"),
    ({**ALONE, **PAIRS}, "responses without rewards are demonstrations"),
    ({**ROLL, **PAIRS, "shaping": {}, "rollout.keep": "best"}, "make demonstrations"),
    ({**ROLL, "rollout.policy": "nobody"}, r"rollouts need \['nobody'\]"),
    ({**ROLL, "average": 0.9, "lms": {"ref": "init", "a": "average"}, "rollout.anchor": "a",
      "shaping": {"ctrl": {}, "rloo": {}, "kl": {}}}, "rollout.anchor='a' moves"),
    ({**ROLL, "lms": {"other": "init"}, "shaping": {"ctrl": {}, "rloo": {}}},
     "need a frozen lms.ref"),
    ({**ROLL, "loss": {"name": "value_mean"}, "shaping": {}, "model.value_head": True},
     "rollout.policy is empty"),
    ({**ROLL, "loss": {"name": "value_q"}, "shaping": {}, "model.value_head": True},
     r"rollout\.policy is , expected"),
]  # fmt: skip


def attempt(changes):
    """What refuses a config, and the lines of `checks` that it went through."""
    config = tiny.config("sft")
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError) as caught:
        checks.check(config)
    frames = traceback.extract_tb(caught.value.__traceback__)
    return caught.value, {f.lineno for f in frames if f.filename == checks.__file__}


@pytest.mark.parametrize("changes, message", REFUSALS, ids=[m for _, m in REFUSALS])
def test_a_config_is_refused_with_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        raise attempt(changes)[0]


def test_every_refusal_of_the_checks_is_reached():
    tree = ast.parse(inspect.getsource(checks))
    raises = [n for n in ast.walk(tree) if isinstance(n, ast.Raise)]
    assert len(raises) > 30
    seen = set().union(*(attempt(changes)[1] for changes, _ in REFUSALS))
    lines = [(n.lineno, n.end_lineno) for n in raises]
    assert [a for a, b in lines if not seen & {*range(a, b + 1)}] == []
