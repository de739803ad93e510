"""The command `python -m alignax.preflight`: does a step fit chips that are not at hand.

  python -m alignax.preflight --config configs/dpo_llama3_8b.py --topology v5e:8x8

See `preflight.py`. Exits with 1 if the step does not fit, with 2 at an error.
"""

import math
import os
import sys
from typing import NoReturn

import jax

from alignax.preflight import chips
from alignax.preflight.lowering import Shape
from alignax.preflight.preflight import preflight


def main(argv: list[str]) -> None:
    """Runs the command; for a config that cannot be compiled, prints one line on stderr."""
    from absl import flags

    if len(argv) > 1:
        _fail(f"unexpected arguments {argv[1:]}")
    given = flags.FLAGS
    try:
        topology = chips.parse(given.topology)
        if not topology.is_tpu:
            jax.config.update("jax_num_cpu_devices", math.prod(topology.shape))
        try:
            rows, length = map(int, given.packed or (0, 0))
        except ValueError:
            text = ",".join(given.packed)
            raise ValueError(f"--packed={text}: expected rows,tokens") from None
        packed = (rows, length) if rows else None
        fits = preflight(
            given.config, given.topology, Shape(given.group, given.tokens, packed),
            sweep=given.sweep, tries=given.tries,
        )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))
    sys.exit(fits)


def _fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    from absl import app, flags

    from alignax.training import config_flag

    config_flag.define("Path of a config, e.g. configs/dpo_llama3_8b.py")
    flags.DEFINE_string(
        "topology", None, "Chips: v5e:8x8, v5p:4x4x4, v6e:4x4, v4:2x2x2, h100:8, ..."
    )
    flags.DEFINE_bool("sweep", False, "Try every mesh, and print a table.")
    flags.DEFINE_integer("group", 0, "Responses per prompt; 0: as in the config.")
    flags.DEFINE_integer(
        "tokens", 0, "Mean number of distinct tokens per prompt; 0: the maximum."
    )
    flags.DEFINE_list(
        "packed", [], "Rows and tokens of packed rows, if they are known from a run."
    )
    flags.DEFINE_integer(
        "tries", 2, "Remedies that are compiled; the others are estimated."
    )
    for name in ("config", "topology"):
        flags.mark_flag_as_required(name)
    os.environ["JAX_PLATFORMS"] = "cpu"  # chips of this machine are not used
    jax.config.update("jax_platforms", "cpu")
    # what was compiled for a described slice cannot be read back
    jax.config.update("jax_enable_compilation_cache", False)
    app.run(main, flags_parser=config_flag.read_flags)
