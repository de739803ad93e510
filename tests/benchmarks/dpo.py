"""Seconds of a DPO step on real pairs and its memory, beside TRL's.

  python tests/benchmarks/dpo.py [--data pairs.jsonl.gz] [--pairs 4] [--length 256]
    [--batches 16] [--modes precomputed online] [--recompute] [--peer trl]

ALIGNAX_SMOLLM2 names SmolLM2-135M-Instruct as GGUF, ALIGNAX_HH the pairs (HH-RLHF's JSON
lines), ALIGNAX_PEER_PYTHON a Python that has torch, transformers, gguf and trl (or, with
--peer tunix, google-tunix, which knows no precomputed reference and gets weights of the
same sizes, drawn at random: its time counts, its loss does not).

Each side is a process of its own, with all cores, and steps in turns with the other over
the same token ids, all of them once: the peer in batches of so many pairs, ours in those
that its source makes, as many tokens as so many pairs have on average (with --same in
those of the peer, whose losses then have to be ours). Compared are seconds a pair. A step
begins at lists of ids: packing or collating is in its time. Tokens are those after
truncation, with what two responses share counted once, on both sides. Both do AdamW with
clipped gradients. --recompute leaves TRL its default, to compute activations again in the
backward pass; ours keeps them. 'precomputed': the reference was read before, and none is
in memory; 'online': it is read in every step. Memory is the most that a process ever had.
One JSON line a mode.
"""

import argparse
import gzip
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

TRL = """
import json, os, resource, sys, tempfile, time
import datasets, torch, transformers, trl
datasets.disable_progress_bars()
ask = json.loads(sys.argv[1])
torch.set_num_threads(os.cpu_count())
folder, file = os.path.split(ask["model"])
given = dict(gguf_file=file, dtype=torch.float32)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **given)
text = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
text.pad_token = text.pad_token or text.eos_token
online = ask["mode"] == "online"
ref = transformers.AutoModelForCausalLM.from_pretrained(folder, **given) if online else None
for m in (model, ref):  # the file was quantised, what is in memory is not
    if m is not None:
        m.is_quantized, m.hf_quantizer = False, None
        del m.config.quantization_config
many = ask["pairs"]
args = trl.DPOConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=many, bf16=False, fp16=False,
    max_length=ask["length"], precompute_ref_log_probs=not online, report_to=[],
    learning_rate=1e-6, use_cpu=True, gradient_checkpointing=ask["recompute"],
)
trainer = trl.DPOTrainer(
    model, ref, args=args, processing_class=text,
    train_dataset=datasets.Dataset.from_list(ask["rows"]),
)
rows = list(trainer.train_dataset)
names = ("prompt_ids", "chosen_ids", "rejected_ids")
said = f"trl {trl.__version__}, torch {torch.__version__}"
print(json.dumps({"version": said,
                  "rows": [[row[name] for name in names] for row in rows]}), flush=True)
trainer.create_optimizer()
trainer.current_gradient_accumulation_steps = 1
model.train()
for line in sys.stdin:
    i = json.loads(line)
    start = time.perf_counter()
    batch = trainer.data_collator(rows[i * many : (i + 1) * many])
    loss = trainer.training_step(model, batch)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"s": taken, "loss": float(loss), "rss": peak}), flush=True)
"""

TUNIX = """
import json, os, resource, sys, time
from importlib.metadata import version
import numpy as np, optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.sft.dpo import dpo_trainer as dpo
ask = json.loads(sys.argv[1])
sizes = dict(num_layers=30, vocab_size=49152, embed_dim=576, hidden_dim=1536, num_heads=9,
             head_dim=64, num_kv_heads=3, rope_theta=100000, norm_eps=1e-5,
             weight_tying=True)
models = [llama.Llama3(llama.ModelConfig(**sizes), rngs=nnx.Rngs(i)) for i in range(2)]
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
config = dpo.DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=10**9)
trainer = dpo.DPOTrainer(*models, tx, config)
step = trainer.jit_train_and_eval_step()[0]
def wide(*columns):  # few widths, for each compiles
    return -(-max(len(row) for rows in columns for row in rows) // 64) * 64
def padded(rows, width, left):
    ids, mask = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    for x, m, row in zip(ids, mask, rows):
        at = slice(width - len(row), None) if left else slice(0, len(row))
        x[at], m[at] = row, 1
    return ids, mask
said = f"tunix {version('google-tunix')}, jax {version('jax')}"
print(json.dumps({"version": said}), flush=True)
for line in sys.stdin:
    i, many = json.loads(line), ask["pairs"]
    start = time.perf_counter()
    prompts, *sides = zip(*ask["rows"][i * many : (i + 1) * many])
    fields = [padded(prompts, wide(prompts), True)]
    fields += [padded(side, wide(*sides), False) for side in sides]
    batch = trainer._prepare_inputs(dpo.TrainingInput(*[x for f in fields for x in f]))
    loss = float(step(batch)[0])
    taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"s": taken, "loss": loss, "rss": peak}), flush=True)
"""
PEERS = {"trl": TRL, "tunix": TUNIX}


