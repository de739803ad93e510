"""The console script `alignax`: a word, and the program behind it. It only dispatches.

alignax train --config configs/dpo.py --workdir runs/dpo
"""

import difflib
import os
import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A word of the command line."""

    module: str  # what `python -m` runs
    flags: tuple[str, ...]  # that it is given beside the user's
    help: str


COMMANDS = {
    "train": Command(
        "alignax.main",
        ("--task=train",),
        "train and evaluate a config; resumes in the same workdir",
    ),
    "generate": Command(
        "alignax.main",
        ("--task=generate",),
        "respond to a file of prompts (a config with `prompts`)",
    ),
    "show": Command(
        "alignax.main",
        ("--show",),
        "print the first rows of a config's data, with the scored tokens marked",
    ),
    "explain": Command(
        "alignax.main", ("--explain",), "print parameters, shapes, specs and bytes"
    ),
    "preflight": Command(
        "alignax.preflight", (), "does the step of a config fit chips that are not here"
    ),
    "export": Command(
        "alignax.export", (), "write a run or a model for transformers, PEFT and vLLM"
    ),
    "sweep": Command(
        "alignax.sweep", (), "runs of one config that differ in some keys, and a table"
    ),
    "lm_eval": Command(
        "alignax.harness", (), "evaluate a model by the tasks of lm-evaluation-harness"
    ),
    "plot": Command("alignax.plots", (), "draw the learning curves of a workdir"),
}


def usage() -> str:
    """One line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return (
        "usage: alignax COMMAND [FLAGS]\n\n" + "\n".join(lines) + "\n\n"
        "alignax COMMAND --help lists the flags of a command."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program of the first word with the flags that follow it."""
    name, *flags = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        print(f"alignax: unknown command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    command = COMMANDS[name]
    if not {"", os.getcwd()} & {*sys.path}:  # as `python -m` has it: configs, plug-ins
        sys.path.insert(0, os.getcwd())
    sys.argv = [f"alignax {name}", *command.flags, *flags]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
