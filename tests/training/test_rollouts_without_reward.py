"""Rollouts for losses that need no reward: distillation, and what is refused."""

import json

import numpy as np
import pytest
import test_on_policy
import tiny

from alignax.training import build, checks, loop

pytestmark = pytest.mark.slow


def config_of(**changes):
    config = tiny.config("sft", length=24, num_steps=24)
    config.truncate_prompts = "left"
    config.rollout.source, config.rollout.max_new = "policy", 8
    config.rollout.group = 2
    config.loss = {"name": "gkd", "reverse": 1.0}
    config.lms = {"ref": "init"}
    config.optim.schedule, config.optim.warmup = "constant", 0
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_student_comes_close_to_its_teacher_on_its_own_responses(tmp_path):
    teacher = tiny.config("sft", num_steps=16, seed=1)
    loop.train(teacher, str(tmp_path / "teacher"))
    ref = {"lms.ref": str(tmp_path / "teacher")}
    loop.train(config_of(**ref), str(tmp_path / "run"))
    rows = [row for row in metrics(tmp_path / "run") if "train/kl" in row]
    kl = [row["train/kl"] for row in rows]
    assert np.mean(kl[-4:]) < 0.5 * np.mean(kl[:4])
    assert rows[0]["train/rollout/tokens"] > 0
    assert not [
        name for row in rows for name in row if "reward" in name or "ties" in name
    ]


def test_only_their_responses_are_learned_from(tmp_path):
    """The batch has the policy's responses, twice each prompt, and no advantages."""
    run = build.build(config_of(), str(tmp_path / "run"))
    batch = run.source.next(run.policy.params, 0)
    assert batch.valid.shape == (4, 2)
    assert batch.advantages is None
    assert not np.asarray(batch.feedback).any()
    scored = np.asarray(batch.mask).sum(-1)
    assert scored.min() >= 1
    assert scored.max() <= 8


def test_a_run_of_before_the_key_goes_on(tmp_path):
    config = test_on_policy.run_config(num_steps=2)
    loop.train(config, str(tmp_path / "run"))
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    del saved["rollout"]["source"]
    path.write_text(json.dumps(saved))
    build.build(config, str(tmp_path / "run"))
    config.rollout.source = "policy"
    with pytest.raises(ValueError, match=r"rollout\.source \( there, policy here"):
        build.build(config, str(tmp_path / "run"))


REFUSED = {
    "advantages": (
        {"loss": {"name": "policy_gradient"}}, "policy_gradient' needs rewards"
    ),
    "shaping": ({"shaping": {"rloo": {}}}, "config.shaping needs rewards"),
    "the best": ({"rollout.keep": "best"}, "rollout.keep='best' needs rewards"),
    "anchor": ({"rollout.anchor": "ref"}, "rollout.anchor needs rewards"),
    "dynamic": ({"rollout.dynamic_sampling": True}, "dynamic_sampling needs rewards"),
    "punish": ({"rollout.truncated": "punish"}, "truncated='punish' needs rewards"),
    "overlong": ({"rollout.overlong_buffer": 2}, "overlong_buffer needs rewards"),
    "pairs": ({"loss": {"name": "dpo"}}, "reads pairs, but responses without rewards are"),
    "no such source": ({"rollout.source": "data"}, "rollout.source is 'data', expected"),
    "mixture": (
        {"mixture": {"a": {"name": "synthetic", "ratio": 1.0}}, "data": {}},
        "rollouts take config.data, not a mixture",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_a_reward_gives_is_refused(name):
    changes, message = REFUSED[name]
    config = config_of()
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        with config.unlocked():
            (config[section] if section else config)[last] = value
    with pytest.raises(ValueError, match=message):
        checks.check(config)
