"""Runs that learn from responses which another sampler wrote, with its log-probabilities."""

import json
import pathlib

import jax
import numpy as np
import pytest
import test_on_policy
from test_rollouts_without_reward import metrics

from alignax import plugin
from alignax.inputs import prompts
from alignax.training import build, checks, loop, parallel

ONE = {
    "rollout.batches": 1,
    "rollout.epochs": 1,
    "num_steps": 2,
    "shaping": {"rloo": {}},
}


def recording(config, folder, *, shift=0.0, every=8):
    """A file of `every` responses of the policy itself to each prompt; its path."""
    run = build.build(config, str(folder / "sampler"))
    examples = plugin.load_examples(config.data)
    room = config.length - config.rollout.max_new
    asked = prompts.prompt_batches(
        examples, run.tokenizer, batch_size=len(examples), length=room, buckets=(room,)
    )[0]
    generate = parallel.generator(run.tokenizer, run.mesh)
    out = generate(
        run.policy, asked.tokens, asked.lengths, jax.random.key(9), group=every,
        max_new=config.rollout.max_new,
    )  # fmt: skip
    lines, batch = [], jax.tree.map(np.asarray, out.batch)
    for b, g in np.ndindex(*batch.valid.shape):
        at = batch.mask[b, g]
        logps = np.minimum(batch.old_logps[b, g][at] - shift, 0)
        row = {"ids": batch.tokens[b, g][at].tolist(), "logps": logps.tolist()}
        lines.append(json.dumps({"id": asked.ids[b], **row}))
    path = folder / "responses.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_policys_own_recorded_responses_weigh_1(tmp_path):
    config = test_on_policy.run_config(**ONE)
    path = recording(config, tmp_path)
    config.rollout.source = path
    config.reweight = {"importance": {"level": "sequence", "high": 2.0}}
    loop.train(config, str(tmp_path / "run"))
    first, second = metrics(tmp_path / "run")[:2]
    assert first["train/importance"] == pytest.approx(1, abs=1e-3)
    assert first["train/importance_cut"] == 0
    assert first["train/ratio"] == 1  # to the policy itself
    assert abs(second["train/importance"] - 1) > 1e-3  # it has learnt since


def test_a_sampler_that_claims_less_is_corrected_and_cut(tmp_path):
    """Its logps are .5 nats too low: weights of e^.5 a token, cut at 1.5."""
    config = test_on_policy.run_config(**ONE)
    config.rollout.source = recording(config, tmp_path, shift=0.5)
    config.reweight = {"importance": {"high": 1.5}}
    loop.train(config, str(tmp_path / "run"))
    first = metrics(tmp_path / "run")[0]
    assert first["train/importance"] == pytest.approx(1.5, abs=1e-4)
    assert first["train/importance_cut"] == 1
    # without weights the ratio itself is to the sampler
    config.reweight = {}
    loop.train(config, str(tmp_path / "plain"))
    first = metrics(tmp_path / "plain")[0]
    assert first["train/ratio"] == pytest.approx(np.exp(0.5), rel=1e-3)


def test_another_file_is_another_run(tmp_path):
    config = test_on_policy.run_config(**ONE)
    config.rollout.source = path = recording(config, tmp_path)
    run = build.build(config, str(tmp_path / "run"))
    run.source.next(run.policy.params, 0)
    saved = run.source.state()
    build.build(config, str(tmp_path / "again")).source.restore(saved)
    lines = pathlib.Path(path).read_text().splitlines()
    pathlib.Path(path).write_text("\n".join([*lines, lines[0]]))
    other = build.build(config, str(tmp_path / "other")).source
    with pytest.raises(ValueError, match="other rollout settings"):
        other.restore(saved)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout.stops": ("a",)}, "leaves no room for rollout.stops"),
        ({"rollout.anchor": "ref"}, "leaves no room for rollout.anchor"),
        ({"rollout.policy": "ref"}, "leaves no room for rollout.policy"),
        ({"shaping": {"ctrl": {}, "rloo": {}}}, "a shaping that samples lms.ref"),
        ({"shaping": {"kl": {"beta": 0.1}, "rloo": {}}}, "no file as rollout.source"),
        ({"rollout.source": "responses.txt"}, "or a file"),
    ],
)
def test_what_would_sample_too_is_refused(changes, message):
    start = ONE | {"rollout.source": "responses.jsonl"}
    with pytest.raises(ValueError, match=message):
        checks.check(test_on_policy.run_config(**start | changes))
