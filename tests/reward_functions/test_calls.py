"""Calls of rewards: what each form gets, and what the user sees when one misbehaves."""

import contextlib
import re
import threading
import time

import numpy as np
import pytest

from alignax import rewards
from alignax.batch import Example
from alignax.reward_functions import calls
from alignax.text import tokenizer

BYTES = tokenizer.load("bytes")
EXAMPLES = [
    Example("a", "One?", (), columns={"answer": "1", "level": 2.0}),
    Example("b", [{"role": "user", "content": "Two?"}], (), columns={"answer": "2", "level": 3.0}),
    Example("c", "Three?", (), columns={"answer": "3", "level": 4.0}),
]  # fmt: skip
TEXTS = [["3", "2"], ["1", "two"]]  # responses to c and a
SEEN: dict = {}


@pytest.fixture
def batch(make_batch):
    """Two prompts, places 2 and 0 of the data."""
    made = make_batch(2, 2, 16)
    return made._replace(extra={"row": np.array([2, 0], np.int32)})


def call(function, batch, texts=TEXTS, **how):
    judge = rewards.load(f"{__name__}.{function.__name__}")
    return rewards.attempt(
        judge, batch, texts, {"lm": 1}, tokenizer=BYTES, examples=EXAMPLES, **how
    )


def is_answer(texts, answer):
    return [[float(t == a) for t in g] for g, a in zip(texts, answer, strict=True)]


def by_rows(texts, rows, prompts, ids, whole, batch, lms, tokenizer):
    SEEN.update(rows=rows, prompts=prompts, ids=ids, whole=whole, lms=lms, batch=batch)
    return np.array([[r["level"]] * 2 for r in rows])


def as_in_trl(prompts, completions, completion_ids, answer, **kwargs):
    SEEN.update(
        prompts=prompts, completions=completions, ids=completion_ids, rest=kwargs
    )
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_a_column_by_its_own_name(batch):
    assert call(is_answer, batch).values.tolist() == [[1, 0], [1, 0]]


def test_everything_by_its_name(batch):
    got = call(by_rows, batch)
    assert got.values.tolist() == [[4, 4], [2, 2]]
    assert SEEN["rows"] == [dict(EXAMPLES[2].columns), dict(EXAMPLES[0].columns)]
    assert SEEN["prompts"] == ["Three?", "One?"]
    assert SEEN["lms"] == {"lm": 1}
    for b in range(2):
        for g in range(2):
            mask = np.asarray(batch.mask)[b, g]
            assert SEEN["ids"][b][g] == np.asarray(batch.tokens)[b, g][mask].tolist()


def test_the_form_of_trl_is_flat_with_prompts_and_columns_repeated(batch):
    got = call(as_in_trl, batch)
    assert got.values.tolist() == [[1, 0], [1, 0]]
    assert SEEN["prompts"] == ["Three?", "Three?", "One?", "One?"]
    assert SEEN["completions"] == ["3", "2", "1", "two"]
    assert SEEN["rest"] == {"level": [4.0, 4.0, 2.0, 2.0]}
    assert [len(i) for i in SEEN["ids"]] == np.asarray(batch.mask).sum(
        -1
    ).ravel().tolist()


def content(completions, **kwargs):
    return [len(c[0]["content"]) for c in completions]


def test_a_prompt_of_messages_has_completions_of_messages(batch):
    batch = batch._replace(extra={"row": np.array([1, 1])})
    assert call(content, batch).values.tolist() == [[1, 1], [1, 3]]


def test_whole_texts_hold_special_tokens_and_the_prefill(batch):
    begun = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "So"}]
    given = calls.Responses(
        batch, TEXTS, {}, BYTES, None, [Example("x", begun, ())] * 3, "!"
    )
    text = BYTES.decode(calls.response_ids(batch)[0][0], keep_specials=True)
    assert calls.whole_texts(given)[0][0] == "So!" + text


# -- seven ways to misbehave


def hangs(text):
    while text == "2":
        re.search("b", "a" * 1000)
    return 1.0


def sleeps(texts, rows):
    if any("2" in group for group in texts):
        time.sleep(60)
    return np.ones((len(texts), len(texts[0])))


def catches_all(text):
    while text == "2":
        with contextlib.suppress(Exception):
            time.sleep(60)
    return 1.0


def backtracks(text):
    return float(bool(re.match("(a|a)*$", "a" * 40 + "b")) if text == "2" else 1)


def waits(text):
    lock = threading.Lock()
    if text == "2":
        lock.acquire()
        lock.acquire()
    return 1.0


