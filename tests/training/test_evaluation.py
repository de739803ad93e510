"""How a run evaluates. (The evaluations themselves: evals/.)"""

import tiny

from alignax import plugin
from alignax.training import build


def test_evaluations_cut_prompts_as_the_rollouts_do():
    config = tiny.config("sft", length=24)
    config.rollout.reward = {"name": "constraints"}
    config.rollout.max_new = 6
    sampling = plugin.load("evals", "sample", {"reward": "constraints", "max_new": 2})
    reading = plugin.load("evals", "perplexity")
    assert build.sampled_length(config, sampling) == 18
    assert build.sampled_length(config, reading) == 24
    config.rollout.reward = {}
    assert build.sampled_length(config, sampling) == 24
