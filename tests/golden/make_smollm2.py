"""Makes the golden numbers of a real model: SmolLM2-135M-Instruct on 16 HH preference pairs.

    python -m pip install torch transformers gguf
    python tests/golden/make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf harmless-base.jsonl.gz

transformers dequantises the file and runs it in float32 on CPU; logits are cast to float64
before the log-sum-exp (a float32 log_softmax over 49,152 entries is biased by 1e-5 a token).
Each side of a pair is rendered with the model's own chat template, tokenised once without
added specials, and ends with the assistant's end-of-turn token. `smollm2_hh.npz` holds no
text, only:

  tokens int32[16,2,T], mask bool (last assistant turn), lengths int32[16,2]
  logps float32[16,2,T]      log p(tokens[t] | tokens[<t]) for every real t >= 1, else 0
  prompts int32[16,P], prompt_lengths int32[16]      right-padded
  greedy int32[16,64], gaps float32[16,64]           argmax tokens (not stopped at EOS) and the
                                                     top-two logit gap at each step
"""

import gzip
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
PAIRS, LONGEST, PROMPTS, NEW = 16, 288, 16, 64


def messages(dialogue):
    """'\\n\\nHuman: ..\\n\\nAssistant: ..' -> list of messages, or None if a turn is empty."""
    turns = []
    for part in dialogue.split("\n\nHuman:")[1:]:
        human, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": human.strip()})
        if len(answers) != 1:
            return None
        turns.append({"role": "assistant", "content": answers[0].strip()})
    return turns if turns and all(t["content"] for t in turns) else None


def main(model_path, data_path):
    torch.set_num_threads(2)
    path = pathlib.Path(model_path)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def ids(turns, generation=False):
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows, prompts = [], []
    with gzip.open(data_path, "rt", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            sides = [messages(row[k]) for k in ("chosen", "rejected")]
            if None in sides or sides[0][:-1] != sides[1][:-1]:
                continue
            prompt = ids(sides[0][:-1], generation=True)
            full = [ids(side) for side in sides]
            full = [
                x[: len(x) - x[::-1].index(end)] for x in full
            ]  # drop the newline after it
            if max(map(len, full)) > LONGEST or any(
                x[: len(prompt)] != prompt for x in full
            ):
                continue
            if len(rows) < PAIRS:
                rows.append((prompt, full))
            elif len(sides[0]) == 2 and len(prompts) < PROMPTS:
                prompts.append(prompt)
            if len(rows) == PAIRS and len(prompts) == PROMPTS:
                break

    width = max(len(x) for _, full in rows for x in full)
    tokens = np.zeros((PAIRS, 2, width), np.int32)
    mask = np.zeros((PAIRS, 2, width), bool)
    lengths = np.zeros((PAIRS, 2), np.int32)
    logps = np.zeros((PAIRS, 2, width), np.float32)
    for i, (prompt, full) in enumerate(rows):
        for j, x in enumerate(full):
            tokens[i, j, : len(x)] = x
            mask[i, j, len(prompt) : len(x)] = True
            lengths[i, j] = len(x)
            with torch.no_grad():
                logits = model(torch.tensor([x])).logits[0, :-1].double()
            target = logits.gather(1, torch.tensor(x[1:])[:, None])[:, 0]
            logps[i, j, 1 : len(x)] = (target - torch.logsumexp(logits, 1)).numpy()

    longest = max(map(len, prompts))
    padded = np.array([p + [0] * (longest - len(p)) for p in prompts], np.int32)
    greedy, gaps = (
        np.zeros((PROMPTS, NEW), np.int32),
        np.zeros((PROMPTS, NEW), np.float32),
    )
    for i, prompt in enumerate(prompts):
        x, cache = torch.tensor([prompt]), None
        for t in range(NEW):
            with torch.no_grad():
                out = model(x, past_key_values=cache, use_cache=True)
            top = out.logits[0, -1].topk(2)
            greedy[i, t], gaps[i, t] = top.indices[0], top.values[0] - top.values[1]
            x, cache = top.indices[:1][None], out.past_key_values
        print(repr(tokenizer.decode(greedy[i])), "smallest gap", gaps[i].min())

    np.savez_compressed(
        HERE / "smollm2_hh.npz", tokens=tokens, mask=mask, lengths=lengths, logps=logps,
        prompts=padded, prompt_lengths=np.array([len(p) for p in prompts], np.int32),
        greedy=greedy, gaps=gaps,
    )  # fmt: skip
    print(
        "tokens", lengths.sum(), "scored", mask.sum(), "mean logp", logps[mask].mean()
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(*sys.argv[1:])
