"""The one loop: a state, a jitted step, and `train(config, workdir)`.

batch -> annotate (frozen LMs) -> score (policy) -> loss -> mean -> gradient -> update
"""

import functools
import itertools
import logging
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from alignax import masked
from alignax.batch import COMPARED, LM, Metrics, Scores
from alignax.inputs.annotate import annotate
from alignax.inputs.detokenize import describe
from alignax.models import sharding, transformer
from alignax.models.transformer import ModelConfig
from alignax.reports import curves
from alignax.reports.metrics import Writer, flops_per_token, mfu, read
from alignax.reports.progress import progress
from alignax.runs import checkpoint, hosts, watchdog, workdirs
from alignax.training import build, evaluation, parallel, stages
from alignax.training.step import TrainState, init_state, make_train_step

log = logging.getLogger(__name__)


class Preempted(RuntimeError):
    """SIGTERM came: the state is saved, and the same command goes on from there."""


class NonFiniteLoss(FloatingPointError):
    """The loss or the gradient is not a number; the message says where."""


def train(config, workdir: str) -> TrainState:
    """Runs a config: restores what is there, trains, evaluates, reports.

    A config with `stages` runs them in order, each in its own folder of `workdir`.

    Args:
      config: a ConfigDict from `configs/`.
      workdir: folder of the run; the same command on the same folder goes on.

    Returns:
      The last TrainState.

    Raises:
      ValueError: a config that cannot run; the message says which key and why.
      NonFiniteLoss: the loss is not a number.
      Preempted: SIGTERM came; the state is saved.
    """
    if config.get("stages"):
        return stages.run_stages(config, workdir, train)
    with watchdog.counted(workdir, config.watchdog.starts):
        run = build.build(config, workdir)
    hosts.meet("data and weights are read")
    ckpt = config.checkpoint
    make_manager = functools.partial(checkpoint.manager, asynchronous=ckpt.asynchronous)
    with (
        make_manager(f"{run.workdir}/checkpoints", keep=ckpt.keep) as latest,
        make_manager(f"{run.workdir}/best", keep=1) as best,
        preemption() as stop,
        watchdog.Watchdog(run.workdir, config.watchdog.minutes) as alive,
    ):
        state = init_state(
            run.policy.params,
            run.tx,
            run.mesh,
            ema=run.loss.ema,
            average=config.average > 0,
        )
        restored = checkpoint.restore(latest, state)
        record = {"value": None, "step": 0, "stale": 0}
        if restored:
            state, meta = restored
            if run.source is not None:
                run.source.restore(meta["data"])
            record = meta["best"]
            run.say(f"resumed at step {int(state.step)} of {config.num_steps}")
        start = int(state.step)
        alive(start)
        # the state holds the parameters now
        run = run._replace(policy=LM(run.policy.config, {}))
        writer = Writer(
            run.workdir, step=start, wandb=config.wandb, config=config.to_dict()
        )
        with writer:
            return _loop(
                config, run, state, record, latest, best, writer, stop, start, alive
            )


