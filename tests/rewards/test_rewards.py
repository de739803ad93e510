"""Rewards: constraints by hand, the head's last scored value, and functions of text."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob, plugin, rewards
from alignax.models import sharding
from alignax.reward_functions import digest
from alignax.rewards import constraints, model
from alignax.training import parallel

TEXTS = [["The quick fox.", "Slow"], ['{"fox": 1}', "a FOX and a foxglove"]]


@pytest.fixture
def batch(make_batch):
    return make_batch(2, 2, 16)


def test_keywords_count_by_coverage_of_whole_words_in_any_case(batch):
    got = constraints.reward(TEXTS, keywords=("fox", "quick"))
    np.testing.assert_allclose(got, [[1.0, 0.0], [0.5, 0.5]])
    got = constraints.reward([["foxglove", "a fox"]], keywords=("fox",))
    np.testing.assert_allclose(got, [[0.0, 1.0]])


@pytest.mark.parametrize(
    "asked, want",
    [
        ({"avoid": ("slow",)}, [[1, 0], [1, 1]]),
        ({"min_words": 2}, [[1, 0], [1, 1]]),
        ({"max_words": 3}, [[1, 1], [1, 0]]),
        ({"min_words": 2, "max_words": 3}, [[1, 0], [1, 0]]),
        ({"pattern": r"^[A-Z]\w+$"}, [[0, 1], [0, 0]]),
        ({"as_json": True}, [[0, 0], [1, 0]]),
    ],
)  # fmt: skip
def test_each_constraint_by_hand(batch, asked, want):
    got = constraints.reward(TEXTS, **asked)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)


def test_no_response_hangs_or_ends_a_constraint():
    """Patterns for which backtracking explodes, and JSON that is nested too deeply."""
    texts = [["a" * 3000, "[" * 100_000]]
    got = constraints.reward(texts, pattern=r"^(a+)+$", as_json=True)
    np.testing.assert_array_equal(got, [[0.5, 0]])
    got = constraints.reward(texts, pattern=r"(a|aa)+b", avoid=("b",))
    np.testing.assert_array_equal(got, [[0.5, 0.5]])
    with pytest.raises(ValueError, match="a lookahead or lookbehind"):
        constraints.reward(texts, pattern=r"(?=a)")


def test_constraints_are_averaged_with_their_weights(batch):
    asked = {"keywords": ("fox",), "max_words": 3}
    got = constraints.reward(TEXTS, **asked)
    np.testing.assert_allclose(got, [[1, 0.5], [1, 0.5]])
    got = constraints.reward(TEXTS, **asked, weights={"keywords": 3.0})
    np.testing.assert_allclose(got, [[1, 0.25], [1, 0.75]])


def test_no_constraint_and_an_unknown_weight_are_errors(batch):
    with pytest.raises(ValueError, match=r"rewards\.constraints has no constraint; set one of keywords,"):  # fmt: skip
        constraints.reward(TEXTS)
    with pytest.raises(ValueError, match=r"unknown constraint \['lenght'\]; known: keywords,"):  # fmt: skip
        constraints.reward(TEXTS, max_words=3, weights={"lenght": 1.0})


def test_a_reward_model_is_read_at_the_last_scored_token(
    make_lm, tiny_config, make_batch
):
    lm = make_lm(dataclasses.replace(tiny_config, value_head=True))
    batch = make_batch(3, 2, 16, seed=3)
    batch = batch._replace(valid=batch.valid.at[1, 1].set(False))
    got = np.asarray(model.reward(batch, [], {"reward": lm}))
    values = np.asarray(logprob.score(lm, batch, needs=("values",)).values)
    for i in range(3):
        for j in range(2):
            end = int(batch.lengths[i, j]) - 1
            want = 0.0 if (i, j) == (1, 1) else values[i, j, end]
            assert got[i, j] == pytest.approx(want, abs=1e-6)
    assert len(set(got.ravel().tolist())) == 6
    # Padding cannot be read.
    padding = jnp.arange(16) >= batch.lengths[..., None]
    other = batch._replace(tokens=jnp.where(padding, 5, batch.tokens))
    np.testing.assert_array_equal(model.reward(other, [], {"reward": lm}), got)


def test_a_reward_model_reads_through_the_scorer_of_the_run(
    make_lm, tiny_config, make_batch, mesh
):
    """Rows and weights are spread over the mesh, and the host gets the same numbers."""
    lm = make_lm(dataclasses.replace(tiny_config, value_head=True))
    batch = make_batch(5, 2, 16, seed=3)  # rows that no mesh divides
    batch = batch._replace(valid=batch.valid.at[1, 1].set(False))
    host = jax.tree.map(np.asarray, batch)
    spread = lm._replace(params=sharding.put_params(lm.params, mesh))
    calls = []

    def score(*args, **kwargs):
        calls.append(kwargs)
        return parallel.scorer(mesh)(*args, **kwargs)

    judge = plugin.load("rewards", "model")
    got = rewards.call(judge, host, [["a", "b"]] * 5, {"reward": spread}, score=score)
    want = rewards.call(judge, host, [["a", "b"]] * 5, {"reward": lm})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert calls == [{"needs": ("values",)}]
    assert got[1, 1] == 0


def test_a_reward_model_that_is_not_there_or_has_no_head_is_named(tiny_lm, batch):
    with pytest.raises(ValueError, match=r"rewards\.model needs an LM 'judge'; there are \['ref'\]"):  # fmt: skip
        model.reward(batch, [], {"ref": tiny_lm}, model="judge")
    with pytest.raises(ValueError, match="value_head=True"):
        model.reward(batch, [], {"reward": tiny_lm})


def vowels(text: str, *, bonus: float = 0.0) -> float:
    return sum(c in "aeiou" for c in text) + bonus


def test_a_function_of_text_is_a_reward_by_its_dotted_name(batch):
    judge = plugin.load("rewards", f"{__name__}.vowels", {"bonus": 1})
    got = rewards.call(judge, batch, [["aei", "x"], ["", "you"]], {})
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [[4, 1], [1, 3]])


def test_a_reward_file_gets_batch_texts_and_models(batch, make_lm, tiny_config):
    judge = plugin.load("rewards", "constraints", {"keywords": ("fox",)})
    np.testing.assert_array_equal(
        rewards.call(judge, batch, TEXTS, {}), [[1, 0], [1, 1]]
    )
    lm = make_lm(dataclasses.replace(tiny_config, value_head=True))
    got = rewards.call(plugin.load("rewards", "model"), batch, TEXTS, {"reward": lm})
    np.testing.assert_array_equal(got, jax.device_get(model.reward(batch, [], {"reward": lm})))  # fmt: skip


def picky(batch, texts, lms) -> np.ndarray:
    """Reads a whole batch and breaks on one text."""
    assert batch.tokens.shape[:2] == (len(texts), len(texts[0]))
    if any("FOX" in t for group in texts for t in group):
        raise KeyError("FOX")
    return np.ones((len(texts), len(texts[0])))


def together(batch, texts, lms) -> np.ndarray:
    if len(texts) > 1:
        raise KeyError("too many")
    return np.ones((len(texts), len(texts[0])))


def test_a_batched_reward_that_raises_names_the_text_that_caused_it(batch):
    message = r"picky raised KeyError\('FOX'\) on the response 'a FOX and a foxglove'"
    with pytest.raises(ValueError, match=message):
        rewards.call(plugin.load("rewards", f"{__name__}.picky"), batch, TEXTS, {})
    message = "too many.* on a batch that begins with 'The quick fox.'"
    with pytest.raises(ValueError, match=message):
        rewards.call(plugin.load("rewards", f"{__name__}.together"), batch, TEXTS, {})


@pytest.fixture
def two_hosts(monkeypatch):
    """This host and another, which says what the test has it say."""
    gathered: list = []
    monkeypatch.setattr(rewards.jax, "process_count", lambda: 2)

    def gather(mine):
        gathered.append(mine)
        return np.stack([mine, gathered[0]])

    monkeypatch.setattr(rewards.multihost_utils, "process_allgather", gather)
    return gathered


def test_hosts_that_judge_differently_stop(batch, two_hosts):
    judge = plugin.load("rewards", f"{__name__}.vowels")
    texts = [["aei", "x"], ["", "you"]]
    want = [[3, 0], [0, 2]]
    assert rewards.call(judge, batch, texts, {}).tolist() == want
    assert rewards.call(judge, batch, texts, {}).tolist() == want  # the other as before
    message = "vowels gave hosts different numbers"
    with pytest.raises(ValueError, match=message):
        rewards.call(judge, batch, [["aei", "x"], ["", "yu"]], {})


def test_a_host_whose_judge_raised_does_not_leave_the_others_waiting(batch, two_hosts):
    picky = plugin.load("rewards", f"{__name__}.picky")
    with pytest.raises(ValueError, match="on the response 'a FOX"):
        rewards.call(picky, batch, TEXTS, {})
    assert len(two_hosts) == 1  # it has gathered
    calm = [["a", "b"], ["c", "d"]]
    with pytest.raises(ValueError, match=r"picky raised on hosts \[1\]"):
        rewards.call(picky, batch, calm, {})


def test_the_identity_of_a_reward_holds_its_code(monkeypatch):
    judge = plugin.load("rewards", f"{__name__}.vowels")
    members = {"a": f"{__name__}.vowels", "b": {"name": "constraints", "max_words": 3}}
    several = rewards.load({"name": "ensemble", "members": members})
    before = [rewards.identity(judge), rewards.identity(several)]
    assert before == [rewards.identity(judge), rewards.identity(several)]
    assert judge.name in before[0]
    source = digest.inspect.getsource

    def edited(extra):
        def getsource(f):
            return source(f) + extra * (f is judge.function)

        monkeypatch.setattr(digest.inspect, "getsource", getsource)
        return [rewards.identity(judge), rewards.identity(several)]

    assert edited("    # a comment\n") == before
    after = edited("    raise\n")
    assert before[0] != after[0]
    assert before[1] != after[1]


SAME_CODE = (
    "def f(text):\n    return text.count('a') / 2\n",
    'def f(text):  # why\n    return text.count("a") / 2\n',
    'def f(text):\n    """What it is."""\n    return text.count("a") / 2\n',
    "    def f(text):\n        return (\n            text.count('a')\n            / 2\n        )\n",
)
OTHER_CODE = (
    "def f(text):\n    return text.count('a') / 3\n",
    "def f(text):\n    return text.count('b') / 2\n",
    "def f(text, n=2):\n    return text.count('a') / n\n",
    "def f(text):\n    return text.count('a') // 2\n",
    "@float\ndef f(text):\n    return text.count('a') / 2\n",
)


def test_partials_of_other_functions_or_arguments_are_other_code():
    some = (
        functools.partial(max, 1), functools.partial(max, 2), functools.partial(min, 1),
        functools.partial(max, 1, key=3), max,
    )  # fmt: skip
    assert len({digest.code_digest(f) for f in some}) >= 4
    again = functools.partial(max, 1)
    assert digest.code_digest(again) == digest.code_digest(some[0])


def test_comments_docstrings_and_layout_are_not_code(monkeypatch):
    def of(source):
        monkeypatch.setattr(digest.inspect, "getsource", lambda f: source)
        return digest.code_digest(len)

    same = {of(source) for source in SAME_CODE}
    assert len(same) == 1
    others = {of(source) for source in OTHER_CODE}
    assert len(others) == len(OTHER_CODE)
    assert not others & same
    # a docstring that is all there is, and half a line of source
    assert of('def f(x):\n    """A."""\n') == of('def f(x):\n    """B."""\n')
    assert of("key=lambda text: 1)\n") != of("key=lambda text: 2)\n")


def test_the_table_of_earlier_sources_is_of_the_rewards_as_they_are():
    """A key that no reward has is stale: saved runs with that reward would be refused."""
    names = ("constraints", "ensemble", "model", "relevance")
    files = [importlib.import_module(f"alignax.rewards.{name}") for name in names]
    assert [digest.saved_digest(f.reward) for f in files] == [*digest.EARLIER]


def reads_both(batch, texts, lms, *, tokenizer, score=None, shift=0.0):
    value = tokenizer + (score() if score else 0) + shift
    return np.full((len(texts), len(texts[0])), value)


def test_a_reward_is_handed_what_it_takes_and_nothing_else(batch):
    judge = plugin.load("rewards", f"{__name__}.reads_both", {"shift": 1})
    assert judge.hyper == {"shift": 1}  # what is handed in is no hyper-parameter
    given = {"tokenizer": 10, "score": lambda: 200}
    assert (rewards.call(judge, batch, TEXTS, {}, **given) == 211).all()
    assert (rewards.call(judge, batch, TEXTS, {}, tokenizer=10) == 11).all()
    with pytest.raises(ValueError, match="reads_both reads 'tokenizer', which is not"):
        rewards.call(judge, batch, TEXTS, {}, score=given["score"])
    plain = plugin.load("rewards", "constraints", {"keywords": ("fox",)})
    got = rewards.call(plain, batch, TEXTS, {}, **given)
    np.testing.assert_array_equal(got, [[1, 0], [1, 1]])
