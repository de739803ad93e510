"""Rollouts whose responses end at stops or follow a grammar."""

import json
import re
import string

import numpy as np
import pytest
import test_on_policy

from alignax.reports.metrics import read
from alignax.sampling import automaton
from alignax.sampling.automaton import Automaton
from alignax.text import tokenizer
from alignax.training import build, checks, loop

pytestmark = pytest.mark.slow

TK = tokenizer.load("bytes")
PAIRS = {
    "loss": {"name": "dpo", "beta": 0.1}, "shaping": {}, "rollout.group": 4,
    "rollout.keep": "best_worst",
}  # fmt: skip


def digits(pieces, eos_ids):
    """Digits, then one letter at most, after which only the end is allowed."""
    is_digit = np.array([p.isdigit() for p in pieces])
    is_letter = np.array([p.isalpha() for p in pieces])
    ends = np.isin(np.arange(len(pieces)), eos_ids)
    flag = np.stack([is_digit | is_letter | ends, ends])
    return Automaton(np.stack([is_letter, np.ones_like(ends)]).astype(np.int32), flag)


def responses(config, folder):
    """Texts of one rollout's responses, and its batch."""
    run = build.build(config, str(folder))
    batch = run.source.next(run.policy.params, 0)
    ids, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    texts = [
        TK.decode(ids[*at][mask[*at]].tolist()) for at in np.argwhere(mask.any(-1))
    ]
    return texts, batch, run.source.report()["metrics"]


def test_a_response_ends_with_a_stop_and_is_not_cut_off(tmp_path):
    letters = tuple(string.ascii_letters)
    config = test_on_policy.run_config(**{"rollout.stops": letters, "rollout.group": 8})
    texts, batch, metrics = responses(config, tmp_path / "run")
    stopped = [t for t in texts if set(t) & {*letters}]
    assert len(stopped) > 5
    assert all(t[-1] in letters and not set(t[:-1]) & {*letters} for t in stopped)
    sizes = np.asarray(batch.mask).sum(-1)
    assert (sizes < 6).any()
    assert metrics["rollout/ended"] > 0.1
    assert metrics["rollout/logp_gap_max"] < 1e-3  # stops change no token's probability


def test_a_response_follows_the_grammar(tmp_path):
    grammar = {"rollout.grammar": "test_rollout_rules.digits"}
    texts, *_ = responses(
        test_on_policy.run_config(**PAIRS, **grammar), tmp_path / "run"
    )
    assert texts
    assert all(t.rstrip(string.ascii_letters).isdigit() or len(t) <= 1 for t in texts)
    texts, *_ = responses(
        test_on_policy.run_config(
            **PAIRS, **{"rollout.grammar": "regex:[0-9]{0,2}[x-z]"}
        ),
        tmp_path / "regex",
    )
    whole = [t for t in texts if re.fullmatch("[0-9]{0,2}[x-z]", t)]
    assert len(whole) > 5
    assert all(re.fullmatch("[0-9]{0,2}[x-z]?", t) for t in texts)
    short = test_on_policy.run_config(**PAIRS, **grammar, num_steps=1)
    loop.train(short, str(tmp_path / "short"))


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout.epochs": 2},  # stored log-probabilities
        # fresh ones: the step compares its own with the sampler's
        {"shaping": {"rloo": {}}, "lms": {}},
        {"rollout.epochs": 2, "rollout.temperature": 0.7, "layout": "rows"},
    ],
)
def test_ratios_are_of_the_distribution_under_the_grammar(changes, tmp_path):
    config = test_on_policy.run_config(**{
        "rollout.grammar": "test_rollout_rules.digits", "rollout.group": 6,
        "num_steps": 2, "lms": {"ref": "init"}, "shaping": {"kl": {}, "rloo": {}},
        **changes,
    })  # fmt: skip
    loop.train(config, str(tmp_path / "run"))
    first = read(tmp_path / "run")[0]
    # without it a digit would have a probability of about 11/260, here of about 1/6
    assert first["train/rollout/logp_gap"] < 1e-4
    if config.lms:
        assert first["train/rollout/kl"] == pytest.approx(0, abs=1e-5)
    assert first["train/rollout/entropy"] < 4.2  # nats of at most 63 tokens
    assert first["train/grad_norm"] > 0


def test_a_state_is_that_in_front_of_a_token_and_a_turn_begins_anew():
    rules = digits([bytes([i]) for i in range(256)], [0])
    letter, digit = ord("a"), ord("1")
    tokens = np.array([[5, digit, letter, 0, 7, 7, digit, letter, 0]])
    scored = np.array([[0, 1, 1, 1, 0, 0, 1, 1, 1]], bool)
    want = [[0, 0, 0, 1, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(automaton.states(rules, tokens, scored), want)


def test_a_run_goes_on_with_its_own_schema_only(tmp_path):
    path = tmp_path / "schema.json"

    def source(schema, folder):
        path.write_text(json.dumps(schema))
        grammar = {"rollout.grammar": f"json_schema:{path}"}
        config = test_on_policy.run_config(**grammar)
        return build.build(config, str(tmp_path / folder)).source

    saved = source({"type": "boolean"}, "one").state()
    source({"type": "boolean", "title": "the same texts"}, "two").restore(saved)
    with pytest.raises(ValueError, match="other rollout settings"):
        source({"type": "null"}, "three").restore(saved)


def test_a_run_goes_on_with_its_own_stops_only(tmp_path):
    def source(stops):
        config = test_on_policy.run_config(**{"rollout.stops": stops})
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return build.build(config, str(folder)).source

    saved = source(("a",)).state()
    source(("a",)).restore(saved)
    for other in ((), ("b",)):
        with pytest.raises(ValueError, match="other rollout settings"):
            source(other).restore(saved)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout.grammar": "no_such.rules", **PAIRS}, "rollout.grammar is 'no_such.rules'"),
        ({"rollout.grammar": "test_rollout_rules.none", **PAIRS}, "expected MODULE.FUNCTION"),
        ({"rollout.grammar": "digits", **PAIRS}, "expected MODULE.FUNCTION"),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        checks.check(test_on_policy.run_config(**changes))


def test_a_stop_that_is_none_is_refused(tmp_path):
    config = test_on_policy.run_config(**{"rollout.stops": ("a", "")})
    with pytest.raises(ValueError, match=r"rollout\.stops has ''"):
        build.build(config, str(tmp_path / "run"))