def _loop(config, run, state, record, latest, best, writer, stop, start, alive):
    model = run.policy.config
    step = make_train_step(
        model, run.tx, run.loss, run.mesh, **build.settings(config, run)
    )
    whole = run.assemble(state.params, run.lms)
    trained, every = map(transformer.num_params, (state.params, whole.params))
    flops = flops_per_token(trained, "train", frozen=every - trained)
    seen = set()
    clock, window = time.monotonic(), 0  # since the devices were last idle: s, tokens
    saved = (
        f"step {start} in {run.workdir}/checkpoints" if start else "no checkpoint yet"
    )

    def save(to, state):
        meta = {
            "data": run.source.state() if run.source else None, "best": record,
            "seed": config.seed, "config": workdirs.plain(config),
        }  # fmt: skip
        checkpoint.save(to, state, model=model, meta=meta)

    def evaluate(state, at):
        lm = run.assemble(state.params, run.lms)
        metrics = evaluation.evaluate(run, lm, frozen_lms(run, state), at, config)
        writer.samples(at, metrics.pop("samples", []))
        if metrics:
            writer.write(at, metrics)
        return metrics

    def judged(metrics, state, at):
        """Keeps the best checkpoint; True when patience is over."""
        if not config.best_metric or at == 0:
            return False
        if config.best_metric not in metrics:
            raise ValueError(
                f"best_metric {config.best_metric!r} is not among {sorted(metrics)}"
            )
        value, sign = (
            metrics[config.best_metric],
            1 if config.best_mode == "max" else -1,
        )
        if record["value"] is None or sign * (value - record["value"]) > 0:
            record.update(value=value, step=at, stale=0)
            save(best, state)
        else:
            record["stale"] += 1
        return bool(config.patience) and record["stale"] >= config.patience

    pending = None  # (step, metrics on device, ids, tokens): read one step later

    def settle():
        """Waits for the step before and checks its metrics."""
        nonlocal pending, window
        if pending is None:
            return {}
        at, metrics, ids, tokens = pending
        pending = None
        metrics = {f"train/{k}": float(v) for k, v in jax.device_get(metrics).items()}
        if not np.isfinite([metrics["train/loss"], metrics["train/grad_norm"]]).all():
            raise NonFiniteLoss(
                f"loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']} at "
                f"step {at}; batch {ids}; last good checkpoint: {saved}"
            )
        window += tokens
        seconds = time.monotonic() - clock
        real, computed = window  # what responses share counts in each of them, and once
        metrics["train/tokens_per_second"] = real / seconds
        utilisation = mfu(flops * computed, seconds, list(run.mesh.devices.flat))
        if utilisation is not None:
            metrics["train/mfu"] = utilisation
        metrics["train/lr"] = float(run.rate(at - 1))
        return metrics

    metrics = evaluate(state, 0) if start == 0 and config.eval_at_start else {}
    done_before = start == config.num_steps and evaluated(run.workdir, start)
    finished = bool(config.patience) and record["stale"] >= config.patience
    last = start if finished else config.num_steps
    profiling = False
    with progress(config.num_steps, start=start, name=run.name) as show:
        for at in range(start, last):
            rows = run.source.next(state.params, at, state.average)
            report = run.source.report()
            ids = report.get("ids", [])
            batch = sharding.put_batch(rows, run.mesh)
            if at == 0:
                run.say(describe(rows, run.tokenizer))
                checked = start_check(config, run, state, batch, writer)
            if config.profile and config.profile[0] <= at < config.profile[1]:
                if not profiling:
                    jax.profiler.start_trace(f"{run.workdir}/profile")
                profiling = True
            # Without jit (--debug) every constant is a transfer.
            settings: Any = jax.config  # its attributes are not known to every stub
            eager = settings.jax_disable_jit
            with jax.transfer_guard("allow" if eager else "disallow"):
                state, device_metrics = step(state, run.lms, batch)
            packed = rows.layout and rows.layout.tokens.shape
            shape = (rows.tokens.shape, packed)
            seen.add(shape)
            if step.compilations(state) > len(seen):
                raise RuntimeError(
                    f"step {at} compiled again for a known shape {shape}"
                )
            done = settle()
            if at == 0 and checked:
                close_to_start(device_metrics, model)
            tokens = np.full(2, rows.lengths[rows.valid].sum()) * jax.process_count()
            if rows.layout is not None:
                tokens[1] = (rows.layout.group > 0).sum() * jax.process_count()
            used, there = rows.lengths.sum(), rows.tokens.size
            if rows.layout is not None:
                used, there = (rows.layout.group > 0).sum(), rows.layout.group.size
            device_metrics["padding"] = 1 - used / there
            device_metrics |= report.get("metrics", {})
            pending = (at + 1, device_metrics, ids, tokens)
            now = at + 1
            ending = now == config.num_steps or stop(now)
            evaluating = (
                config.eval_every and now % config.eval_every == 0 and not ending
            )
            saving = config.checkpoint.every and now % config.checkpoint.every == 0
            rolled = any(
                "/rollout/" in key for key in done
            )  # only the step that rolled
            if done and (at % config.log_every == 0 or ending or rolled):
                writer.write(at, done)
            idle = ending or evaluating or saving or at == start
            if idle:  # nothing unchecked is ever saved
                done = settle()
                writer.write(now, done)
            show(now, done)
            alive(now)
            if profiling and (ending or now == config.profile[1]):
                jax.profiler.stop_trace()
                profiling = False
            if evaluating:
                metrics = evaluate(state, now)
                finished = judged(metrics, state, now)
            stopping = stop(now)  # it may also have come during the evaluation
            if stopping and pending:
                writer.write(now, settle())
            if ending or saving or finished or stopping:
                save(latest, state)
                saved = f"step {now} in {run.workdir}/checkpoints"
            if stopping and now < config.num_steps:
                latest.wait_until_finished()
                raise Preempted(
                    f"SIGTERM at step {now}: saved; the same command goes on"
                )
            if idle:
                clock, window = time.monotonic(), 0
            if finished:
                run.say(
                    f"no better {config.best_metric} in {config.patience} evaluations: stop"
                )
                break
    at = int(state.step)
    if not finished and not done_before:
        metrics = evaluate(state, at)
        judged(metrics, state, at)
        if config.best_metric and start < config.num_steps:
            save(latest, state)  # with what the last evaluation found
    latest.wait_until_finished()
    best.wait_until_finished()
    finish(config, run, metrics, record)
    return state


