"""The training loop: `train(config, workdir)` restores what is there, trains, evaluates.

batch -> annotate (frozen LMs) -> score (policy) -> loss -> mean -> gradient -> update

The devices are kept busy: the metrics of a step are read after the next one was
dispatched. Nothing is saved before the metrics of its step were checked.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp

from alignax.batch import LM, Batch, Metrics
from alignax.inputs.detokenize import describe
from alignax.models import fallback, sharding, transformer
from alignax.reports import curves
from alignax.reports.metrics import Writer, flops_per_token, mfu, read
from alignax.reports.progress import progress
from alignax.runs import checkpoint, hosts, lease, watchdog, workdirs
from alignax.runs.preemption import Interrupted, Preempted, preemption
from alignax.sampling.response_state import DRAWS
from alignax.training import build, checks, evaluation, stages
from alignax.training.plugins import has_rollouts
from alignax.training.start_check import close_to_start, start_check
from alignax.training.step import TrainState, TrainStep, init_state, make_train_step

log = logging.getLogger(__name__)


class NonFiniteLoss(FloatingPointError):
    """The loss or the gradient is not a number; the message says where."""


class Session(NamedTuple):
    """What the loop works with; none of it changes."""

    config: Any
    run: build.Run
    step: TrainStep
    latest: ocp.CheckpointManager
    best: ocp.CheckpointManager
    writer: Writer
    owner: lease.Lease
    stop: preemption
    alive: Callable[[int], None]  # the watchdog
    start: int  # step at which this process began
    over: bool  # the run had ended, with its last evaluation
    frozen: dict[str, str]  # fingerprints of the frozen LMs
    flops: float  # per token, forward and backward


class Best(NamedTuple):
    """The best value of config.best_metric so far; saved with every checkpoint.

    WORKDIR/best holds the checkpoint of that step, with this record of its own.
    """

    value: float | None = None
    step: int = 0
    stale: int = 0  # evaluations since then


class Pending(NamedTuple):
    """A step that was dispatched and whose metrics were not read yet."""

    step: int
    metrics: Metrics  # on the devices
    ids: list[str]  # of the batch
    tokens: np.ndarray  # [2] real tokens; those that were computed, shared ones once


class LoopState(NamedTuple):
    """What the loop changes."""

    state: TrainState
    best: Best
    saved: str  # where the last good checkpoint is, for messages
    pending: Pending | None = None
    since: float = 0.0  # seconds: when the devices were last idle
    tokens: Any = 0  # [2] of the steps read since then
    shapes: frozenset = frozenset()  # of batches that were compiled for
    profiling: bool = False
    finished: bool = False  # the best metric did not improve for config.patience
    saved_at: float = 0.0  # seconds: when the last checkpoint was begun, or the loop


class Due(NamedTuple):
    """What follows a step."""

    ending: bool
    evaluating: bool
    saving: bool
    idle: bool  # the metrics of this step are read before the next is dispatched


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
      OSError: the workdir cannot be written, or another process writes there.
      NonFiniteLoss: the loss is not a number.
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    if config.get("stages"):
        return stages.run_stages(config, workdir, train)
    with lease.Lease(workdir) as owner:
        return restore_and_run(config, workdir, owner)


def restore_and_run(config, workdir: str, owner: lease.Lease) -> TrainState:
    """Builds a run in a workdir that this process owns, and runs the steps that are left."""
    with watchdog.counted(workdir, config.watchdog.starts):
        run = build.build(config, workdir)
    config = run.config

    def leave() -> None:  # from another thread, after a signal
        watchdog.forget(workdir)
        owner.give_back()

    hosts.meet("data and weights are read")
    owner.settle()
    ckpt = config.checkpoint
    make_manager = functools.partial(checkpoint.manager, asynchronous=ckpt.asynchronous)
    with (
        make_manager(f"{run.workdir}/checkpoints", keep=ckpt.keep) as latest,
        make_manager(f"{run.workdir}/best", keep=1) as best,
        preemption(drops=True, leave=leave) as stop,
        watchdog.Watchdog(run.workdir, config.watchdog.minutes) as alive,
    ):
        frozen = {k: checkpoint.fingerprint(lm.params) for k, lm in run.lms.items()}
        state, record, lines = restored(config, run, latest, best, frozen)
        start = int(state.step)
        ended = is_over(run.workdir, start, lines)
        over = ended and start >= config.num_steps
        alive(start)
        # the state holds the parameters now
        run = run._replace(policy=LM(run.policy.config, {}))
        with Writer(
            run.workdir, step=start, lines=None if ended else lines,
            tracked_by=config.trackers, config=config.to_dict(),
        ) as writer:  # fmt: skip
            step = make_train_step(
                run.policy.config, run.tx, run.loss, run.mesh,
                grammar=run.grammar and run.grammar.flag, **build.settings(config, run, run.loss),
            )  # fmt: skip
            whole = run.assemble(state.params, run.lms)
            trained, every = map(transformer.num_params, (state.params, whole.params))
            flops = flops_per_token(trained, "train", frozen=every - trained)
            session = Session(
                config, run, step, latest, best, writer, owner, stop, alive, start, over,
                frozen, flops,
            )  # fmt: skip
            try:
                return loop(session, state, record)
            except (
                Interrupted
            ) as event:  # in an evaluation: what is due is saved already
                checkpoint.wait(latest)
                raise Preempted(
                    f"{event} in an evaluation: the same command goes on"
                ) from None


def restored(
    config, run: build.Run, latest, best, frozen: dict[str, str]
) -> tuple[TrainState, Best, dict[str, int] | None]:
    """The state to begin with: the last checkpoint's, else that of step 0.

    Returns:
      The state, the best evaluation up to its step, and how many lines the files of the
      writer had when it was saved; None if that is not known.

    Raises:
      ValueError: a frozen LM has other weights than when the state was saved.
    """
    state = init_state(
        run.policy.params, run.tx, run.mesh, ema=run.loss.ema,
        average=checks.keeps_average(config), donate=build.is_own(run),
    )  # fmt: skip
    found = checkpoint.restore(latest, state)
    if not found:
        return state, Best(), None
    state, meta = found
    for name, known in meta.get("lms", {}).items():
        if frozen.get(name, known) != known:
            raise ValueError(
                f"lms.{name} has other weights than in the steps before (checksum "
                f"{frozen[name]}, it was {known}): put those back at "
                f"{config.lms.get(name, config.model.path)!r}, or take another workdir"
            )
    if run.source is not None:
        run.source.restore(meta["data"])
    if has_rollouts(config) and meta.get("draws", 1) != DRAWS:
        log.warning(
            "the version of alignax that began this run drew tokens from other random "
            "numbers: its next rollouts are other samples than they would have been there"
        )
    for key in workdirs.rounded(meta.get("config", {}), config):
        log.warning(
            "this run goes on with another %s, which rounds differently: it will not end "
            "bit-identical to one that was not stopped", key,
        )  # fmt: skip
    checkpoint.prune(latest, config.checkpoint.keep)
    checkpoint.prune(best, 1)
    at = int(state.step)
    run.say(f"resumed at step {at} of {config.num_steps}")
    # The best one of the last evaluation is newer than the last checkpoint. What is
    # beyond the restored step is evaluated again.
    known = [meta, *checkpoint.records(best)]
    noted = [Best(**m["best"]) for m in known]
    newest = max((b for b in noted if b.step <= at), key=lambda b: b.step)
    return state, newest, meta.get("lines")


def is_over(workdir: str, start: int, lines: dict[str, int] | None) -> bool:
    """Whether a run ended at the restored step: its last evaluation too has its line.

    Args:
      workdir: of the run.
      start: the restored step.
      lines: from `restored`; None for a run of an earlier version, which marked no end.
    """
    if start == 0:
        return False
    over = lines is None and evaluated(workdir, start)
    over = over or workdirs.ended_at(workdir) == start
    return hosts.exchange(over)[0]  # process 0 may change these files already


def loop(session: Session, state: TrainState, best: Best) -> TrainState:
    """All steps that are left, and what is due after each."""
    config, run, start = session.config, session.run, session.start
    there = f"step {start} in {run.workdir}/checkpoints"
    now = LoopState(state, best, there if start else "no checkpoint yet")
    if start == 0 and config.eval_at_start:
        evaluate(session, now, 0)
    if lacks_evaluation(session):
        now = judge(session, now, evaluate(session, now, start))
    stale = bool(config.patience) and now.best.stale >= config.patience
    begun = time.monotonic()
    now = now._replace(since=begun, saved_at=begun, finished=stale)
    last = start if now.finished else config.num_steps
    with progress(config.num_steps, start=start, name=run.name) as show:
        for at in range(start + 1, last + 1):
            before = now.pending
            try:
                now = dispatch(session, now, at)
            except Interrupted:  # in a rollout, which is dropped
                save_and_stop(session, now, at - 1)
            now, metrics = settle(session, now, before)
            due = schedule(session, now, at)
            # the metrics of a rollout are written at whatever step made it
            rolled = any("/rollout/" in key for key in metrics)
            often = (at - 1) % config.log_every == 0
            if metrics and (often or due.ending or rolled):
                session.writer.write(at - 1, metrics)
            if due.idle:  # nothing unchecked is ever saved
                now, metrics = settle(session, now, now.pending)
                session.writer.write(at, metrics)
            show(at, metrics)
            session.alive(at)
            session.owner.check(read=False)
            now = follow(session, now, at, due)
            if now.finished:
                break
    if not now.finished and not session.over:
        now = judge(session, now, evaluate(session, now, int(now.state.step)))
    checkpoint.wait(session.latest)
    checkpoint.wait(session.best)
    session.owner.check()
    session.writer.flush()
    workdirs.mark_end(run.workdir, int(now.state.step))
    finish(config, run, now.best)
    return now.state


def dispatch(session: Session, now: LoopState, at: int) -> LoopState:
    """Draws the batch of step `at` and starts the step; its metrics are pending."""
    config, run, step = session.config, session.run, session.step
    assert run.source is not None
    rows = run.source.next(now.state.params, at - 1, now.state.average)
    report = run.source.report()
    batch = sharding.put_batch(rows, run.mesh)
    checked = False
    if at == 1:
        run.say(describe(rows, run.tokenizer))
        checked = start_check(config, run, now.state, batch, session.writer)
    profiling = now.profiling
    if config.profile and config.profile[0] < at <= config.profile[1] and not profiling:
        jax.profiler.start_trace(f"{run.workdir}/profile")
        profiling = True
    # Without jit (--debug) every constant is a transfer.
    settings: Any = jax.config  # its attributes are not known to every stub
    eager = settings.jax_disable_jit
    with jax.transfer_guard("allow" if eager else "disallow"):
        state, metrics = step(now.state, run.lms, batch)
    session.stop.unsaved = True
    shape = (rows.tokens.shape, rows.layout and rows.layout.tokens.shape)
    shapes = now.shapes | {shape}
    if step.compilations(state) > len(shapes):
        raise RuntimeError(f"step {at - 1} compiled again for a known shape {shape}")
    if checked:
        close_to_start(metrics, run.policy.config)
    tokens, padding = usage(rows)
    metrics |= {"padding": padding} | report.get("metrics", {})
    session.writer.samples(at, report.get("samples", []))
    pending = Pending(at, metrics, report.get("ids", []), tokens)
    return now._replace(
        state=state, pending=pending, shapes=shapes, profiling=profiling
    )


def usage(rows: Batch) -> tuple[np.ndarray, Any]:
    """([2] tokens over all hosts: real ones, and those computed; share of padding)."""
    real = used = rows.lengths[rows.valid].sum()
    share = rows.lengths.sum() / rows.tokens.size
    if rows.layout is not None:
        used = (rows.layout.group > 0).sum()
        share = used / rows.layout.group.size
    return np.array([real, used]) * jax.process_count(), 1 - share


def settle(
    session: Session, now: LoopState, pending: Pending | None
) -> tuple[LoopState, Metrics]:
    """Waits for a step and checks its metrics.

    Raises:
      NonFiniteLoss: the loss or the gradient norm is not finite.
    """
    if pending is None:
        return now, {}
    if pending is now.pending:
        now = now._replace(pending=None)
    on_host = jax.device_get(pending.metrics)
    metrics = {f"train/{k}": float(v) for k, v in on_host.items()}
    if not np.isfinite([metrics["train/loss"], metrics["train/grad_norm"]]).all():
        raise NonFiniteLoss(
            f"loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']} at "
            f"step {pending.step}; batch {pending.ids}; last good checkpoint: {now.saved}"
        )
    now = now._replace(tokens=now.tokens + pending.tokens)
    seconds = time.monotonic() - now.since
    real, computed = now.tokens
    metrics["train/tokens_per_second"] = real / seconds
    devices = list(session.run.mesh.devices.flat)
    utilisation = mfu(session.flops * computed, seconds, devices)
    if utilisation is not None:
        metrics["train/mfu"] = utilisation
    metrics["train/lr"] = float(session.run.rate(pending.step - 1))
    rollout = session.config.rollout
    if not (rollout.policy or rollout.anchor or rollout.source not in ("", "policy")):
        warn_of_rounding(metrics)
    return now, metrics


def warn_of_rounding(metrics: Metrics) -> None:
    """Says once that rounding moves ratios of fresh responses far into the clip range.

    The step that has the metrics of a rollout is the first one on it: its parameters are
    those that drew the responses.
    """
    first = any("/rollout/" in key for key in metrics)
    found = [v for k, v in metrics.items() if k.endswith("range_used_max")]
    if first and max(found, default=0.0) > 0.5:
        fallback.say_once(
            "on the first step of a rollout the importance ratios are 1 but for rounding, "
            "which takes more than half of the clip range (train/range_used_max, in such "
            "ranges): responses lose their gradient to it. Take a wider range, "
            "model.dtype='float32', or rollout.batches=1 and rollout.epochs=1, where no "
            "ratio is computed"
        )


def schedule(session: Session, now: LoopState, at: int) -> Due:
    """What is due after step `at`; several processes agree on whether to stop."""
    config = session.config
    ending = at == config.num_steps or session.stop(at)
    evaluating = bool(config.eval_every and at % config.eval_every == 0 and not ending)
    saving = bool(config.checkpoint.every and at % config.checkpoint.every == 0)
    saving = saving or is_old(session, now.saved_at, at)
    first = at == session.start + 1
    return Due(ending, evaluating, saving, ending or evaluating or saving or first)


def is_old(session: Session, saved_at: float, at: int) -> bool:
    """Whether the last checkpoint is older than config.checkpoint.minutes.

    Process 0 decides it. Several processes ask it at every tenth step, since they have to
    wait for its answer.
    """
    minutes = session.config.checkpoint.minutes
    if not minutes or (jax.process_count() > 1 and at % 10):
        return False
    return hosts.exchange(time.monotonic() - saved_at >= 60 * minutes)[0]


def follow(session: Session, now: LoopState, at: int, due: Due) -> LoopState:
    """Evaluates and saves after step `at`, where that is due.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    config, run = session.config, session.run
    if now.profiling and (due.ending or at == config.profile[1]):
        jax.profiler.stop_trace()
        now = now._replace(profiling=False)
    if due.evaluating:
        with contextlib.suppress(Interrupted):  # it is made when the run goes on
            now = judge(session, now, evaluate(session, now, at))
    stopping = session.stop(at)  # it may also have come during the evaluation
    if stopping and at < config.num_steps:
        save_and_stop(session, now, at)
    if due.ending or due.saving or now.finished:
        save(session, session.latest, now)
        there = f"step {at} in {run.workdir}/checkpoints"
        now = now._replace(saved=there, saved_at=time.monotonic())
    if due.idle:
        now = now._replace(since=time.monotonic(), tokens=0)
    if now.finished:
        run.say(
            f"no better {config.best_metric} in {config.patience} evaluations: stop"
        )
    return now