def raises(text):
    return {"2": {}}.get(text, {"x": 1.0})["x"]


def none(texts, rows):
    return [[None if t == "2" else 1.0 for t in group] for group in texts]


def nan(completions, **kwargs):
    return [float("nan") if t == "2" else 1.0 for t in completions]


def a_string(texts, rows):
    return [["good" if t == "2" else 1 for t in group] for group in texts]


def raises_for_all(texts, rows):
    return [[float(int(t[0])) and 1.0 for t in g] for g in _no_two(texts)]


def _no_two(texts):
    if any("2" in g for g in texts):
        raise OSError("no")
    return [["1"] * len(g) for g in texts]


BAD = {
    raises_for_all: r"raises_for_all raised OSError\(no\) on the response '2'\n .*in _no_two",
    hangs: r"hangs took more than 0.2 seconds \(rollout.reward_seconds\) on the response '2'",
    sleeps: r"sleeps took more than 0.2 seconds .* on the response '2'",
    catches_all: "took more than 0.2 seconds",
    backtracks: "took more than 0.2 seconds",
    waits: "took more than 0.2 seconds",
    raises: r"raises raised KeyError\('x'\) on the response '2'\n .*test_calls.py.*in raises",
    none: "none gave None for the response '2'",
    nan: "nan gave nan for the response '2'",
    a_string: r"a_string gave the text 'good', expected a number, for the response '2'",
}


@pytest.mark.parametrize("function", BAD, ids=lambda f: f.__name__)
def test_a_reward_that_fails_names_the_response(function, batch):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"(?s){BAD[function]}"):
        call(function, batch, seconds=0.2)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("function", BAD, ids=lambda f: f.__name__)
def test_some_may_fail(function, batch):
    """One of four responses: it is not valid, the others have their rewards.

    Where a function of all responses raises, the group of that response has failed: it may
    compare responses.
    """
    raised = function in (sleeps, raises_for_all)
    share = 0.5 if raised else 0.25
    got = call(function, batch, seconds=0.2, tolerated=share)
    assert got.failed.tolist() == [[raised, True], [False, False]]
    assert got.values.tolist() == [[not raised, 0], [1, 1]]
    with pytest.raises(
        ValueError, match=r"the response '2'.* \(rollout.invalid_rewards is the"
    ):
        call(
            function,
            batch,
            texts=[["2", "2"], ["1", "2"]],
            seconds=0.2,
            tolerated=share,
        )


def centred(completions, **kwargs):
    """Compares the responses of a group: right only if it is called for whole groups."""
    if "two" in completions:
        raise KeyError("two")
    sizes = np.array([len(c) for c in completions], float).reshape(-1, 2)
    return (sizes - sizes.mean(1, keepdims=True)).ravel().tolist()


def test_a_reward_that_compares_within_groups_is_never_given_half_of_one(batch):
    got = call(centred, batch, texts=[["three", "1"], ["1", "two"]], tolerated=0.5)
    assert got.values.tolist() == [[2, -2], [0, 0]]
    assert got.failed.tolist() == [[False, False], [True, True]]
    with pytest.raises(
        ValueError, match=r"raised KeyError\('two'\) on the response 'two'"
    ):
        call(centred, batch, texts=[["three", "1"], ["1", "two"]])


def one_short(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def flat(texts, rows):
    return [1.0] * sum(map(len, texts))


def ragged(texts, rows):
    return [[1.0], [1.0, 2.0]]


def a_number(texts, rows):
    return 1.0


def a_dict(texts, rows):
    return {"reward": 1.0}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (one_short, r"gave shape \(3,\) \(a list\), expected a list of 4 numbers"),
        (flat, r"gave shape \(4,\) \(a list\), expected numbers \[B, G\] = \(2, 2\)"),
        (ragged, r"gave shape \(2,\) \(a list\), expected numbers \[B, G\] = \(2, 2\)"),
        (
            a_number,
            r"gave shape \(\) \(a float\), expected numbers \[B, G\] = \(2, 2\)",
        ),
        (a_dict, r"gave shape \(\) \(a dict\), expected numbers"),
    ],
)
def test_a_wrong_shape_is_an_error_whatever_may_fail(function, message, batch):
    with pytest.raises(ValueError, match=message):
        call(function, batch, tolerated=0.9)


def test_what_is_not_valid_may_have_any_reward(batch):
    valid = np.array([[True, False], [True, True]])
    got = call(none, batch._replace(valid=valid))
    assert not got.failed.any()
    assert got.values.tolist() == [[1, 0], [1, 1]]


