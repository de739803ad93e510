"""Seconds of a GRPO step and its memory, beside TRL's: sampling, scoring, updating.

  python tests/benchmarks/grpo.py [--prompts 4] [--group 8] [--new 48] [--steps 4]
    [--recompute] [--kl .1] [--apart]

ALIGNAX_SMOLLM2 names SmolLM2-135M-Instruct as GGUF, ALIGNAX_PEER_PYTHON a Python that has
torch, transformers, gguf and trl; without it our side is measured alone.

Each side is a process of its own, with all cores, and steps in turns with the other: the
same prompts through the same chat template, responses that never end before --new tokens,
float32, AdamW with clipped gradients, one pass over a rollout, no KL (with --kl one in the
reward of ours and in the loss of TRL, both to a reference in memory). The responses are
each side's own. --recompute leaves TRL its default, to compute activations again in the
backward pass; ours keeps them. Beside the seconds there are those of the processor, of all
threads, for a machine that is shared: there the wall clock measures the neighbours, too.
Memory is the most that a process ever had. --apart is for a machine that has no room for
both at once. One JSON line.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time

from dpo import Side, say

THINGS = (
    "the tide", "a lost glove", "two brothers", "an old map", "the last train", "rain",
    "a blue door", "the number seven", "honey", "a chess game", "winter", "a lighthouse",
)  # fmt: skip
STARTS = ("Write a short story about", "Explain to a child", "Write three facts about")
PROMPTS = [f"{form} {thing}." for thing in THINGS for form in STARTS]

TRL = """
import json, os, resource, sys, tempfile, time
import datasets, torch, transformers, trl
datasets.disable_progress_bars()
ask = json.loads(sys.argv[1])
torch.set_num_threads(os.cpu_count())
folder, file = os.path.split(ask["model"])
given = dict(gguf_file=file, dtype=torch.float32)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **given)
model.is_quantized, model.hf_quantizer = False, None  # what is in memory is not
del model.config.quantization_config
text = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
text.pad_token = text.pad_token or text.eos_token
group, many = ask["group"], ask["prompts"]
args = trl.GRPOConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=group * many, bf16=False,
    fp16=False, num_generations=group, max_completion_length=ask["new"], report_to=[],
    generation_kwargs={"min_new_tokens": ask["new"]}, learning_rate=1e-6, use_cpu=True,
    beta=ask["kl"], gradient_checkpointing=ask["recompute"],
)
rows = [{"prompt": [{"role": "user", "content": p}]} for p in ask["rows"]]
def reward(completions, **_):
    return [float(sum(map(ord, c[0]["content"])) % 101) for c in completions]
trainer = trl.GRPOTrainer(
    model, reward, args=args, processing_class=text,
    train_dataset=datasets.Dataset.from_list(rows),
)
clock = {}
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
whole = trainer._generate_and_score_completions
def rolled(inputs):
    start, used = time.perf_counter(), cpu()
    out = whole(inputs)
    clock["rollout"], clock["rollout_cpu"] = time.perf_counter() - start, cpu() - used
    clock["tokens"] = int(out["completion_mask"].sum() + out["prompt_mask"].sum())
    return out
trainer._generate_and_score_completions = rolled
print(json.dumps({"version": f"trl {trl.__version__}, torch {torch.__version__}"}), flush=True)
trainer.create_optimizer()
trainer.current_gradient_accumulation_steps = 1
trainer._step = 0
model.train()
for line in sys.stdin:
    i = json.loads(line)
    some = [rows[(i * many + k) % len(rows)] for k in range(many) for _ in range(group)]
    start, used = time.perf_counter(), cpu()
    loss = trainer.training_step(model, some, None)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    taken, used = time.perf_counter() - start, cpu() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"s": taken, "cpu": used, "rss": peak, "sampling": clock["rollout"],
                      "sampling_cpu": clock["rollout_cpu"], "tokens": clock["tokens"],
                      "loss": float(loss)}), flush=True)
