"""Runs that learn from their own responses: which configs may, and how they go on."""

import json

import jax
import numpy as np
import pytest
import tiny

from alignax import plugin, shaping
from alignax.training import build, loop, plugins

pytestmark = pytest.mark.slow

CALLS: list = []  # what `counted` was asked, and after how many calls it breaks down
BROKEN_AT: list = []


def vowels(text: str) -> float:
    """Share of vowels: many ties, never NaN."""
    return sum(c in "aeiou" for c in text.lower()) / max(len(text), 1)


def counted(batch, texts, lms) -> np.ndarray:
    """A number that differs between nearly all responses."""
    CALLS.append(len(texts))
    if BROKEN_AT and len(CALLS) == BROKEN_AT[0]:
        raise KeyboardInterrupt
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    at = np.arange(1, mask.shape[-1] + 1)
    return (np.where(mask, tokens, 0) * at).sum(-1) % 101.0


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def steps(*names, **hyper):
    return shaping.in_order(plugin.load("shaping", n, hyper.get(n)) for n in names)


def roll(config, **settings):
    for key, value in settings.items():
        config.rollout[key] = value


def run_config(**changes):
    config = tiny.config("sft", length=24, num_steps=8)
    config.truncate_prompts = "left"
    roll(
        config,
        reward={"name": "test_on_policy.counted"},
        max_new=6,
        batches=2,
        epochs=2,
    )
    config.loss = {"name": "policy_gradient"}
    config.lms = {"ref": "init"}
    config.shaping = {"kl": {"beta": 0.1}, "rloo": {}, "whiten": {}}
    config.checkpoint.every = 1
    config.optim.schedule = "constant"
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


# -- what is refused


