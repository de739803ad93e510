"""Seconds until the smoke DPO makes its first step: imports, data and weights, compilation.

  python tests/benchmarks/startup.py [--rounds 3] [--config configs/dpo.py:smoke]

Every round is two processes: one with an empty compilation cache (cold), one with what the
first left there (warm). 'import' is until alignax.training.loop is imported, 'build' reads data and
weights and binds the config, 'first step' is until the metrics of step 1 are there
(everything up to them is compiled), 'later step' is from the metrics of step 2 to those of
step 3: a step's own time, since training shows the metrics of a step when the next one is
on its way. One Markdown table of medians.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

PARTS = ("import", "build", "first step", "later step")
CHILD = """
import time
start = time.perf_counter()
import importlib, json, sys
from alignax.training import build, loop
marks = [time.perf_counter()]
built = build.build
def noted(*args):
    out = built(*args)
    marks.append(time.perf_counter())
    return out
loop.build.build = noted
class Shown:
    def __init__(self, *args, **kwargs): pass
    def __enter__(self): return lambda step, metrics: marks.append(time.perf_counter())
    def __exit__(self, *_): pass
loop.progress = Shown
path, _, arg = sys.argv[1].partition(":")
config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config(arg)
config.num_steps, config.evals, config.plots = 5, {}, False
loop.train(config, sys.argv[2])
imported, built, first, _, third, fourth, *_ = marks  # when a step was shown
print("\\n" + json.dumps([imported - start, built - imported, first - built, fourth - third]))
"""


def child(config, cache):
    """Seconds of the parts, in a process of its own."""
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
    with tempfile.TemporaryDirectory() as workdir:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, config, workdir], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
            cwd=env["PYTHONPATH"],
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--config", default="configs/dpo.py:smoke")
    args = args.parse_args()
    taken = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in taken:
                taken[kind].append(child(args.config, cache))
    print(f"{args.config}, medians of {args.rounds}, seconds\n")
    print("| cache | " + " | ".join(PARTS) + " |\n" + "|---" * 5 + "|")
    for kind, rounds in taken.items():
        medians = [statistics.median(x) for x in zip(*rounds, strict=True)]
        print(f"| {kind} | " + " | ".join(f"{x:.2f}" for x in medians) + " |")


if __name__ == "__main__":
    sys.exit(main())
