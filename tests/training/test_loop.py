"""The loop: what stops a run, what it keeps, and what it says. The step is test_step's."""

import dataclasses
import json
import math
import os
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from alignax import logprob, plugin
from alignax.batch import LM
from alignax.inputs import source
from alignax.models import sharding
from alignax.reports.metrics import read
from alignax.runs import checkpoint
from alignax.text import tokenizer as tokenizers
from alignax.training import build, loading, loop

EVAL_DATA = {"name": "synthetic", "split": "test", "kind": "sft", "size": 4}


def rows(workdir, key):
    return {int(r["step"]): r[key] for r in read(workdir) if key in r}


def saved_steps(workdir, name="checkpoints"):
    folder = pathlib.Path(workdir) / name
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def meta(workdir, step, name="checkpoints"):
    with ocp.CheckpointManager(pathlib.Path(workdir) / name) as manager:
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return manager.restore(step, args=items).meta


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def batches(config, steps):
    """[(batch, ids)] that a run of `config` meets, from its source alone."""
    src = source.dataset_source(
        plugin.load_examples(config.data), tokenizers.load("bytes"),
        batch_size=config.batch_size, length=config.length, buckets=config.buckets,
        seed=config.seed, grid=(1, 1),
    )  # fmt: skip
    return [(src.next(None, k), src.report()["ids"]) for k in range(steps)]


@pytest.mark.parametrize("every", [3, 4])
def test_without_a_decay_the_reference_is_a_copy_made_every_so_many_steps(
    every, tmp_path
):
    config = tiny.config("pairs", **{
        "num_steps": 4, "average_every": every, "lms": {"ref": "average"},
        "checkpoint.every": 1, "checkpoint.keep": 10,
    })  # fmt: skip
    state = loop.train(config, str(tmp_path))
    kept = states(tmp_path)
    assert same(kept[every][1], kept[every][0])
    assert same(kept[every - 1][1], kept[1][1])  # as the run began
    assert not same(kept[every - 1][1], kept[every][1])
    last = 4 // every * every
    assert same(state.average, kept[last][0])


