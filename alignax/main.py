"""Runs a config: trains, evaluates, or generates responses to a file of prompts.

  python -m alignax.main --config configs/dpo.py --workdir runs/dpo --config.loss.beta=0.05
  python -m alignax.main --config configs/generate.py --workdir runs/generate
    --config.prompts.path=prompts.txt

Without num_steps and num_epochs it only evaluates; with a config that has `prompts` it
responds to them. A run that is stopped by SIGTERM or Ctrl-C exits with 75 (EX_TEMPFAIL): the
same command resumes it.
"""

import logging
import os
import signal
import sys
import traceback

import jax
from absl import app, flags
from absl import logging as absl_logging

from alignax.training import config_flag

CONFIG = config_flag.define(
    "Path of a config, e.g. configs/dpo.py or configs/dpo.py:smoke"
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, samples."
)
DEBUG = flags.DEFINE_bool(
    "debug", False, "Check for nan after every operation, without jit."
)
EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Print parameters, shapes, specs and bytes, and exit."
)
SHOW = flags.DEFINE_bool(
    "show", False, "Print the first rows of the data as the model gets them, and exit."
)
ROWS = flags.DEFINE_integer("rows", 3, "Rows per data section that --show prints.")
REASONS = flags.DEFINE_string(
    "reasons",
    None,
    "With --show: read all rows, count them, and write to this file what "
    "was cut, left out or is remarkable.",
)
TASK = flags.DEFINE_enum(
    "task", None, ["train", "generate"], "Refuse a config that does something else."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Call jax.distributed.initialize (the launchers set this)."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("alignax").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs every save at INFO
    if DEBUG.value:
        jax.config.update("jax_debug_nans", True)
        jax.config.update("jax_disable_jit", True)
    from alignax.respond import respond  # after the backend is set up
    from alignax.runs import checkpoint, hosts  # after the backend is set up
    from alignax.runs import preemption as signals
    from alignax.runs.preemption import Preempted, preemption
    from alignax.training import explain, loop, show  # after the backend is set up

    signals.of_program = True
    checkpoint.quiet_threads()
    looking = EXPLAIN.value or SHOW.value
    if not WORKDIR.value and not looking:
        raise app.UsageError("--workdir is needed")
    try:
        if DISTRIBUTED.value:
            hosts.start()
        if DISTRIBUTED.value and not looking:
            hosts.check(CONFIG.value, str(WORKDIR.value))
        if EXPLAIN.value:
            print(explain.explain(CONFIG.value))
            return
        if SHOW.value:
            print(show.show(CONFIG.value, ROWS.value, REASONS.value))
            return
        responds = bool(CONFIG.value.get("prompts"))
        if TASK.value and responds != (TASK.value == "generate"):
            raise ValueError(
                "this config responds to prompts: alignax generate"
                if responds
                else "this config has no `prompts` to respond to: alignax train"
            )
        if not responds:
            loop.train(CONFIG.value, str(WORKDIR.value))
            return
        with preemption() as stop:
            if not respond.respond(CONFIG.value, str(WORKDIR.value), stop):
                raise Preempted(f"{stop.name}: the same command resumes the run")
    except Preempted as event:
        print(event, file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print(
            "error: interrupted; the same command goes on from what was saved",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    except SystemExit as event:  # of a module or a function that the config names
        traceback.print_exc()
        print(f"error: code of this run called sys.exit({event})", file=sys.stderr)
        hosts.leave(1)
    except Exception as error:
        expected = (ValueError, OSError, checkpoint.CheckpointError, FloatingPointError)
        if DEBUG.value or not isinstance(error, expected):
            traceback.print_exc()
        else:
            print(f"error: {error}\n(--debug shows the traceback)", file=sys.stderr)
        hosts.leave(1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=config_flag.read_flags)
