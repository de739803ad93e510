"""Prompts of mixed lengths: continuous batching beside batches of similar length.

  ALIGNAX_SMOLLM2=SmolLM2-135M-Instruct.Q4_1.gguf python tests/benchmarks/respond.py

Random prompts of 16 to 512 tokens, responses of 8 to 128 (a limit for each). `batches` is
what `respond` does for searches and drafts, and did for everything before: the prompts sorted
by length, in batches of `rows`. Both run in turns after a run that compiles; medians.
"""

import argparse
import json
import os
import statistics
import sys
import time

import jax
import numpy as np
from decode import SMOLLM2

from alignax.batch import LM
from alignax.models import load, transformer
from alignax.sampling import continuous, decode, generation_settings

KEY = jax.random.key(0)


def batches(lm, prompts, limits, rows):
    """Tokens and steps of batches of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    tokens = steps = 0
    for at in range(0, len(order), rows):
        places = np.array([*order[at : at + rows], *[order[at]] * rows][:rows])
        ids, lengths = generation_settings.ragged([prompts[i] for i in places])
        out = decode.generate(
            lm, ids, lengths, KEY, max_new=limits.max(), limits=limits[places],
            seeds=places,
        )  # fmt: skip
        tokens += int(np.asarray(out.batch.mask).sum())
        steps += int(out.stats["steps"])
    return tokens, steps


def rows_in_turn(lm, prompts, limits, rows):
    """The same of continuous batching."""
    tokens = steps = 0
    for places, out in continuous.generate(
        lm, prompts, KEY, rows=rows, max_new=limits.max(), longest=max(map(len, prompts)) + limits.max(),
        chunk=rows, own=lambda places: {"limits": limits[places]},
    ):  # fmt: skip
        tokens += int(out.batch.mask[: len(places)].sum())
        steps = int(out.stats["steps"])
    return tokens, steps


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--prompts", type=int, default=256)
    args.add_argument("--longest", type=int, default=512)
    args.add_argument("--new", type=int, default=128)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    args = args.parse_args()
    path = os.environ.get("ALIGNAX_SMOLLM2")
    if path:
        lm = load.load(path)
    else:
        config = transformer.ModelConfig(**SMOLLM2)
        lm = LM(config, transformer.init(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    sizes = rng.integers(16, args.longest + 1, args.prompts)
    prompts = [rng.integers(100, 40_000, n).tolist() for n in sizes]
    limits = rng.integers(8, args.new + 1, args.prompts)
    for rows in args.rows:
        times = {batches: [], rows_in_turn: []}
        counts = {}
        for _ in range(args.rounds + 1):
            for run, found in times.items():
                start = time.perf_counter()
                counts[run] = run(lm, prompts, limits, rows)
                found.append(time.perf_counter() - start)
        first = {run: found[0] for run, found in times.items()}
        median = {run: statistics.median(found[1:]) for run, found in times.items()}
        old, new = batches, rows_in_turn
        print(json.dumps({
            "benchmark": "respond", "rows": rows, "prompts": args.prompts,
            "tokens": counts[new][0], "same_tokens": counts[old][0] == counts[new][0],
            "batches_s": round(median[old], 1), "continuous_s": round(median[new], 1),
            "speedup": round(median[old] / median[new], 2),
            "first_runs_s": [round(first[old], 1), round(first[new], 1)],
            "steps": [counts[old][1], counts[new][1]], "jax": jax.__version__,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