# -- one run, read from all sides


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A DPO run against a moving reference that keeps every checkpoint."""
    config = tiny.config("pairs", **{
        "num_steps": 4, "average": 0.5, "lms": {"ref": "average"},
        "checkpoint.every": 1, "checkpoint.keep": 10,
    })  # fmt: skip
    workdir = str(tmp_path_factory.mktemp("run"))
    return config, workdir, loop.train(config, workdir)


def states(workdir):
    """{step: (params, average)} from the checkpoints."""
    out = {}
    with ocp.CheckpointManager(pathlib.Path(workdir) / "checkpoints") as manager:
        for step in manager.all_steps():
            items = ocp.args.Composite(
                params=ocp.args.StandardRestore(), rest=ocp.args.StandardRestore()
            )
            got = manager.restore(step, args=items)
            out[step] = (got.params, got.rest["average"])
    return out


def test_every_step_writes_one_line_of_metrics(run):
    _, workdir, state = run
    assert int(state.step) == 4
    names = {
        "step", "train/loss", "train/grad_norm", "train/lr", "train/padding",
        "train/tokens_per_second", "train/accuracy", "train/margin",
        "train/log_ratio_chosen", "train/log_ratio_rejected", "train/useful_tokens",
    }  # fmt: skip
    assert [(r["step"], set(r)) for r in read(workdir)] == [
        (step, names) for step in (1, 2, 3, 4)
    ]


def test_the_last_checkpoint_is_the_returned_state(run):
    _, workdir, state = run
    assert saved_steps(workdir) == [1, 2, 3, 4]
    params, average = states(workdir)[4]
    assert same(params, state.params)
    assert same(average, state.average)
    assert not same(params, average)


def test_average_is_the_exponential_average_of_the_parameters(run):
    _, workdir, _ = run
    kept = states(workdir)
    for step in (2, 3, 4):
        want = jax.tree.map(
            lambda a, p: 0.5 * a + 0.5 * p, kept[step - 1][1], kept[step][0]
        )
        assert same(want, kept[step][1])  # halves are exact in float32


def test_an_average_as_reference_moves_with_the_policy(run):
    config, workdir, _ = run
    params, average = states(workdir)[1]
    model = loading.model_config(config, tokenizers.load("bytes").vocab_size)
    batch = jax.tree.map(jnp.asarray, batches(config, 2)[1][0])
    policy = logprob.score(LM(model, params), batch).logps.sum(-1)
    ref = logprob.score(LM(model, average), batch).logps.sum(-1)
    want = (policy - ref).sum(0) / batch.valid.sum(0)
    told = read(workdir)[1]
    # float32 sums of 40 log-probabilities near 5 nats: 1e-4
    np.testing.assert_allclose(told["train/log_ratio_chosen"], want[0], atol=1e-4)
    np.testing.assert_allclose(told["train/log_ratio_rejected"], want[1], atol=1e-4)
    assert abs(want[0]) > 0.01


def test_a_checkpoint_knows_data_position_seed_and_config(run):
    config, workdir, _ = run
    found = meta(workdir, 3)
    assert found["seed"] == config.seed
    assert found["config"] == json.loads(json.dumps(config.to_dict()))
    src = source.dataset_source(
        plugin.load_examples(config.data), tokenizers.load("bytes"),
        batch_size=config.batch_size, length=config.length, buckets=config.buckets,
        seed=config.seed, grid=(1, 1),
    )  # fmt: skip
    src.restore(found["data"])
    after = src.next(None, 3)
    assert np.array_equal(after.tokens, batches(config, 4)[3][0].tokens)


def test_the_same_command_on_a_finished_run_changes_nothing(run):
    config, workdir, state = run
    before = read(workdir)
    again = loop.train(config, workdir)
    assert same(again.params, state.params)
    assert read(workdir) == before


# -- what stops a run


def test_nan_loss_stops_with_step_batch_and_last_good_checkpoint(tmp_path):
    config = tiny.config("pairs", **{
        "data": {"name": "tiny.poisoned", "split": "train", "at": 0},
        "loss": {"name": "tiny.nan_dpo"}, "checkpoint.every": 1, "num_steps": 8,
    })  # fmt: skip
    bad = 3
    ids = [ids for _, ids in batches(config, 8)]
    config.data.at = int(ids[bad][0].rpartition(":")[2])  # first met after three steps
    with pytest.raises(loop.NonFiniteLoss) as error:
        loop.train(config, str(tmp_path))
    message = str(error.value)
    assert f"at step {bad + 1};" in message
    assert message.startswith("loss nan, gradient norm ")
    assert str(ids[bad]) in message
    assert f"last good checkpoint: step {bad} in {tmp_path}/checkpoints" in message
    assert saved_steps(tmp_path)[-1] == bad  # the bad state was not saved


def test_nan_loss_before_any_checkpoint_names_none(tmp_path):
    config = tiny.config("pairs", data={"name": "tiny.poisoned", "split": "train"}, loss={"name": "tiny.nan_dpo"}, num_steps=8)  # fmt: skip
    with pytest.raises(loop.NonFiniteLoss, match=r"no checkpoint"):
        loop.train(config, str(tmp_path))
    assert saved_steps(tmp_path) == []


def test_policy_is_reference_at_step_0(tmp_path, capsys):
    loop.train(tiny.config("pairs", num_steps=1), str(tmp_path))
    start = read(tmp_path)[0]
    assert start["step"] == 0
    assert start["start/log_ratio"] == 0
    assert start["start/loss"] == pytest.approx(math.log(2), abs=6e-8)  # float32
    first = read(tmp_path)[1]
    # the program with a gradient rounds in its own way: one ulp of a sum of 34 numbers
    for side in ("chosen", "rejected"):
        assert first[f"train/log_ratio_{side}"] == pytest.approx(0, abs=1e-5)
    assert "largest log-ratio 0, loss 0.69314" in capsys.readouterr().out


def test_a_reference_that_is_not_the_policy_is_refused(tmp_path, monkeypatch):
    honest = build.build

    def perturbed(config, workdir):
        run = honest(config, workdir)
        ref = run.lms["ref"]
        params = jax.tree.map(lambda x: x + 1e-3, ref.params)
        return run._replace(lms={"ref": LM(ref.config, params)})

    monkeypatch.setattr(build, "build", perturbed)
    with pytest.raises(RuntimeError, match=r"policy and reference differ by 0\.\d+"):
        loop.train(tiny.config("pairs"), str(tmp_path))
    assert saved_steps(tmp_path) == []


@pytest.mark.parametrize(
    "dtype, value, fine",
    [("float32", 5e-3, True), ("float32", -0.02, False), ("bfloat16", 0.5, True), ("bfloat16", 2.0, False)],
)  # fmt: skip
def test_the_training_program_must_agree_with_step_0(tiny_config, dtype, value, fine):
    model = dataclasses.replace(tiny_config, dtype=dtype)
    metrics = {
        "log_ratio_chosen": jnp.float32(0),
        "log_ratio_rejected": jnp.float32(value),
    }
    if fine:
        loop.close_to_start(metrics, model)
    else:
        with pytest.raises(RuntimeError, match=f"log_ratio_rejected.*{dtype}"):
            loop.close_to_start(metrics, model)


def test_a_step_that_compiles_again_is_an_error(tmp_path, monkeypatch):
    honest = loop.make_train_step

    def leaky(*args, **kwargs):
        step = honest(*args, **kwargs)
        count = iter(range(1, 100))

        def call(*a):
            return step(*a)

        call.compilations = lambda state: next(count)  # one more at every step
        return call

    monkeypatch.setattr(loop, "make_train_step", leaky)
    with pytest.raises(RuntimeError, match=r"step 1 compiled again .*\(4, 1, 72\)"):
        loop.train(tiny.config(), str(tmp_path))


def test_each_bucket_compiles_once_and_is_no_error(tmp_path, monkeypatch):
    shapes, honest = [], sharding.put_batch
    monkeypatch.setattr(
        sharding,
        "put_batch",
        lambda b, m: shapes.append(b.tokens.shape) or honest(b, m),
    )
    loop.train(tiny.config(buckets=(64, 72), layout="rows"), str(tmp_path))
    assert len(set(shapes)) == 2


def test_sigterm_during_an_evaluation_saves_before_it_stops(tmp_path):
    def term():
        os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    tiny.SCRIPT[:] = [0.0, term, *[0.0] * 9]
    config = tiny.config(eval_every=2, evals={"scripted": {"name": "tiny.scripted"}}, eval_data=EVAL_DATA)  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Preempted, match=r"SIGTERM at step (4|5): saved") as stop:
        loop.train(config, str(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before
    step = int(re.search(r"step (\d)", str(stop.value)).group(1))
    assert saved_steps(tmp_path) == [step]


# -- evaluation, best, early stop


def test_evaluations_run_at_the_start_on_schedule_and_at_the_end(tmp_path):
    config = tiny.config(num_steps=5, eval_every=2, eval_at_start=True, evals={"perplexity": {}}, eval_data=EVAL_DATA)  # fmt: skip
    loop.train(config, str(tmp_path))
    nll = rows(tmp_path, "eval/perplexity/nll")
    assert list(nll) == [0, 2, 4, 5]
    assert sorted(nll.values(), reverse=True) == list(nll.values())  # it learns
    assert [r["step"] for r in read(tmp_path) if "train/loss" in r] == [1, 2, 3, 4, 5]


SCRIPTED = {
    "num_steps": 6, "eval_every": 1, "patience": 2, "checkpoint.every": 1,
    "best_metric": "eval/scripted/value", "eval_data": EVAL_DATA,
    "evals": {"scripted": {"name": "tiny.scripted"}},
}  # fmt: skip


@pytest.mark.parametrize("mode, sign", [("max", 1), ("min", -1)])
def test_patience_ends_a_run_and_the_best_checkpoint_is_kept(
    tmp_path, capsys, mode, sign
):
    tiny.SCRIPT[:] = [sign * x for x in (1.0, 3.0, 3.0, 2.0)]
    config = tiny.config(**SCRIPTED, best_mode=mode)
    state = loop.train(config, str(tmp_path))
    # Step 3 ties with the best, which is not better: two evaluations without progress.
    assert int(state.step) == 4
    assert saved_steps(tmp_path, "best") == [2]
    assert meta(tmp_path, 2, "best")["best"] == {
        "value": sign * 3.0,
        "step": 2,
        "stale": 0,
    }
    out = capsys.readouterr().out
    assert f"best eval/scripted/value {sign * 3} at step 2" in out
    assert "no better eval/scripted/value in 2 evaluations: stop" in out
    best = checkpoint.load_lm(tmp_path / "best").params
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        items = ocp.args.Composite(params=ocp.args.StandardRestore())
        assert same(best, manager.restore(2, args=items).params)

    # The same command: the run is over, patience does not start again.
    tiny.SCRIPT[:] = [sign * 9.0] * 6
    again = loop.train(config, str(tmp_path))
    assert int(again.step) == 4
    assert saved_steps(tmp_path, "best") == [2]


def test_a_run_that_was_stopped_between_best_and_latest_goes_on(tmp_path):
    """Killed after `best` was written: the resumed run comes to that step again."""
    config = tiny.config(**SCRIPTED | {"checkpoint.every": 3, "patience": 0})

    def die():
        raise KeyboardInterrupt

    tiny.SCRIPT[:] = [1.0, 2.0, 3.0, 4.0, die]
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, str(tmp_path))
    assert (saved_steps(tmp_path), saved_steps(tmp_path, "best")) == ([3], [4])
    tiny.SCRIPT[:] = [4.0, 5.0, 6.0]
    assert int(loop.train(config, str(tmp_path)).step) == 6
    assert saved_steps(tmp_path, "best") == [6]
    assert list(rows(tmp_path, "eval/scripted/value").values()) == [1, 2, 3, 4, 5, 6]


def test_num_steps_0_evaluates_only(tmp_path):
    config = tiny.config(num_steps=0, data={}, evals={"perplexity": {}}, eval_data=EVAL_DATA)  # fmt: skip
    state = loop.train(config, str(tmp_path))
    assert int(state.step) == 0
    assert saved_steps(tmp_path) == []
    assert [set(r) & {"eval/perplexity/nll", "train/loss"} for r in read(tmp_path)] == [
        {"eval/perplexity/nll"}
    ]


# -- what a run says


def test_a_run_shows_its_data_its_first_batch_and_its_progress(tmp_path, capsys):
    data = {
        "name": "jsonl",
        "kind": "sft",
        "split": "all",
        "path": str(tmp_path / "d.jsonl"),
    }
    lines = [
        json.dumps({"prompt": f"{i}?", "response": f"answer {i}"}) for i in range(4)
    ]
    lines[2:2] = ["{not json"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    config = tiny.config(data=data, num_steps=2, length=16, buckets=())
    try:
        loop.train(config, str(tmp_path / "run"))
    except ValueError as error:  # pragma: no cover
        pytest.fail(str(error))
    told = capsys.readouterr()
    assert "data: 5 read, 4 used, 0 cut, 0 dropped, 1 malformed" in told.out
    assert "d.jsonl:3" in told.out
    assert re.search(r"\d\?⟦answer \d<eos>⟧", told.out)
    assert re.search(r"run 1/2.*\n.*run 2/2  loss \d\.\d+  \S+ tok/s", told.err)


def test_tokens_per_second_is_never_more_than_was_done(tmp_path, monkeypatch):
    pause = 0.1
    monkeypatch.setenv(tiny.PAUSE, str(pause))
    config = tiny.config(
        "pairs", **{"loss.name": "tiny.slow_dpo", "checkpoint.every": 2}
    )
    loop.train(config, str(tmp_path))
    tokens = [int(b.lengths.sum()) for b, _ in batches(config, 6)]
    for step, rate in rows(tmp_path, "train/tokens_per_second").items():
        assert rate <= tokens[step - 1] / pause, f"step {step}"


def test_log_every_thins_the_lines_and_keeps_the_last(tmp_path):
    loop.train(tiny.config(log_every=4), str(tmp_path))
    told = list(rows(tmp_path, "train/loss"))
    assert 4 in told
    assert not {2, 3} & set(told)
    assert told[-1] == 6