def save_and_stop(session: Session, now: LoopState, at: int) -> NoReturn:
    """Saves the state after step `at`, which may be 0, and ends the run.

    Raises:
      Preempted: always.
    """
    if now.pending:
        now, metrics = settle(session, now, now.pending)
        session.writer.write(at, metrics)
    if at:
        save(session, session.latest, now)
        checkpoint.wait(session.latest)
    done = "saved" if at else "nothing to save"
    raise Preempted(
        f"{session.stop.name} at step {at}: {done}; the same command goes on"
    )


def evaluate(session: Session, now: LoopState, at: int) -> Metrics:
    """Runs the evaluations of the config and writes what they find."""
    run, state = session.run, now.state
    lm = run.assemble(state.params, run.lms)
    lms = run.frozen(state.average)
    metrics = evaluation.evaluate(run, lm, lms, at, session.config)
    session.writer.samples(at, metrics.pop("samples", []))
    if metrics:
        session.writer.write(at, metrics)
    return metrics


def judge(session: Session, now: LoopState, metrics: Metrics) -> LoopState:
    """Keeps the best checkpoint by config.best_metric; finished when patience is over.

    Raises:
      ValueError: the evaluations do not have that metric.
    """
    config, at = session.config, int(now.state.step)
    name = config.best_metric
    if not name or at == 0:
        return now
    if name not in metrics:
        raise ValueError(f"best_metric {name!r} is not among {sorted(metrics)}")
    best = now.best
    if better(metrics[name], best, config.best_mode):
        best = Best(metrics[name], at, 0)
    if best.step == at:  # it may be known from before a kill
        now = now._replace(best=best)
        save(session, session.best, now)
    else:
        now = now._replace(best=best._replace(stale=best.stale + 1))
    patience = config.patience
    return now._replace(finished=bool(patience) and now.best.stale >= patience)


