"""Log-likelihoods and responses beside those of lm-evaluation-harness's own model `hf`.

  python tests/benchmarks/harness.py --model FOLDER --gsm8k train.jsonl --hh pairs.jsonl.gz
    [--requests 200] [--texts 12] [--prompts 12] [--max-length 512] [--batch-size 8]
    [--float64]

FOLDER is a Hugging Face folder that both read in float32 (`alignax export` writes one of a
.gguf file). This Python has alignax, lm_eval, torch, transformers and accelerate. The
requests are made from GSM8K and HH-RLHF: short and long ones, without a context, with blanks
at its end, with characters of several bytes, four answers to one question, and contexts
beyond `--max-length`. Responses are greedy, up to 32 tokens; where two differ, the gap is
that between hf's two largest logits at the first token that does.

With `--float64` the log-likelihoods of both are also compared with those of hf in float64,
which shows whose rounding the difference is.

JSON lines, each with what is known so far; the last one has the largest differences in
nats, flags that differ, and responses that do.
"""

import argparse
import gzip
import json
import random
import time
import types

UNICODE = (
    "Zürich – naïve café ",
    "日本語のテキスト、",
    "🙂🙃 emoji ",
    "Привет, мир ",
    "x²+y²≤z² ",
)


def read(path, many):
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(many), file, strict=False)]


def pairs(gsm8k, hh, many):
    """(context, continuation), of all kinds, in a random order."""
    rng = random.Random(0)
    found = []
    for i, row in enumerate(gsm8k):
        question, answer = row["question"], row["answer"].split("\n")[0]
        found.append((f"Question: {question}\nAnswer:", f" {answer}"))
        found.append((question[:30] + " ", answer[:20]))  # blanks at the end
        found.append(("", answer))
        found.append((UNICODE[i % 5] * 3, UNICODE[(i + 1) % 5]))
        right = row["answer"].rsplit(" ", 1)[-1]
        choices = (f" {right}", " 7", " 12 apples", " none of them")
        found += [(f"{question}\nThe answer is", choice) for choice in choices]
    for row in hh:
        at = row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")
        found += [
            (row["chosen"][:at], row[side][at:] or " ok")
            for side in ("chosen", "rejected")
        ]
    for row in gsm8k[:8]:  # beyond the context
        found.append((f"{row['question']} {row['answer']}\n" * 8, " The end."))
    rng.shuffle(found)
    return [(c, t) for c, t in found if t][:many]


def requests(arguments):
    return [types.SimpleNamespace(args=x, task_name=None) for x in arguments]


def timed(function, *arguments):
    start = time.perf_counter()
    return function(*arguments, disable_tqdm=True), round(
        time.perf_counter() - start, 1
    )


def gap(hf, prompt, one, other):
    """Of the two largest logits of hf where two responses part."""
    import torch

    ids, a, b = (hf.tok_encode(x) for x in (prompt, prompt + one, prompt + other))
    n = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )
    with torch.no_grad():
        logits = hf.model(torch.tensor([a[:n][-hf.max_length :]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return {"token": n - len(ids), "gap": first - second}


def rounding(found, exact):
    """Of the distances |found - exact| in nats: the largest, the mean, those above 1e-4."""
    apart = [abs(x - y) for x, y in zip(found, exact, strict=True)]
    beyond = sum(d > 1e-4 for d in apart)
    return {"max": max(apart), "mean": sum(apart) / len(apart), "above_1e-4": beyond}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "gsm8k", "hh"):
        parser.add_argument(f"--{name}", required=True)
    for name, value in (
        ("requests", 200),
        ("texts", 12),
        ("prompts", 12),
        ("max-length", 512),
        ("batch-size", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--float64", action="store_true")
    a = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    from alignax.harness import adapter

    shared = {"max_length": a.max_length, "batch_size": a.batch_size}
    hf = HFLM(a.model, dtype="float32", device="cpu", **shared)
    ours = adapter.register()(a.model, **shared)
    gsm8k, hh = read(a.gsm8k, 200), read(a.hh, 40)
    asked = requests(pairs(gsm8k[:30], hh, a.requests))
    want, slow = timed(hf.loglikelihood, asked)
    got, quick = timed(ours.loglikelihood, asked)
    apart = [abs(x[0] - y[0]) for x, y in zip(got, want, strict=True)]
    out = {
        "requests": len(asked), "nats": max(apart),
        "nats_per_100": max(d / max(1, abs(y[0]) / 100) for d, y in zip(apart, want, strict=True)),
        "flags": sum(x[1] != y[1] for x, y in zip(got, want, strict=True)),
        "greedy": sum(y[1] for y in want), "seconds_hf": slow, "seconds": quick,
    }  # fmt: skip
    print(json.dumps(out), flush=True)
    if a.float64:
        exact, _ = timed(
            HFLM(a.model, dtype="float64", device="cpu", **shared).loglikelihood, asked
        )
        out["beside_float64"] = {
            name: rounding([x[0] for x in found], [x[0] for x in exact])
            for name, found in (("hf", want), ("alignax", got))
        }
        print(json.dumps(out), flush=True)
    texts = [
        f"{r['chosen']}{' '.join(q['question'] for q in gsm8k[i : i + 8])}"
        for i, r in enumerate(hh)
    ]
    asked = requests([(t,) for t in [*texts[: a.texts - 2], "One.", "日本語 🙂"]])
    want, got = (m.loglikelihood_rolling(asked, disable_tqdm=True) for m in (hf, ours))
    out |= {
        "texts": len(asked),
        "rolling_nats": max(abs(x - y) for x, y in zip(got, want, strict=True)),
        "largest": min(want),
    }
    print(json.dumps(out), flush=True)
    prompts = [f"Question: {r['question']}\nAnswer:" for r in gsm8k[: a.prompts - 4]]
    prompts += [
        hf.apply_chat_template([{"role": "user", "content": r["question"]}])
        for r in gsm8k[:4]
    ]
    chats = [
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi "},
        ],
    ]
    begun = [*chats[0], {"role": "assistant", "content": "The answer is"}]
    same = [hf.apply_chat_template(c) == ours.apply_chat_template(c) for c in chats]
    same.append(
        hf.apply_chat_template(begun, False) == ours.apply_chat_template(begun, False)
    )
    same.append(hf.chat_template(True) == ours.chat_template(True))
    asked = requests(
        [
            (
                p,
                {
                    "until": ["\n\n", "Question:"],
                    "max_gen_toks": 32,
                    "do_sample": False,
                },
            )
            for p in prompts
        ]
    )
    want, slow = timed(hf.generate_until, asked)
    got, quick = timed(ours.generate_until, asked)
    differ = [
        gap(hf, p, x, y) for p, x, y in zip(prompts, got, want, strict=True) if x != y
    ]
    out |= {"prompts": len(prompts), "differ": differ, "characters": sum(map(len, want)), "templates": same, "seconds_generate_hf": slow, "seconds_generate": quick}  # fmt: skip
    print(json.dumps(out))


if __name__ == "__main__":
    main()