"""


def cpu() -> float:
    """Seconds of the processor that this process has used, over all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def ours(ask):
    """This program as a worker: a line comes in and a line goes out for every step."""
    import jax
    import numpy as np

    from alignax import plugin
    from alignax.batch import LM, Example
    from alignax.models import load, sharding, transformer
    from alignax.rollouts.sampler import Sampler
    from alignax.rollouts.source import rollout_source
    from alignax.sampling import decode
    from alignax.text import tokenizer
    from alignax.training import optim, parallel
    from alignax.training.step import init_state, make_train_step

    text, lm = tokenizer.load(ask["model"]), load.load(ask["model"])
    mesh = sharding.make_mesh((1, 1, 1))
    tx, kl = optim.make_tx(1e-6), ask["kl"]
    loss = plugin.load("losses", "policy_gradient")
    step = make_train_step(lm.config, tx, loss, mesh)
    state = init_state(lm.params, tx, mesh)
    lms = {"ref": LM(lm.config, sharding.put_params(lm.params, mesh))} if kl else {}

    def generate(lm, prompts, lengths, key, **settings):
        lm = transformer.limit_ids(lm, text.vocab_size)
        place = lambda x: jax.device_put(np.asarray(x))  # noqa: E731
        return decode.generate(lm, place(prompts), place(lengths), key, **settings)

    def reward(text: str) -> float:
        return float(sum(map(ord, text)) % 101)

    examples = [Example(f"p{i}", p, ()) for i, p in enumerate(ask["rows"])]
    longest = max(len(text.prompt(e)) for e in examples)
    shaping = [*(["kl"] if kl else []), "group_norm"]
    hyper = {"kl": {"beta": kl}}
    source = rollout_source(
        examples, Sampler(generate, plugin.bind(reward), lms, text, ask["new"]),
        policy=lambda params: LM(lm.config, params),
        score=parallel.scorer(mesh, packed=True), needs=loss.needs,
        shaping=[plugin.load("shaping", n, hyper.get(n)) for n in shaping],
        batch_size=ask["prompts"], length=longest + ask["new"], seed=0,
        group=ask["group"], grid=(1, 1),
    )  # fmt: skip
    lm = LM(lm.config, {})
    say(version=f"jax {jax.__version__}")
    for i, _ in enumerate(sys.stdin):
        start, used = time.perf_counter(), cpu()
        rows = source.next(state.params, i)
        middle, used_before = time.perf_counter(), cpu()
        batch = sharding.put_batch(rows, mesh)
        state, metrics = jax.block_until_ready(step(state, {}, batch))
        end, now = time.perf_counter(), cpu()
        found = source.report()["metrics"]
        say(
            s=end - start, cpu=now - used, sampling=found["rollout/sampling"],
            sampling_cpu=used_before - used, scoring=found["rollout/scoring"],
            updating=end - middle, updating_cpu=now - used_before,
            tokens=int((rows.layout.group > 0).sum()), shape=rows.layout.tokens.shape,
            loss=float(metrics["loss"]), useful=found["useful_tokens"],
            rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )  # fmt: skip


def measured(commands, steps):
    """({side: what each of its steps said}, {side: version}), the sides in turns."""
    env = {"ours": {}, "peer": {"PYTHONPATH": ""}}
    sides = {k: Side(command, **env[k]) for k, command in commands.items()}
    found = {name: [] for name in sides}
    for i in range(1 + steps):
        for name, side in sides.items():
            one = side.step(i)
            if i:  # the first compiles
                found[name].append(one)
    for side in sides.values():
        side.close()
    return found, {k: side.hello["version"] for k, side in sides.items()}


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--prompts", type=int, default=4)
    args.add_argument("--group", type=int, default=8)
    args.add_argument("--new", type=int, default=48)
    args.add_argument("--steps", type=int, default=4)
    args.add_argument("--kl", type=float, default=0.0, help="its strength")
    args.add_argument("--apart", action="store_true", help="one side after the other")
    args.add_argument("--recompute", action="store_true", help="TRL's default")
    args = args.parse_args()
    path, python = map(os.environ.get, ("ALIGNAX_SMOLLM2", "ALIGNAX_PEER_PYTHON"))
    if not path:
        sys.exit(print("skipped: it needs a model (see its docstring)"))
    ask = {
        "model": path, "rows": PROMPTS, "recompute": args.recompute, "kl": args.kl,
        "prompts": args.prompts, "group": args.group, "new": args.new,
    }  # fmt: skip
    commands = {"ours": [sys.executable, __file__, "--worker", json.dumps(ask)]}
    if python:
        commands["peer"] = [python, "-c", TRL, json.dumps(ask)]
    turns = [[name] for name in commands] if args.apart else [[*commands]]
    found, versions = {}, {}
    for names in turns:
        more, versions_of = measured({k: commands[k] for k in names}, args.steps)
        found |= more
        versions |= versions_of

    def median(key):
        return {
            k: round(statistics.median(x[key] for x in v), 2)
            for k, v in found.items()
            if key in v[0]
        }

    keys = (
        "s",
        "cpu",
        "sampling",
        "sampling_cpu",
        "scoring",
        "updating",
        "updating_cpu",
    )
    out = {key: median(key) for key in (*keys, "tokens", "useful")}
    if python:
        out["ratio"] = {
            k: round(out[k]["peer"] / out[k]["ours"], 2) for k in ("s", "cpu")
        }
    say(
        benchmark="grpo", **{k: ask[k] for k in ("prompts", "group", "new", "kl", "recompute")},
        **out, shape=found["ours"][-1]["shape"],
        peak_gb={k: round(v[-1]["rss"] / 2**20, 2) for k, v in found.items()},
        versions=versions, apart=args.apart,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        ours(json.loads(sys.argv[2]))
    else:
        main()