def better(value: float, best: Best, mode: str) -> bool:
    """Whether a value is better than the best so far; not-a-number never is."""
    if np.isnan(value) or best.value is None or np.isnan(best.value):
        return not np.isnan(value)
    return value > best.value if mode == "max" else value < best.value


def save(session: Session, to: ocp.CheckpointManager, now: LoopState) -> None:
    """Writes a checkpoint: the state, the position in the data, the best metric."""
    run, config = session.run, session.config
    session.owner.check()
    session.writer.flush()
    if to is session.latest:  # which names a best one, that must be there
        checkpoint.wait(session.best)
    meta = {
        "lines": dict(session.writer.lines), "lms": session.frozen,
        "data": run.source.state() if run.source else None, "best": now.best._asdict(),
        "seed": config.seed, "config": workdirs.plain(config), "draws": DRAWS,
    }  # fmt: skip
    checkpoint.save(to, now.state, model=run.policy.config, meta=meta)


def finish(config, run: build.Run, best: Best) -> None:
    """Says where the best checkpoint is, and draws the curves."""
    if best.value is not None:
        run.say(f"best {config.best_metric} {best.value:.4g} at step {best.step}")
    if jax.process_index() == 0 and config.plots and read(run.workdir):
        for path in curves.plot(run.workdir):
            run.say(f"drew {path}")


def lacks_evaluation(session: Session) -> bool:
    """Whether SIGTERM kept the restored step from an evaluation that was due."""
    every, start = session.config.eval_every, session.start
    if not every or not 0 < start < session.config.num_steps or start % every:
        return False
    return hosts.exchange(not evaluated(session.run.workdir, start))[0]


def evaluated(workdir: str, step: int) -> bool:
    """Whether the evaluations of a step are in the metrics already."""
    if not (checkpoint.absolute(workdir) / "metrics.jsonl").exists():
        return False
    rows = [row for row in read(workdir) if row["step"] == step]
    return any(key.startswith("eval/") for row in rows for key in row)