def test_without_the_rows_a_reward_that_needs_them_says_so(batch):
    judge = rewards.load(f"{__name__}.is_answer")
    message = "is_answer reads 'answer', which is not given here, because the rows"
    with pytest.raises(ValueError, match=message):
        rewards.call(judge, batch, TEXTS, {})


def test_a_timer_of_the_caller_goes_on(batch):
    import signal

    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.6)
    try:
        call(hangs, batch, seconds=0.1, tolerated=0.25)
        time.sleep(1.0)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_another_thread_has_no_limit_and_warns(batch, caplog):
    got = []

    def slow():
        got.append(call(is_answer, batch, seconds=0.1))

    thread = threading.Thread(target=slow)
    thread.start()
    thread.join()
    assert got
    assert "no time limit for rewards" in caplog.text


def test_members_of_an_ensemble_are_given_too(batch):
    members = {"right": f"{__name__}.is_answer", "length": f"{__name__}.long"}
    judge = rewards.load(
        {"name": "ensemble", "members": members, "scales": {"length": 2}}
    )
    got = rewards.attempt(judge, batch, TEXTS, {}, examples=EXAMPLES)
    assert got.members["right"].tolist() == [[1, 0], [1, 0]]
    assert got.members["length"].tolist() == [[1, 1], [1, 3]]
    assert got.values.tolist() == [[1.5, 1], [1.5, 3]]
    assert rewards.columns(judge, ["answer", "level"]) == ["answer"]


def long(text):
    return len(text)


def multi_task(completions, answer, **kwargs):
    """As in TRL: None where the task is not this function's."""
    return [
        None if a == "3" else float(c == a)
        for c, a in zip(completions, answer, strict=True)
    ]


def nothing(completions, **kwargs):
    return [None if "2" in c else 1.0 for c in completions]


def test_a_member_that_gives_none_is_left_out_for_that_response(batch):
    def summed(rule, *names, **how):
        members = {n: f"{__name__}.{n}" for n in names}
        judge = rewards.load({"name": "ensemble", "members": members, "rule": rule})
        return rewards.attempt(judge, batch, TEXTS, {}, examples=EXAMPLES, **how)

    got = summed("sum", "multi_task", "long")  # TEXTS of the rows with answers 3 and 1
    assert got.values.tolist() == [[1, 1], [2, 3]]
    assert summed("mean", "multi_task", "long").values.tolist() == [[1, 1], [1, 1.5]]
    with pytest.raises(ValueError, match="gave nan for the response '2'"):
        summed("sum", "nothing")
    got = summed("sum", "nothing", tolerated=0.25)
    assert got.failed.tolist() == [[False, True], [False, False]]
    with pytest.raises(ValueError, match=r"member 'raises': .*raised KeyError"):
        summed("sum", "raises", "long")


def with_rest(completions, **kwargs):
    return [0.0 if hint is None else 1.0 for hint in kwargs["hint"]]


def with_default(texts, hint=None):
    return [
        [0.0 if h is None else 1.0] * len(t) for t, h in zip(texts, hint, strict=True)
    ]


@pytest.mark.parametrize("function", [with_rest, with_default])
def test_a_row_without_a_column_that_others_have_gives_none(function, batch):
    some = [EXAMPLES[0], EXAMPLES[1], EXAMPLES[2]._replace(columns={"hint": "x"})]
    judge = rewards.load(f"{__name__}.{function.__name__}")
    rewards.check(judge, some)
    got = rewards.call(judge, batch, TEXTS, {}, examples=some)
    assert got.tolist() == [[1, 1], [0, 0]]


def pair(completions, **kwargs):
    return [1.0, 2.0, 3.0, 4.0], {"half": [0.5, 1.0, 1.5, 2.0]}


def bad_pair(completions, **kwargs):
    return [1.0, 2.0, 3.0, 4.0], {"half": [0.5]}


def test_rewards_that_a_reward_returns_beside_have_its_shape(batch):
    got = call(pair, batch)
    assert got.members["half"].tolist() == [[0.5, 1.0], [1.5, 2.0]]
    with pytest.raises(ValueError, match=r"gave member 'half' of shape \(1,\)"):
        call(bad_pair, batch)


def huge(text):
    return 10**400


def test_a_number_beyond_floats_is_a_failure(batch):
    with pytest.raises(ValueError, match="huge gave an integer that no float can hold"):
        call(huge, batch)
