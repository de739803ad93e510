"""Seconds of a DPO step on real pairs and its memory, beside TRL's.

  python tests/benchmarks/dpo.py [--data pairs.jsonl.gz] [--pairs 4] [--length 256]
    [--batches 16] [--modes precomputed online]

ALIGNAX_SMOLLM2 names SmolLM2-135M-Instruct as GGUF, ALIGNAX_HH the pairs (HH-RLHF's JSON
lines), ALIGNAX_PEER_PYTHON a Python that has torch, transformers, gguf and trl. Each side is a process
of its own, with all cores, and steps in turns with the other over the same token ids, all
of them once: the peer in batches of so many pairs, ours in those that its source makes,
as many tokens as so many pairs have on average. Compared are seconds a pair. A step
begins at lists of ids: packing or collating is in its time. Tokens are those after
truncation, with what two responses share counted once, on both sides. Both do AdamW with
clipped gradients. 'precomputed': the reference was read before, and none is in memory;
'online': it is read in every step. One JSON line a mode.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import time

PEER = """
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
print(json.dumps({"version": trl.__version__, "torch": torch.__version__,
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


def ours(ask):
    """This program as a worker: pairs of ids come in, then a line for every step."""
    import jax
    import numpy as np

    from alignax import layout, optim, plan, plugin, sharding, source
    from alignax.batch import LM, from_pairs
    from alignax.models import load
    from alignax.step import init_state, make_train_step

    many, length = ask["pairs"], ask["length"]
    lm = load.load(ask["model"])
    mesh = sharding.make_mesh((1, 1, 1))
    tx = optim.make_tx(1e-6)
    step = make_train_step(lm.config, tx, plugin.load("losses", "dpo"), mesh)
    ref = LM(lm.config, sharding.put_params(lm.params, mesh))
    state = init_state(lm.params, tx, mesh)
    annotate = jax.jit(lambda batch, lms: source.annotate(batch, lms))

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
    order = plan.Filled(sizes, many, window=16, seed=0, shuffle=True)
    groups = [[i for i in batch if i is not None] for batch in order.epoch(0)]

    def pack(i):  # what the peer does in its collator
        batch = collate(groups[i])
        laid = layout.build(batch, rows=order.rows, length=order.length)
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
        batches=len(groups),
        distinct=sum(sizes),
        useful=sum(sizes) / (len(groups) * order.rows * order.length),
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


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--data", default=os.environ.get("ALIGNAX_HH"))
    args.add_argument("--pairs", type=int, default=4)
    args.add_argument("--length", type=int, default=256)
    args.add_argument("--batches", type=int, default=16)
    args.add_argument("--modes", nargs="+", default=["precomputed", "online"])
    args.add_argument("--recompute", action="store_true", help="the peer's default")
    args = args.parse_args()
    path, python = map(os.environ.get, ("ALIGNAX_SMOLLM2", "ALIGNAX_PEER_PYTHON"))
    if not (path and python and args.data):
        sys.exit(
            print("skipped: it needs a model, a peer and pairs (see its docstring)")
        )
    for mode in args.modes:
        rows = dialogues(args.data, args.pairs * args.batches)
        ask = {
            "model": path,
            "mode": mode,
            "pairs": args.pairs,
            "length": args.length,
            "recompute": args.recompute,
        }
        peer = Side(
            [python, "-c", PEER, json.dumps({**ask, "rows": rows})], PYTHONPATH=""
        )
        ids = peer.hello["rows"]
        us = Side(
            [sys.executable, __file__, "--worker", json.dumps({**ask, "rows": ids})]
        )
        sides = {"ours": us, "peer": peer}
        batches = {"ours": us.hello["batches"], "peer": args.batches}
        for name, side in sides.items():  # the first steps compile
            side.step(0), side.step(batches[name] - 1)
        found = {name: [] for name in sides}
        for i in range(max(batches.values())):
            for name, side in sides.items():
                if i < batches[name]:
                    found[name].append(side.step(i))
        seconds = {k: sum(x["s"] for x in v) for k, v in found.items()}
        many, distinct = len(rows), us.hello["distinct"]
        medians = {k: statistics.median(x["s"] for x in v) for k, v in found.items()}
        say(
            benchmark="dpo", mode=mode, pairs=many, batch=args.pairs, length=args.length,
            s_per_pair={k: round(v / many, 3) for k, v in seconds.items()},
            ratio=round(seconds["peer"] / seconds["ours"], 2),
            median_s={k: round(v, 2) for k, v in medians.items()},
            steps=batches,
            peak_gb={k: round(v[-1]["rss"] / 2**20, 2) for k, v in found.items()},
            loss={k: round(statistics.mean(x["loss"] for x in v), 4)
                  for k, v in found.items()},
            tokens_per_s={k: round(distinct / v, 1) for k, v in seconds.items()},
            useful_share=round(us.hello["useful"], 3), jax=us.hello["version"],
            peer=f"trl {peer.hello['version']}, torch {peer.hello['torch']}",
        )  # fmt: skip
        for side in sides.values():
            side.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        ours(json.loads(sys.argv[2]))
    else:
        main()
