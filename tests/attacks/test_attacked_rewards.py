"""A reward cannot change what the run goes on with, by accident."""

import contextlib
import copy
import os
import signal
import sys

import jax
import numpy as np
import pytest
import tiny

from alignax import plugin, rewards
from alignax.batch import Example
from alignax.reports.metrics import read
from alignax.reward_functions import process
from alignax.training import loop

pytestmark = pytest.mark.slow


def spoils_lms(texts, lms):
    name = next(iter(lms))
    lms[name].params["blocks"] = {}
    lms[name] = None
    lms["more"] = 3
    return np.zeros((len(texts), len(texts[0])))


def spoils_texts(texts):
    for group in texts:
        group[:] = ["" for _ in group]
    texts[0].append("one more")
    return np.zeros((len(texts), len(texts[0]) - 1))


def spoils_rows(texts, rows, prompts):
    for row, prompt in zip(rows, prompts, strict=True):
        row["answer"] = "42"
        if not isinstance(prompt, str):
            prompt[0]["content"] = "another question"
    return np.zeros((len(texts), len(texts[0])))


def spoils_conversations(completions, prompts, answer, **_):
    for i, messages in enumerate(prompts):
        messages[-1]["content"] = "another question"
        completions[i][0]["content"] = ""
        answer[i] = "42"
    return [0.0] * len(completions)


@pytest.fixture
def given(make_batch, make_lm, tiny_config):
    batch = jax.tree.map(np.array, make_batch(b=2, g=2))  # that can be written to
    examples = [
        Example(f"e{i}", [{"role": "user", "content": f"Q{i}"}], (), columns={"answer": str(i)})
        for i in range(2)
    ]  # fmt: skip
    texts = [["a", "b"], ["c", "d"]]
    return batch, texts, {"ref": make_lm(tiny_config, 0)}, examples


@pytest.mark.parametrize(
    "reward", [spoils_lms, spoils_texts, spoils_rows, spoils_conversations]
)
def test_what_a_reward_writes_to_is_its_own(given, reward):
    batch, texts, lms, examples = given
    params = {k: v.params for k, v in lms.items()}
    before = (*copy.deepcopy((batch, texts, params)), repr(examples))
    rewards.attempt(plugin.bind(reward), batch, texts, lms, examples=examples)
    after = (batch, texts, {k: v.params for k, v in lms.items()}, repr(examples))
    assert jax.tree.structure(before[:3]) == jax.tree.structure(after[:3])
    jax.tree.map(np.testing.assert_array_equal, before[:3], after[:3])
    assert before[3] == after[3]


@pytest.mark.parametrize("field", ["tokens", "mask", "valid", "lengths"])
def test_a_reward_cannot_write_to_the_batch(given, field):
    batch, texts, lms, examples = given

    def writes(texts, batch):
        getattr(batch, field)[:] = 0
        return np.zeros((2, 2))

    with pytest.raises(ValueError, match="read-only"):
        rewards.attempt(plugin.bind(writes), batch, texts, lms, examples=examples)


# -- what a reward changes of the process


def changes_jax():
    jax.config.update("jax_enable_x64", True)


def changes_folder():
    os.chdir("/")


def changes_signals():
    for number in process.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize("ends", ["well", "raises"])
@pytest.mark.parametrize("change", [changes_jax, changes_folder, changes_signals])
def test_what_a_reward_changes_of_the_process_is_put_back(given, change, ends, caplog):
    def state():
        folder, x64 = os.getcwd(), jax.config.jax_enable_x64
        return folder, x64, *(signal.getsignal(n) for n in process.SIGNALS)

    def reward(text):
        change()
        return 1.0 if ends == "well" else 1 / 0

    batch, texts, _, _ = given
    before = state()
    try:
        with contextlib.suppress(ValueError):
            rewards.attempt(
                plugin.bind(reward, name=f"own {change.__name__} {ends}"),
                batch,
                texts,
                {},
            )
        after = state()
    finally:  # so that a failure of this test is none of others
        jax.config.update("jax_enable_x64", before[1])
        os.chdir(before[0])
        for number, handler in zip(process.SIGNALS, before[2:], strict=True):
            signal.signal(number, handler)
    assert after == before
    assert (
        f"{ends} changes " in caplog.text and "put back after every call" in caplog.text
    )


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no message")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: sys.exit(75), r"raised SystemExit\(75\)"),
        (lambda: sys.exit(), r"raised SystemExit\(\)"),
        (
            lambda: raised(Mute()),
            r"raised Mute\(with a message that raises RuntimeError\)",
        ),
        (
            lambda: 10**400,
            "gave an integer that no float can hold for the response 'a'",
        ),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_what_a_reward_ends_with_is_named(given, wrong, message, whole):
    batch, texts, _, _ = given

    def of_text(text):
        return wrong()

    def of_texts(texts):
        return [[wrong() for _ in group] for group in texts]

    bound = plugin.bind(of_texts if whole else of_text)
    with pytest.raises(ValueError, match=message):
        rewards.attempt(bound, batch, texts, {})


def raised(error):
    raise error


def test_code_of_a_run_that_exits_is_an_error_of_the_program(tmp_path):
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    path = os.pathsep.join([str(tmp_path), tiny.environment()["PYTHONPATH"]])
    done = tiny.main(
        "--config=configs/sft.py:smoke", "--config.loss.name=script.loss",
        f"--workdir={tmp_path}/run", PYTHONPATH=path,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: code of this run called sys.exit(0)"
    assert "script.py" in done.stderr


def quiet(texts, lms):
    return np.array([[float(len(t)) for t in group] for group in texts])


def loud(texts, lms):
    found = quiet(texts, lms)
    spoils_lms(texts, lms)
    spoils_texts(texts)
    return found


def test_a_run_with_such_a_reward_ends_as_one_without(tmp_path, monkeypatch):
    losses = []
    for reward in ("quiet", "loud"):
        config = tiny.config("sft", **{
            "num_steps": 2, "length": 40, "loss": {"name": "policy_gradient_kl"},
            "lms": {"ref": "init"}, "shaping": {"rloo": {}}, "rollout.max_new": 4,
            "rollout.group": 2, "rollout.reward": {"name": f"test_attacked_rewards.{reward}"},
        })  # fmt: skip
        loop.train(config, str(tmp_path / reward))
        rows = read(tmp_path / reward)
        losses.append([{k: v for k, v in r.items() if k.endswith(("loss", "reward"))} for r in rows])  # fmt: skip
        samples = (tmp_path / reward / "samples.jsonl").read_text()
        assert "one more" not in samples
    assert losses[0] == losses[1] and len(losses[0]) == 3  # of step 0, too