def ours(ask):
    """This program as a worker: pairs of ids come in, then a line for every step."""
    import jax

    from alignax import plugin
    from alignax.batch import LM, from_pairs
    from alignax.inputs import layout, plan
    from alignax.inputs.annotate import annotate as fill
    from alignax.models import load, sharding
    from alignax.training import optim
    from alignax.training.step import init_state, make_train_step

    many, length = ask["pairs"], ask["length"]
    lm = load.load(ask["model"])
    mesh = sharding.make_mesh((1, 1, 1))
    tx = optim.make_tx(1e-6)
    step = make_train_step(lm.config, tx, plugin.load("losses", "dpo"), mesh)
    ref = LM(lm.config, sharding.put_params(lm.params, mesh))
    state = init_state(lm.params, tx, mesh)
    annotate = jax.jit(lambda batch, lms: fill(batch, lms))

    prompts, *sides = zip(*ask["rows"], strict=True)
    sides = [
        [r[: length - len(p)] for p, r in zip(prompts, side, strict=True)]
        for side in sides
    ]

    def collate(at):
        batch = from_pairs(
            *[[x[i] for i in at] for x in (prompts, *sides)], length=length
        )
        empty = many - len(at)  # places of a batch that is full before

        def fill(x):
            return np.pad(x, [(0, empty)] + [(0, 0)] * (x.ndim - 1))

        return jax.tree.map(fill, batch)

    every = from_pairs(prompts, *sides, length=length)
    sizes = [
        layout.group(*x).size() for x in zip(every.tokens, every.mask, strict=True)
    ]
    if ask["same"]:
        groups = [[*range(i, i + many)] for i in range(0, len(sizes), many)]
        shape = layout.fitted([[sizes[i] for i in g] for g in groups], max(sizes))
    else:
        order = plan.Order(
            sizes, many, window=max(16, 1024 // many), seed=0, shuffle=True,
            limit=len(sizes), balanced=True,
        )  # fmt: skip
        steps = range(-(-len(sizes) // many))
        groups = [[i for i in order.batch(k) if i is not None] for k in steps]
        usual = plan.packing(order, 1, 1)
        shape = usual.rows, usual.length

    def pack(i):  # what the peer does in its collator
        batch = collate(groups[i])
        laid = layout.build(batch, rows=shape[0], length=shape[1])
        return batch._replace(layout=laid)

    columns = []
    for i in range(len(groups)):
        batch = pack(i)
        if ask["mode"] == "precomputed":
            batch = jax.device_get(annotate(batch, {"ref": ref}))
        columns.append(batch.ref_logps)
    lms = {"ref": ref} if ask["mode"] == "online" else {}
    del lm, ref, annotate
    say(
        version=jax.__version__,
        sizes=[*map(len, groups)],
        distinct=sum(sizes),
        useful=sum(sizes) / (len(groups) * shape[0] * shape[1]),
    )
    for line in sys.stdin:
        i = json.loads(line)
        start = time.perf_counter()
        batch = pack(i)._replace(ref_logps=columns[i])
        batch = sharding.put_batch(batch, mesh)
        state, metrics = jax.block_until_ready(step(state, lms, batch))
        taken = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        say(s=taken, loss=float(metrics["loss"]), rss=peak)


def say(**numbers):
    print(json.dumps(numbers), flush=True)


class Side:
    """A worker that steps when it is told to."""

    def __init__(self, command, **env):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL if not os.environ.get("VERBOSE") else None,
            env={**os.environ, **env},
        )  # fmt: skip
        self.hello = self.read()

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):  # a library may print, too
                return json.loads(line)
        raise RuntimeError("a side stopped; VERBOSE=1 shows what it said")

    def step(self, i):
        self.process.stdin.write(f"{i}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def dialogues(path, many):
    """Rows of text: what the two sides share up to the last answer is the prompt."""
    rows, opened = [], gzip.open if path.endswith(".gz") else open
    with opened(path, "rt") as file:
        for line in file:
            row, cut = json.loads(line), "\n\nAssistant:"
            prompt, _, chosen = row["chosen"].rpartition(cut)
            other, _, rejected = row["rejected"].rpartition(cut)
            if (
                prompt == other
                and chosen.strip()
                and rejected.strip()
                and len(prompt) < 600
            ):
                rows.append(dict(prompt=prompt + cut, chosen=chosen, rejected=rejected))
            if len(rows) == many:
                return rows
    raise SystemExit(f"{path} has {len(rows)} pairs, {many} are asked for")


def as_ids(rows, path, length):
    """Ids as TRL makes them, for a peer that takes ids: no row longer than `length`."""
    from alignax.text import tokenizer

    text = tokenizer.load(path)
    end = [min(text.eos_ids)]

    def one(row):
        prompt = text.encode(row["prompt"])
        sides = [text.encode(row[k]) + end for k in ("chosen", "rejected")]
        return prompt, *[side[: length - len(prompt)] for side in sides]

    return [row for row in map(one, rows) if len(row[0]) < length]


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--data", default=os.environ.get("ALIGNAX_HH"))
    args.add_argument("--pairs", type=int, default=4)
    args.add_argument("--length", type=int, default=256)
    args.add_argument("--batches", type=int, default=16)
    args.add_argument("--modes", nargs="+", default=["precomputed", "online"])
    args.add_argument("--recompute", action="store_true", help="TRL's default")
    args.add_argument("--peer", choices=PEERS, default="trl")
    args.add_argument("--same", action="store_true", help="batches of the peer's")
    args = args.parse_args()
    if args.peer == "tunix":
        args.modes = ["online"]
    path, python = map(os.environ.get, ("ALIGNAX_SMOLLM2", "ALIGNAX_PEER_PYTHON"))
    if not (path and python and args.data):
        sys.exit(
            print("skipped: it needs a model, a peer and pairs (see its docstring)")
        )
    for mode in args.modes:
        rows = dialogues(args.data, args.pairs * args.batches)
        if args.peer == "tunix":
            rows = as_ids(rows, path, args.length)
        ask = {
            "model": path,
            "mode": mode,
            "pairs": args.pairs,
            "length": args.length,
            "recompute": args.recompute,
            "same": args.same,
        }
        peer = Side(
            [python, "-c", PEERS[args.peer], json.dumps({**ask, "rows": rows})],
            PYTHONPATH="",
        )
        ids = peer.hello.get("rows", rows)
        us = Side(
            [sys.executable, __file__, "--worker", json.dumps({**ask, "rows": ids})]
        )
        sides = {"ours": us, "peer": peer}
        starts = range(0, len(ids), args.pairs)
        sizes = {
            "ours": us.hello["sizes"],
            "peer": [len(ids[i:][: args.pairs]) for i in starts],
        }
        for i in range(
            len(starts) if args.peer == "tunix" else 2
        ):  # each shape compiles
            peer.step(i)
        us.step(0), us.step(1)
        found = {name: [] for name in sides}
        for i in range(max(map(len, sizes.values()))):
            for name, side in sides.items():
                if i < len(sizes[name]):
                    found[name].append(side.step(i))
        seconds = {k: sum(x["s"] for x in v) for k, v in found.items()}
        many, distinct = len(ids), us.hello["distinct"]
        medians = {k: statistics.median(x["s"] for x in v) for k, v in found.items()}
        losses = {k: [x["loss"] for x in v] for k, v in found.items()}
        if not args.same:
            losses = {
                k: sum(map(math.prod, zip(v, sizes[k], strict=True))) / many
                for k, v in losses.items()
            }
        say(
            benchmark="dpo", mode=mode, pairs=many, batch=args.pairs, length=args.length,
            s_per_pair={k: round(v / many, 3) for k, v in seconds.items()},
            ratio=round(seconds["peer"] / seconds["ours"], 2),
            median_s={k: round(v, 2) for k, v in medians.items()},
            steps={k: len(v) for k, v in sizes.items()},
            peak_gb={k: round(v[-1]["rss"] / 2**20, 2) for k, v in found.items()},
            loss={k: np.round(v, 4).tolist() for k, v in losses.items()},
            tokens_per_s={k: round(distinct / v, 1) for k, v in seconds.items()},
            useful_share=round(us.hello["useful"], 3), jax=us.hello["version"],
            peer=peer.hello["version"], recompute=args.recompute,
        )  # fmt: skip
        for side in sides.values():
            side.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        ours(json.loads(sys.argv[2]))
    else:
        main()
