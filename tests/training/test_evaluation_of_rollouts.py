"""Evaluations of a run with rollouts: its reward, its time limit, its ends of responses."""

import time

import pytest
import tiny

from alignax.training import build, checks, evaluation, plugins


def hangs(text):
    while True:
        time.sleep(1)


def length(text):
    return len(text)


def config(**changes):
    c = tiny.config("sft", num_steps=0, truncate_prompts="left")
    c.rollout.reward = {"name": f"{__name__}.length"}
    c.eval_data = {**c.data, "split": "test"}
    c.evals = {"sample": {"max_new": 4, "group": 2, "size": 4}}
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def evaluated(c, folder):
    run = build.build(c, str(folder))
    lm = run.assemble(run.policy.params, run.lms)
    return evaluation.evaluate(run, lm, run.frozen(None), 0, c)


def test_the_reward_of_the_rollouts_judges_unless_an_evaluation_has_its_own():
    c = config()
    assert (
        plugins.evaluation(c, "sample").hyper["reward"]["name"] == f"{__name__}.length"
    )
    c.evals = {
        "sample": {"max_new": 4, "reward": {"name": "constraints", "max_words": 3}}
    }
    assert plugins.evaluation(c, "sample").hyper["reward"]["name"] == "constraints"
    c = config()
    c.rollout.reward = {}
    with pytest.raises(ValueError, match="needs a value for 'reward'"):
        checks.check(c)


def test_a_reward_that_hangs_ends_an_evaluation(tmp_path):
    c = config(**{"rollout.reward_seconds": 0.3})
    c.rollout.reward = {"name": f"{__name__}.hangs"}
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"hangs took more than 0\.3 seconds"):
        evaluated(c, tmp_path / "run")
    assert time.monotonic() - start < 60


def test_responses_end_at_the_stops_of_the_rollouts(tmp_path):
    plain = evaluated(config(), tmp_path / "a")
    every = tuple(chr(i) for i in range(32, 127))
    stopped = evaluated(config(**{"rollout.stops": every}), tmp_path / "b")
    assert stopped["eval/sample/ended"] > plain["eval/sample/ended"]
    assert stopped["eval/sample/reward"] < plain["eval/sample/reward"]
