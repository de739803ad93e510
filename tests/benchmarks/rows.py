"""Preference pairs a second from a file to token ids: the first time, and from the disk.

  python tests/benchmarks/rows.py PAIRS TOKENIZER [--pairs 20000] [--length 512]
      [--earlier CHECKOUT] [--rounds 3]

PAIRS is a .jsonl or .jsonl.gz file of pairs (HH-RLHF, say); it is repeated, with a number in
every first turn, up to `--pairs` rows. Every round is a process each: of the checkout at
`--earlier` (a clone of this repository at an earlier commit), of this code with an empty
cache, and of this code once more. Printed are medians: pairs a second of the wall clock until
the rows and their digest are there (imports and the reading of the tokenizer not counted),
microseconds of CPU per pair, and the peak of memory.
"""

import argparse
import gzip
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

CHILD = """
import datetime, json, resource, sys, time
path, text, length, folder = sys.argv[1:]
from alignax import plugin
from alignax.inputs import plan, rows
try:
    from alignax.inputs import tokenizer  # an earlier version
except ImportError:
    from alignax.text import tokenizer
tk = tokenizer.load(text, now=datetime.datetime(2026, 1, 1))
section = {"name": "jsonl", "path": path, "split": "train"}
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
start, before = time.perf_counter(), cpu()
try:
    from alignax.inputs import row_store
    found = row_store.read(section, tk, length=int(length), folder=folder)
except ImportError:  # an earlier version
    counts = rows.no_counts()
    found = rows.read(plugin.load_examples(section), tk, length=int(length),
                      vocab_size=None, counts=counts)
plan.identity([found], ())
seconds, used = time.perf_counter() - start, cpu() - before
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print("\\n" + json.dumps([seconds, used, peak, len(found)]))
"""


def repeated(source: pathlib.Path, path: pathlib.Path, many: int) -> None:
    """Writes `many` pairs, no two of which are the same."""
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with path.open("w", encoding="utf-8") as out:
        for i in range(many):
            row = rows[i % len(rows)]
            sides = {
                k: row[k].replace("\n\nHuman:", f"\n\nHuman: {i}", 1)
                for k in ("chosen", "rejected")
            }
            turns = {k: parsed(text) for k, text in sides.items()}
            out.write(json.dumps(turns) + "\n")


def parsed(dialogue: str) -> list[dict[str, str]]:
    """The turns of HH-RLHF's form, which earlier versions of data.jsonl do not read."""
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = []
    for piece in dialogue.split("\n\n"):
        who, _, text = piece.partition(":")
        if who in roles:
            turns.append({"role": roles[who], "content": text.strip()})
        elif turns:
            turns[-1]["content"] += "\n\n" + piece
    return [t for t in turns if t["content"]]


def child(checkout, *args):
    """[seconds, CPU seconds, GiB, rows] of one process."""
    env = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, args)], env=env, text=True, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=checkout,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("tokenizer", type=pathlib.Path)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--earlier", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    here = pathlib.Path(__file__).parents[2]
    names = [*(["earlier"] if args.earlier else []), "first time", "again"]
    found = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "pairs.jsonl")
        repeated(args.source, path, args.pairs)
        text = args.tokenizer.absolute()
        for number in range(args.rounds):
            cache = pathlib.Path(folder, f"cache{number}")
            for name in names:
                checkout = args.earlier.absolute() if name == "earlier" else here
                found[name].append(child(checkout, path, text, args.length, cache))
    print(
        f"| {args.pairs} pairs | rows | pairs/s | CPU us/pair | GiB |\n|---|---|---|---|---|"
    )
    for name, runs in found.items():
        seconds, used, peak, rows = (
            statistics.median(x) for x in zip(*runs, strict=True)
        )
        print(
            f"| {name} | {rows:.0f} | {args.pairs / seconds:.0f} | "
            f"{1e6 * used / args.pairs:.0f} | {peak:.2f} |"
        )


if __name__ == "__main__":
    main()
