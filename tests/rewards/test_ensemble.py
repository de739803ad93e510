"""Ensembles: every rule by hand, and errors that say whose they are."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from alignax import rewards
from alignax.rewards import model
from alignax.text import tokenizer

TEXTS = [["aaab", "b"], ["abab", ""]]


def count(text: str, *, letter: str = "a", bonus: float = 0.0) -> float:
    return text.count(letter) + bonus


def fails(text: str) -> float:
    return float("nan") if text == "abab" else 0.0


def dotted(function):
    return f"{__name__}.{function.__name__}"


A = {"name": dotted(count)}  # [[3, 0], [2, 0]]
B = {"name": dotted(count), "letter": "b", "bonus": 1.0}  # [[2, 2], [3, 1]]


def scored(batch, lms=None, texts=TEXTS, **spec):
    judge = rewards.load({"name": "ensemble", **spec})
    return rewards.call(judge, batch, texts, lms or {})


@pytest.fixture
def batch(make_batch):
    return make_batch(2, 2, 16)


@pytest.mark.parametrize(
    ("hyper", "want"),
    [
        ({}, [[2.5, 1], [2.5, 0.5]]),
        ({"rule": "min"}, [[2, 0], [2, 0]]),
        ({"rule": "std"}, [[2, 0], [2, 0]]),  # of two numbers: half their distance
        ({"rule": "std", "k": 0.5}, [[2.25, 0.5], [2.25, 0.25]]),
        ({"rule": "var", "k": 2.0}, [[2, -1], [2, 0]]),
        ({"scales": {"b": 10}}, [[11.5, 10], [16, 5]]),
        ({"rule": "min", "scales": {"b": 0.5}}, [[1, 0], [1.5, 0]]),
    ],
)
def test_each_rule_by_hand(batch, hyper, want):
    got = scored(batch, members={"a": A, "b": B}, **hyper)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_members_that_agree_cost_nothing(batch):
    same = {"x": A, "y": A, "z": A}
    for rule in ("mean", "min", "std", "var"):
        got = scored(batch, members=same, rule=rule, k=5.0)
        np.testing.assert_allclose(got, [[3, 0], [2, 0]], rtol=1e-6)


def test_a_config_describes_the_members(batch):
    c = ConfigDict({"name": "ensemble", "members": {"a": A, "b": B}, "rule": "min"})
    rewards.load(dict(c))  # members are bound though they are no plain dicts yet
    got = scored(batch, **{k: v for k, v in c.to_dict().items() if k != "name"})
    np.testing.assert_array_equal(got, [[2, 0], [2, 0]])


def test_ensembles_nest_and_hand_on_what_members_read(batch):
    inner = {"name": "ensemble", "members": {"r": {"name": "relevance"}}}
    judge = rewards.load({"name": "ensemble", "members": {"e": inner, "a": A}})
    assert rewards.call(
        judge, batch, TEXTS, {}, tokenizer=tokenizer.load("bytes")
    ).shape == (2, 2)
    message = "member 'e'.*member 'r'.*reads 'tokenizer'"
    with pytest.raises(ValueError, match=message):
        rewards.call(judge, batch, TEXTS, {})


def test_reward_models_of_an_ensemble_are_read_by_name(make_lm, tiny_config, batch):
    config = dataclasses.replace(tiny_config, value_head=True)
    lms = {f"r{i}": make_lm(config, seed=i) for i in range(3)}
    members = {k: {"name": "model", "model": k} for k in lms}
    got = scored(batch, lms, members=members, rule="min")
    want = [model.reward(batch, TEXTS, lms, model=k) for k in lms]
    np.testing.assert_allclose(got, np.min(want, 0), rtol=1e-6)
    seen = []

    def score(lm, batch, needs):
        seen.append(lm)
        return model._one_device(lm, batch, needs=needs)

    judge = rewards.load({"name": "ensemble", "members": members})
    rewards.call(judge, batch, TEXTS, lms, score=score)
    for a, b in zip(seen, lms.values(), strict=True):
        assert (
            a.params["embed"] is b.params["embed"]
        )  # in containers of the reward's own


def test_the_member_that_fails_is_named(batch):
    with pytest.raises(ValueError, match=r"member 'bad'.*gave nan.*'abab'"):
        scored(batch, members={"good": A, "bad": dotted(fails)})


def test_a_member_with_a_mistake_is_refused_before_anything_is_drawn():
    wrong = {"good": A, "bad": {"name": "constraints", "min_wrods": 3}}
    with pytest.raises(
        ValueError, match=r"member 'bad' of rewards\.ensemble.*min_words"
    ):
        rewards.load({"name": "ensemble", "members": wrong})
    with pytest.raises(ValueError, match=r"member 'bad'.*no 'name'"):
        rewards.load({"name": "ensemble", "members": {"bad": {}}})
    with pytest.raises(ValueError, match="needs a value for 'members'"):
        rewards.load("ensemble")
    with pytest.raises(ValueError, match="rule='median' is not one of mean, min"):
        rewards.load({"name": "ensemble", "members": {"a": A}, "rule": "median"})


def test_no_members_and_scales_of_no_member_are_errors(batch):
    with pytest.raises(ValueError, match="has no members"):
        scored(batch, members={})
    with pytest.raises(ValueError, match=r"scales of \['c'\].*among \['a'\]"):
        scored(batch, members={"a": A}, scales={"c": 2.0})
