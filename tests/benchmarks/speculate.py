"""Tokens per call of the target, and wall time beside token by token.

  ALIGNAX_SMOLLM2=SmolLM2-135M-Instruct.Q4_1.gguf python tests/benchmarks/speculate.py

Real prompts (those of tests/golden), one JSON line for each draft, guide, temperature and
batch size. `speedup` is the time of `decode.generate` with the same settings over that of
`speculate`, run in turns; medians. The guide is contrastive decoding against the first 20
layers of the model, which is also one of the drafts: each of its rounds reads 7/3 models.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

from alignax.decoders import contrastive
from alignax.models import load
from alignax.sampling import decode, drafts
from alignax.sampling.speculate import speculate

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "smollm2_hh.npz"


def seconds(function):
    start = time.perf_counter()
    out = function()
    np.asarray(out.batch.tokens)
    return time.perf_counter() - start, out


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--new", type=int, default=64)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    args.add_argument("--guides", nargs="+", default=["none", "contrastive"])
    args = args.parse_args()
    path = os.environ.get("ALIGNAX_SMOLLM2")
    if not path:
        print("set ALIGNAX_SMOLLM2: how much of a draft stays depends on the model")
        return
    lm = load.load(path)
    golden = np.load(GOLDEN)
    amateur = drafts.some_layers(lm, range(20))
    most = [i for i in range(lm.config.num_layers) if i not in (25, 26)]
    proposers = {
        "ngram": drafts.ngram(lm.config.vocab_size),
        "first 20 layers": amateur,
        "28 of 30 layers": drafts.some_layers(lm, most),
    }
    guides = {"none": None, "contrastive": contrastive.guide({"amateur": amateur})}
    for batch in args.batches:
        ids, lengths = (golden[k][:batch] for k in ("prompts", "prompt_lengths"))
        for guide_name in args.guides:
            guide = guides[guide_name]
            for temperature in (0.0, 1.0):
                settings = dict(max_new=args.new, temperature=temperature, guide=guide)

                def plain(settings=settings, ids=ids, lengths=lengths):
                    key = jax.random.key(0)
                    return decode.generate(lm, ids, lengths, key, **settings)

                for name, draft in proposers.items():

                    def fast(settings=settings, ids=ids, lengths=lengths, draft=draft):
                        key = jax.random.key(0)
                        return speculate(lm, draft, ids, lengths, key, **settings)

                    plain(), fast()
                    times = [
                        (seconds(plain)[0], seconds(fast)) for _ in range(args.rounds)
                    ]
                    stats = times[0][1][1].stats
                    slow = statistics.median(t for t, _ in times)
                    quick = statistics.median(t for _, (t, _) in times)
                    line = {
                        "benchmark": "speculate", "batch": batch, "guide": guide_name,
                        "temperature": temperature, "draft": name, "draft_length": 4,
                        "tokens_per_target_call": round(
                            float(stats["tokens_per_target_call"]), 2),
                        "accepted": np.round(stats["accepted"], 2).tolist(),
                        "speedup": round(slow / quick, 2),
                        "seconds": round(quick, 2), "jax": jax.__version__,
                    }  # fmt: skip
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
