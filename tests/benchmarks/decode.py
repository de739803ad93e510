"""Tokens per second of `decode.generate`, beside transformers' and beside the memory.

  python tests/benchmarks/decode.py [--new 64] [--rounds 5] [--batches 1 8]

ALIGNAX_SMOLLM2 names SmolLM2-135M-Instruct as GGUF (without it a model of its shape is
drawn here); ALIGNAX_PEER_PYTHON a Python that has torch and transformers (without it the
peer is left out). One JSON line per batch size. All of them run in turns, `rounds` times,
and medians are compared. `bound` is the rate at which all weights could be read once per
token: matrix-vector products of the same bytes, in the same turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from alignax.batch import LM
from alignax.models import load, transformer
from alignax.sampling import decode, weights

PROMPT = 32
SMOLLM2 = dict(
    vocab_size=49152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    mlp_width=1536, tied=True,
)  # fmt: skip
PEER = """
import json, sys, time, os
import torch, transformers
torch.set_num_threads(os.cpu_count())
path = sys.argv[1]
folder, file = os.path.split(path)
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=file, dtype=torch.float32).eval()
print(json.dumps({"version": transformers.__version__}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    ids = torch.tensor(ask["ids"])
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=ask["new"], min_new_tokens=ask["new"], pad_token_id=2)
    taken = time.perf_counter() - start
    print(json.dumps({"s": taken, "ids": out[:, ids.shape[1]:].tolist()}), flush=True)
"""


class Peer:
    """transformers in a process of its own, asked line by line."""

    def __init__(self, python, path):
        self.process = subprocess.Popen(
            [python, "-c", PEER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip
        self.version = self.read()["version"]

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the peer stopped: does its Python have transformers?")
        return json.loads(line)

    def generate(self, ids, new):
        self.process.stdin.write(json.dumps({"ids": ids.tolist(), "new": new}) + "\n")
        self.process.stdin.flush()
        return self.read()


def reader(lm):
    """A jitted matrix-vector product for every weight of the model."""
    leaves = [x for x in jax.tree.leaves(transformer.unstack(lm).params) if x.ndim > 1]
    tables = [jnp.reshape(x, (x.shape[0], -1)) for x in leaves]

    @jax.jit
    def read(tables, seed):
        return sum((x @ jnp.full(x.shape[1], seed)).sum() for x in tables)

    return lambda i: read(tables, jnp.float32(i)).block_until_ready()


def seconds(function, *args):
    start = time.perf_counter()
    out = function(*args)
    return time.perf_counter() - start, out


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--new", type=int, default=64)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = args.parse_args()
    path = os.environ.get("ALIGNAX_SMOLLM2")
    if path:
        lm = load.load(path)
    else:
        config = transformer.ModelConfig(**SMOLLM2)
        lm = LM(config, transformer.init(config, jax.random.key(0)))
    lm = weights.for_decoding(
        jax.jit(transformer.unstack)(lm)
    )  # once, as for many calls
    python = os.environ.get("ALIGNAX_PEER_PYTHON")
    peer = Peer(python, path) if python and path else None
    read = reader(lm)
    read(0.0)
    for batch in args.batches:
        ids = np.random.default_rng(batch).integers(
            100, lm.config.vocab_size, size=(batch, PROMPT), dtype=np.int32
        )
        lengths = np.full(batch, PROMPT)

        def ours(ids=ids, lengths=lengths):
            out = decode.generate(
                lm, ids, lengths, jax.random.key(0), max_new=args.new, temperature=0.0
            )
            return np.asarray(out.batch.tokens)[:, 0, PROMPT:]

        tokens = ours()
        if peer:
            theirs = peer.generate(ids, args.new)
        times = {"ours": [], "peer": [], "read": []}
        for i in range(args.rounds):
            times["ours"].append(seconds(ours)[0])
            times["read"].append(seconds(read, float(i))[0])
            if peer:
                times["peer"].append(peer.generate(ids, args.new)["s"])
        many = batch * args.new
        median = {k: statistics.median(v) for k, v in times.items() if v}
        line = {
            "benchmark": "decode", "batch": batch, "new": args.new,
            "tokens_per_s": round(many / median["ours"], 1),
            "bound": round(batch / median["read"], 1),
            "share_of_bound": round(args.new * median["read"] / median["ours"], 3),
            "weights_gb_per_s": round(4e-9 * transformer.num_params(lm.params)
                                      / median["read"], 1),
            "jax": jax.__version__,
        }  # fmt: skip
        if peer:
            line |= {
                "peer": f"transformers {peer.version}",
                "peer_tokens_per_s": round(many / median["peer"], 1),
                "ratio": round(median["peer"] / median["ours"], 2),
                "ratios": [round(b / a, 2) for a, b in zip(times["ours"], times["peer"],
                                                         strict=True)],
                "same_tokens": float(np.mean(tokens == np.array(theirs["ids"]))),
            }  # fmt: skip
        print(json.dumps(line), flush=True)
    if peer:
        peer.process.stdin.close()
        peer.process.wait()


if __name__ == "__main__":
    sys.exit(main())
