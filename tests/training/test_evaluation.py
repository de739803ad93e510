"""How a run evaluates. (The evaluations themselves: evals/.)"""

import pytest
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


def test_prompts_alone_are_evaluated_by_what_samples_responses(tmp_path):
    """And by nothing that reads responses."""
    data = {"name": "synthetic", "split": "test", "kind": "prompts", "size": 4}
    reward = {"name": "constraints", "pattern": "e"}
    evals = {"pass_at_k": {"reward": reward, "max_new": 2}}
    config = tiny.config("sft", eval_data=data, evals=evals)
    run = build.build(config, str(tmp_path / "run"))
    assert len(run.asked["pass_at_k"]) == 4
    config = tiny.config("sft", eval_data=data, evals={**evals, "perplexity": {}})
    with pytest.raises(ValueError, match="no response"):
        build.build(config, str(tmp_path / "other"))