def finish(config, run: build.Run, metrics: Metrics, record) -> None:
    """Says where the best checkpoint is, and draws the curves."""
    if record["value"] is not None:
        run.say(
            f"best {config.best_metric} {record['value']:.4g} at step {record['step']}"
        )
    if jax.process_index() == 0 and config.plots and read(run.workdir):
        for path in curves.plot(run.workdir):
            run.say(f"drew {path}")


def evaluated(workdir: str, step: int) -> bool:
    """Whether the evaluations of `step` > 0 are in the metrics already."""
    rows = [row for row in read(workdir) if row["step"] == step] if step else []
    return any(key.startswith("eval/") for row in rows for key in row)


def frozen_lms(run, state) -> dict[str, LM]:
    """The frozen LMs, with the policy's average where one of them means it."""
    if not run.moving:
        return run.lms
    return run.lms | dict.fromkeys(run.moving, run.assemble(state.average, run.lms))


def start_check(config, run, state, batch, writer) -> bool:
    """What must hold before step 0: a cache is the reference's, and it the policy.

    The latter where the reference is the initial policy, and exactly.

    Returns:
      Whether policy and reference are the same.

    Raises:
      RuntimeError: a cached log-prob is not the reference's, or a log-ratio differs
        from 0; nothing trained from here would mean what its config says.
    """
    # With reference_data the two read different prompts.
    if "ref_logps" not in run.loss.needs or config.reference_data:
        return False
    lms, needs = frozen_lms(run, state), run.loss.needs
    read = tuple(n for n in needs if n in Scores._fields and n != "logps")
    score = parallel.compiled_score(run.mesh, ())
    cached = batch.ref_logps
    if cached is None and config.lms.get("ref") != "init":
        return False
    batch = annotate(batch._replace(ref_logps=None), lms, needs=needs, score=score)
    if cached is not None:
        largest = float(jnp.abs(cached - batch.ref_logps).max())
        where = "reference_cache" if config.reference_cache else ""
        check_cache(largest, run.policy.config, where)
    if config.lms.get("ref") != "init":
        return False
    score = parallel.compiled_score(run.mesh, read)
    ours = run.assemble(state.params, run.lms)
    compared = {"kl_to": lms["ref"]} if {*read} & {*COMPARED} else {}
    policy: Scores = score(ours, batch, **compared)
    largest = float(jnp.abs(policy.logps - batch.ref_logps).max())
    given = {"ema": state.ema} if run.loss.ema else {}
    value = float(
        masked.mean(run.loss(policy, batch, **given)[0], masked.prompts(batch))
    )
    writer.write(0, {"start/loss": value, "start/log_ratio": largest})
    run.say(
        f"step 0: policy = reference: largest log-ratio {largest:g}, loss {value:.7f}"
    )
    if largest != 0:
        raise RuntimeError(
            f"policy and reference differ by {largest:g} nats on one token before the first step"
        )
    return True


def check_cache(largest: float, model: ModelConfig, where: str) -> None:
    """Raises RuntimeError if log-probs that a batch brings are not the reference's.

    They come from a file (`where`) or from the source itself. A row may have stood in a
    batch of another shape: rounding may differ.
    """
    bound = 1e-3 if model.dtype == "float32" else 0.5  # nats per token
    if largest > bound:
        found = f"{largest:g} nats off on one token, beyond {bound}"
        if where:
            raise RuntimeError(f"{where} is {found}: delete it")
        raise RuntimeError(
            f"what the source says of the reference is {found}: this is a bug of the source"
        )


def close_to_start(metrics: Metrics, model: ModelConfig) -> None:
    """The training program itself must agree with step 0 within its dtype.

    Raises:
      RuntimeError: a mean log-ratio of the first step is beyond the bound.
    """
    bound = (
        1e-2 if model.dtype == "float32" else 1.0
    )  # nats per response, summed over T
    for name in ("log_ratio_chosen", "log_ratio_rejected"):
        if name in metrics and abs(float(metrics[name])) > bound:
            raise RuntimeError(
                f"first step: {name} is {float(metrics[name]):g} nats, beyond {bound} for "
                f"{model.dtype}, though policy and reference are the same"
            )


class preemption:
    """Context in which SIGTERM only raises a flag; calling it tells whether it came.

    Among several processes it is enough that one of them gets the signal: jax agrees on a
    step at which all are told, with no wait at any other. Orbax asks jax the same, by
    step, when it saves; so the numbers handed in here are steps too.
    """

    def __enter__(self):
        self._flag = threading.Event()
        self._calls = itertools.count(1)
        self._old: Any = None
        self._alone = jax.process_count() == 1  # else jax listens to the signal
        if self._alone and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())
        return self

    def __call__(self, step: int | None = None) -> bool:
        """Whether to stop at `step`, or at this call where nothing has steps."""
        if self._alone:
            return self._flag.is_set()
        at = next(self._calls) if step is None else step
        return multihost_utils.reached_preemption_sync_point(at)

    def __exit__(self, *_):
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
