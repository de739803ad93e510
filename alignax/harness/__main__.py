"""The command `alignax lm_eval`: lm-evaluation-harness with models of alignax.

  alignax lm_eval --model_args path=runs/mine,batch_size=16 --tasks gsm8k

All flags are the harness's own. `--model alignax` is the default here; the keys of
`--model_args` are the arguments of `adapter.Adapter`.
"""

import sys
from collections.abc import Sequence

from alignax.harness import adapter

SUBCOMMANDS = ("ls", "validate")  # that take no model
GIVEN = ("--model", "-M", "--config", "-C", "--help", "-h")


def with_model(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--model alignax`, unless they name a model or a config."""
    named = any(word.partition("=")[0] in GIVEN for word in arguments)
    if named or not arguments or arguments[0] in SUBCOMMANDS:
        return [*arguments]
    run = [] if arguments[0] == "run" else ["run"]
    return [*run, *arguments, "--model", adapter.NAME]


def main(arguments: Sequence[str]) -> None:
    """The command: see the module."""
    try:
        adapter.register()
    except ImportError as error:
        raise SystemExit(f"error: {error}") from error
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["alignax lm_eval", *with_model(arguments)]
    cli_evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
