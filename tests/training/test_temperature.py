"""Runs whose responses are sampled at another temperature than 1."""

import pytest
import test_on_policy
from test_rollouts_without_reward import config_of, metrics

from alignax.training import loop


@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_fresh_responses_have_ratios_of_1_to_the_tempered_distribution(
    temperature, tmp_path
):
    """The step, the rollouts and the reference's column are at one temperature."""
    config = test_on_policy.run_config(num_steps=2)
    config.rollout.temperature = temperature
    loop.train(config, str(tmp_path / "run"))
    first = metrics(tmp_path / "run")[0]
    assert first["train/ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(first["train/approx_kl"]) < 1e-6
    assert first["train/rollout/logp_gap_max"] < 1e-3
    assert first["train/rollout/kl"] == 0  # to the policy itself


def test_a_reference_is_the_policy_at_any_temperature_before_the_first_step(tmp_path):
    config = config_of(**{"rollout.temperature": 0.7, "num_steps": 1})
    loop.train(config, str(tmp_path / "run"))
    assert metrics(tmp_path / "run")[0]["train/kl"] == 0