REFUSED = {
    "no advantages": ({"rollout.reward": {}, "shaping": {}}, "which rollouts bring"),
    "no shaping": ({"shaping": {}}, "needs advantages: set config.shaping"),
    "two advantages": ({"shaping": {"rloo": {}, "remax": {}}}, "one of them makes advantages"),
    "no critic": ({"shaping": {"gae": {}}}, "a critic needs config.model.value_head=True"),
    "no reference": ({"lms": {}}, r"rollouts need \['ref_logps'\]: add config\.lms"),
    "no returns": (
        {"loss": {"name": "ppo"}, "model.value_head": True}, "needs returns",
    ),
    "no room": ({"rollout.max_new": 24}, "leaves no room"),
    "no such rule": ({"rollout.truncated": "cry"}, "truncated is 'cry'"),
    "no such choice": ({"rollout.keep": "some"}, "keep is 'some'"),
    "nobody": ({"rollout.policy": "nobody"}, r"rollouts need \['nobody'\]"),
    "no pair": ({"rollout.keep": "best_worst", "rollout.group": 1}, "group >= 2"),
    "no group": ({"rollout.group": 0}, "group is 0"),
    "alone": ({"rollout.group": 1}, r"rloo compares the responses of a group"),
    "unread": ({"loss": {"name": "sft"}}, "reads no advantages"),
    "unordered": (
        {"loss": {"name": "dpo"}, "shaping": {}, "rollout.group": 2}, "keep='best_worst'",
    ),
    "another KL": (
        {"shaping": {"ctrl": {"beta": 0.2}, "kl": {"beta": 0.1}, "rloo": {}}},
        r"shaping\.ctrl is made for a KL strength of 0\.2, the run has 0\.1",
    ),
    "no anchor": ({"rollout.anchor": "nobody"}, r"rollouts need \['nobody'\]"),
    "nothing differs": (
        {"rollout.dynamic_sampling": True, "rollout.group": 1, "shaping": {"whiten": {}, "remax": {}}},
        "dynamic_sampling compares the responses of a group",
    ),
    "no such mean": (
        {"loss": {"name": "policy_gradient", "reduction": "tokens"}},
        "reduction='tokens' is not one of token, sequence, constant",
    ),
    "no draws": ({"rollout.max_draws": 0}, "max_draws is 0"),
    "no rollouts": ({"loss": {"name": "sft"}, "rollout.reward": {}}, "needs rollouts"),
    "a moving value": (
        {"loss": {"name": "value_mean"}, "shaping": {}, "model.value_head": True},
        "rollout.policy is empty, expected the name of one of config.lms: it learns from",
    ),
    "a moving soft value": (
        {"loss": {"name": "value_soft"}, "shaping": {}, "model.value_head": True},
        "rollout.policy is empty",
    ),
    "a moving next value": (
        {"loss": {"name": "value_bootstrap"}, "shaping": {}, "model.value_head": True},
        "rollout.policy is empty",
    ),
    "a moving Q": (
        {"loss": {"name": "value_q"}, "shaping": {}, "model.value_head": True},
        r"rollout\.policy is , expected ref",
    ),
    "no critic to rate": ({"optim.critic_lr": 1e-3}, "critic_lr is the rate of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_cannot_roll_is_refused(name, tmp_path):
    changes, message = REFUSED[name]
    config = run_config()
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        with config.unlocked():
            (config[section] if section else config)[last] = value
    with pytest.raises(ValueError, match=message):
        build.build(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_optimal_reward_is_that_of_the_runs_own_kl():
    loss = plugin.load("losses", "policy_gradient")
    several = steps(
        "ctrl", "kl", "rloo", ctrl={"transform": "optimal"}, kl={"beta": 0.3}
    )
    got = plugins.with_strength(several, loss)
    assert got[0].hyper["beta"] == 0.3
    assert got[1:] == several[1:]
    # a loss's KL is of tokens: no strength is right, and other transforms need none
    in_loss = plugin.load("losses", "policy_gradient_kl", {"beta": 0.1})
    with pytest.raises(
        ValueError, match=r"shaping.ctrl: transform 'optimal' .*no loss"
    ):
        plugins.with_strength(several, in_loss)
    plugins.with_strength(steps("ctrl", "rloo"), in_loss)
    same = steps("ctrl", "kl", "rloo", ctrl={"beta": 0.3}, kl={"beta": 0.3})
    assert plugins.with_strength(same, loss, ["shaping.ctrl"]) == same
    without = steps("ctrl", "rloo", ctrl={"transform": "optimal"})
    with pytest.raises(ValueError, match=r"only a penalty in the reward has"):
        plugins.with_strength(without, loss)


# -- samples of the reference


def test_reference_rewards_are_drawn_once_and_cached(tmp_path):
    config = tiny.config("sft", length=24)
    config.truncate_prompts = "left"
    roll(
        config,
        reward={"name": "test_on_policy.counted"}, max_new=6, reference_samples=8,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    config.loss = {"name": "policy_gradient"}
    config.lms = {"ref": "init"}
    config.shaping = {"ctrl": {}, "rloo": {}}

    def calls(**changes):
        CALLS.clear()
        with config.unlocked():
            config.update_from_flattened_dict(changes)
        run = build.build(config, str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"))
        batch = run.source.next(run.policy.params, 0)
        return len(CALLS), batch

    first, a = calls()
    second, b = calls()
    assert (first, second) == (
        13,
        1,
    )  # six steps of 4 prompts, two at once of 8 samples
    equal(a, b)
    ranks = a.advantages  # what it is made of are quantiles among 8: sixteenths
    assert np.isfinite(ranks).all()
    with pytest.raises(ValueError, match=r"max_new \(6 there, 5 here\)"):
        calls(**{"rollout.max_new": 5})
    config.lms = {"ref": "init", "judge": "init"}
    with pytest.raises(ValueError, match=r"lms\.judge \(absent there"):
        calls(**{"rollout.max_new": 6})


def test_rewards_of_the_reference_are_kept_with_the_run(tmp_path):
    config = run_config(num_steps=2, shaping={"ctrl": {}, "rloo": {}})
    roll(config, reference_samples=4)
    batches, calls = [], []
    for _ in range(2):
        CALLS.clear()
        run = build.build(config, str(tmp_path / "run"))
        assert not CALLS  # nothing is drawn before all else is found right
        batches.append(run.source.next(run.policy.params, 0))
        calls.append(len(CALLS))
    equal(*batches)
    assert calls == [4, 2]  # 8 prompts, four at once; two batches of the policy
    path = tmp_path / "run" / "reference_rewards.npz"
    saved = dict(np.load(path))
    saved["key"] = np.array(
        json.dumps({**json.loads(str(saved["key"])), "samples": "5"})
    )
    np.savez(path, **saved)
    with pytest.raises(ValueError, match=r"holds rewards of something else: samples.*rollout\.cache"):  # fmt: skip
        build.build(config, str(tmp_path / "run"))


def test_more_steps_add_the_prompts_that_they_meet(tmp_path):
    """As a run that goes on, or another one, with the same folder."""

    def rewards(steps):
        config = run_config(num_steps=steps, shaping={"ctrl": {}, "rloo": {}})
        roll(config, reference_samples=4, batches=1, epochs=1, cache=str(tmp_path))
        CALLS.clear()
        run = build.build(config, str(tmp_path / f"run{steps}"))
        run.source.next(run.policy.params, 0)
        sampled = len(CALLS) - 1  # a batch of the policy
        saved = np.load(tmp_path / "reference_rewards.npz")
        parts = np.split(saved["logps"], saved["ends"][:-1])
        rows = {row.tobytes(): x for row, x in zip(saved["rows"], parts, strict=True)}
        return sampled, rows

    whole = rewards(3)[1]  # drawn at once
    (tmp_path / "reference_rewards.npz").unlink()
    first, few = rewards(1)
    second, more = rewards(3)
    third, again = rewards(2)
    assert (first, second, third) == (1, 2, 0)  # four prompts at once
    assert len(few) == 4 and len(more) == 12 and again.keys() == more.keys()
    for key, values in few.items():
        np.testing.assert_array_equal(more[key], values)
    for key, values in whole.items():  # a prompt's samples do not depend on the others
        np.testing.assert_array_equal(more[key], values)


def test_the_global_table_is_that_of_all_prompts_of_the_run(tmp_path):
    ctrl = {"calibration": "global", "transform": "identity"}
    config = run_config(num_steps=2, shaping={"ctrl": ctrl, "rloo": {}})
    roll(config, reference_samples=4, batches=1, epochs=1)
    run = build.build(config, str(tmp_path / "run"))
    batch = run.source.next(run.policy.params, 0)
    table = dict(np.load(tmp_path / "run" / "reference_rewards.npz"))
    rewards_of_all = np.concatenate(
        [v.ravel() for k, v in table.items() if v.dtype == np.float32]
    )
    assert rewards_of_all.size == 8 * 4  # of both steps, not of this one alone
    below = (batch.feedback[..., None] > rewards_of_all).mean(-1)
    ties = (batch.feedback[..., None] == rewards_of_all).mean(-1)
    u = below + ties / 2
    want = (u - u.mean(1, keepdims=True)) * 4 / 3
    got = [a[m][0] for a, m in zip(batch.advantages.reshape(-1, batch.mask.shape[-1]), batch.mask.reshape(-1, batch.mask.shape[-1]), strict=True)]  # fmt: skip
    np.testing.assert_allclose(got, want.ravel(), atol=1e-6)


# -- in a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the last state of a run that was not interrupted, its rollouts' batches)."""
    CALLS.clear()
    state = loop.train(run_config(), str(tmp_path_factory.mktemp("whole") / "run"))
    return state, len(CALLS)


def test_a_run_that_broke_in_a_rollout_resumes_bit_for_bit(whole, tmp_path):
    want, rollouts = whole
    assert rollouts == 4  # two of two batches
    CALLS.clear()
    BROKEN_AT.append(4)  # between the two batches of the second rollout
    with pytest.raises(KeyboardInterrupt):
        loop.train(run_config(), str(tmp_path / "broken"))
    BROKEN_AT.clear()
    assert len(CALLS) == 4
    got = loop.train(run_config(), str(tmp_path / "broken"))
    assert len(CALLS) == 4 + 2  # that rollout from its beginning, the first not again
    equal(got.params, want.params)


def test_a_run_that_stopped_between_the_steps_of_a_rollout_goes_on_with_it(
    whole, tmp_path
):
    want, rollouts = whole
    CALLS.clear()
    config = run_config(num_steps=3)
    loop.train(config, str(tmp_path / "halves"))  # stops inside the first rollout
    (tmp_path / "halves" / "config.json").unlink()  # the longer run is another config
    got = loop.train(run_config(), str(tmp_path / "halves"))
    assert len(CALLS) == rollouts  # the responses in use were not drawn again
    equal(got.params, want.params)


def test_a_run_follows_its_own_average(tmp_path):
    """J-BOND's anchor; stopped and gone on with, bit for bit."""
    more = {
        "average": 0.5, "lms": {"ref": "init", "ema": "average"}, "rollout.anchor": "ema",
        "num_steps": 4, "rollout.batches": 1, "rollout.epochs": 1,
    }  # fmt: skip
    want = loop.train(run_config(**more), str(tmp_path / "whole"))
    loop.train(run_config(**{**more, "num_steps": 2}), str(tmp_path / "halves"))
    (tmp_path / "halves" / "config.json").unlink()
    got = loop.train(run_config(**more), str(tmp_path / "halves"))
    equal(got, want)
    plain = {**more, "rollout.anchor": ""}
    other = loop.train(run_config(**plain), str(tmp_path / "plain"))
    same = jax.tree.map(np.array_equal, other.params, want.params)
    assert not all(jax.tree.leaves(same))  # the slot counts in the mean over tokens


@pytest.mark.training
def test_learning_from_its_own_responses_raises_the_reward(tmp_path):
    """Six letters of vowels; five standard errors of the first rollout's mean and more."""
    config = run_config(**{"num_steps": 40, "batch_size": 8, "checkpoint.every": 0})
    roll(
        config, reward={"name": "test_on_policy.vowels"}, group=16, batches=1, epochs=1
    )
    config.shaping = {"group_norm": {}}
    config.optim.lr = 3e-2
    loop.train(config, str(tmp_path))
    rows = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    reward = [r["train/rollout/reward"] for r in rows if "train/rollout/reward" in r]
    assert len(reward) == 40
    assert np.mean(reward[:3]) < 0.1
    assert np.mean(reward[-3:]) > 0.5
