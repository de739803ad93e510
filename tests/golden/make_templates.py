"""Makes the golden renderings: chat templates and tokenizers, as transformers uses them.

    python -m pip install transformers==5.24 tokenizers jinja2
    python tests/golden/make_templates.py

`templates/NAME.jinja` are chat templates and `templates/dialogues.json` are rows, both
written by hand; this file has the tokenizers. For each template it writes
`templates/NAME.zip`: the folder of the tokenizer (tokenizer.json, tokenizer_config.json,
generation_config.json, chat_template.jinja) and `golden.json`, a list of cases:

  dialogue, length    the first `length` messages of that row of dialogues.json
  generation_prompt   whether an assistant turn is opened behind them
  variables           keywords of the template beside the row's own; left out if there are none
  text, ids           from `apply_chat_template`, of which the ids are of the whole text
  mask                only of templates with {% generation %}: `return_assistant_tokens_mask`,
                      as a string of 0 and 1
  refused             instead of these, the message with which the template refuses

A row is rendered whole, and up to its last assistant turn with a generation prompt. The
keys `tools` and `documents` of a row, and what its `variables` hold, are given in both.
Templates that know `enable_thinking` are asked with both values too. A row of which a
turn's content is a list has cases only where the template reads lists.

The tests only read these: they need neither transformers nor a network. Made again, every
file is the same to the byte where zlib is.
"""

import json
import pathlib
import re
import tempfile
import zipfile
from collections import Counter

import jinja2
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

HERE = pathlib.Path(__file__).parent / "templates"
TEXTS = [
    "Hello there, hello friend. Hi! What is two plus two?\n\nA: four.\n\nB: five\n",
    "Sure. Be brief and say no more please. The answer is here, because I ask for both.\n\n",
    "Is it warmer in the city? Let me look now.\n \n  Go on, and on it goes.\n\n\n",
    '{"name": "add", "arguments": {"a": 4, "b": 5}}\n{"type": "string"}, "city"\n',
] * 3
# Letters, single digits, punctuation with its line breaks, line breaks with what is
# blank before them, blanks: "\n" behind "\n" is one pre-token.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ELISIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"


def byte_level(digits, *, nfc=False, elisions=True):
    """Byte-level BPE behind a regular expression, as GPT-4, Llama 3 and Qwen have it."""
    made = Tokenizer(models.BPE())
    if nfc:
        made.normalizer = normalizers.NFC()
    pattern = (ELISIONS if elisions else "") + WORDS % digits
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trained(made, vocab_size=340, initial_alphabet=letters)


def sentencepiece(*, metaspace):
    """BPE over characters with bytes to fall back on: one blank is put in front of the text.

    By a normaliser (the older files of Llama 2) or by a pre-tokeniser, which leaves it out
    behind a special token (the newer ones).
    """
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    blank = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*blank, decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made = trained(made, vocab_size=380, special_tokens=specials, max_token_length=6)
    state = json.loads(made.to_str())  # the bytes are plain tokens, not added ones
    state["added_tokens"] = state["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(state))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def unigram():
    """Unigram with bytes to fall back on and no blank in front, whose pieces are made by hand."""
    text = "".join(TEXTS).replace(" ", "▁")
    counts = Counter(
        text[i : i + n] for n in range(1, 7) for i in range(len(text) - n + 1)
    )
    pieces = sorted(counts, key=lambda p: (-counts[p] * (len(p) - 0.5), p))
    pieces = [p for p in pieces if "▁" not in p[1:] and ("\n" not in p or p in "\n\n")]
    pieces = sorted({*(p for p in counts if len(p) == 1), *pieces[:140]})
    heads = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    # Scores are dyadic fractions: sums have no rounding on which a choice could depend.
    scored = [
        (p, -6.0 + len(p) * 0.5 - i / 65536) for i, p in enumerate(sorted(pieces))
    ]
    made = Tokenizer(models.Unigram([(h, -64.0) for h in heads] + scored, 3, True))
    made.normalizer = normalizers.Replace(" ", "▁")
    blank = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(blank)
    add(made, "<pad> <eos> <bos> <unk>", special=True)
    return made


def trained(made, **how):
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(show_progress=False, **how))
    return made


def add(made, names, *, special, **how):
    tokens = [
        AddedToken(n, special=special, normalized=False, **how) for n in names.split()
    ]
    made.add_special_tokens(tokens) if special else made.add_tokens(tokens)


def qwen(plain="", specials="<|endoftext|> <|im_start|> <|im_end|>"):
    made = byte_level(1, nfc=True)
    add(made, specials, special=True)
    if plain:
        add(made, plain, special=False)
    return made, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def llama2():
    made = sentencepiece(metaspace=False)
    return made, {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }


def llama3():
    made = byte_level(3)
    add(
        made,
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>",
        special=True,
    )
    first = made.token_to_id("<|begin_of_text|>")
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", first)]
    )
    return made, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def mistral(more=""):
    made = sentencepiece(metaspace=True)
    if more:
        add(made, more, special=True)
    return made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gemma():
    made = unigram()
    add(made, "<start_of_turn> <end_of_turn>", special=True)
    return made, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def no_system():
    made = sentencepiece(metaspace=False)
    add(
        made,
        "<|endoftext|> <|user|> <|assistant|> <|end|>",
        special=True,
        rstrip=True,
    )
    return made, {"eos_token": "<|endoftext|>", "unk_token": "<unk>"}


def harmony():
    made = byte_level(3, elisions=False)
    add(
        made,
        "<|endoftext|> <|return|> <|channel|> <|start|> <|end|> <|message|> <|call|>",
        special=True,
    )
    return made, {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"}


def marked():
    made = byte_level(3)
    add(
        made,
        "<|endoftext|> <|start|> <|message|> <|eot|> <|call|>",
        special=True,
    )
    add(made, "<think> </think>", special=False)
    return made, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


CALLS = "<tool_call> </tool_call> <tool_response> </tool_response>"
# name: its tokenizer, and the tokens that end a generation
FAMILIES = {
    "chatml": (qwen, "<|im_end|> <|endoftext|>"),
    "llama2": (llama2, "</s>"),
    "llama3": (llama3, "<|end_of_text|> <|eom_id|> <|eot_id|>"),
    "mistral": (mistral, "</s>"),
    "gemma": (gemma, "<eos> <end_of_turn>"),
    "qwen25": (lambda: qwen(CALLS), "<|im_end|> <|endoftext|>"),
    "qwen3": (lambda: qwen(f"{CALLS} <think> </think>"), "<|im_end|> <|endoftext|>"),
    "open_think": (lambda: qwen("<think> </think>"), "<|im_end|>"),
    "tools": (lambda: mistral("[USER] [/USER] [SYSTEM] [/SYSTEM] [CALLS] [RESULT] [/RESULT]"), "</s>"),
    "no_system": (no_system, "<|endoftext|>"),
    "generation": (marked, "<|eot|>"),
    "channel": (harmony, "<|return|> <|call|> <|endoftext|>"),
}  # fmt: skip


def write_tokenizer(name, folder):
    make, ends = FAMILIES[name]
    made, config = make()
    made.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    ends = [made.token_to_id(e) for e in ends.split()]
    generation = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    template = (HERE / f"{name}.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)


def case(text, row, length, open_turn, **variables):
    """One case of golden.json, without its dialogue."""
    out = {"length": length, "generation_prompt": open_turn}
    if variables:
        out["variables"] = variables
    given = {k: row[k] for k in ("tools", "documents") if k in row}
    given |= row.get("variables", {}) | variables
    given |= {"add_generation_prompt": open_turn}
    messages = row["messages"][:length]
    try:
        out["text"] = text.apply_chat_template(messages, tokenize=False, **given)
    except jinja2.TemplateSyntaxError:
        raise  # a mistake in the template, no refusal
    except (jinja2.TemplateError, TypeError) as e:
        return out | {"refused": str(e)}
    marked = "{% generation %}" in text.chat_template
    made = text.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=marked, **given
    )
    out["ids"] = made["input_ids"]
    if marked:
        out["mask"] = "".join(map(str, made["assistant_masks"]))
    return out


def cases(text, dialogues):
    template = text.chat_template
    switches = [{}]
    if "enable_thinking" in template:
        switches += [{"enable_thinking": False}, {"enable_thinking": True}]
    reads_lists = re.search(r"for (part|item) in \S*content", template)
    for name, row in dialogues.items():
        messages = row["messages"]
        if not reads_lists and any(isinstance(m["content"], list) for m in messages):
            continue
        roles = [m["role"] for m in messages]
        answered = roles[-1] == "assistant"
        prompt = len(messages) - answered
        for switch in switches if name != "variables" else [{}]:
            if not switch:
                yield {"dialogue": name} | case(text, row, len(messages), False)
            yield {"dialogue": name} | case(text, row, prompt, True, **switch)


def pack(folder, target):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for file in sorted(folder.iterdir()):
            info = zipfile.ZipInfo(file.name, (2024, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(info, file.read_bytes())


def main():
    dialogues = json.loads((HERE / "dialogues.json").read_text())
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            write_tokenizer(name, folder)
            text = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            made = list(cases(text, dialogues))
            packed = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
            (folder / "golden.json").write_text(packed)
            pack(folder, HERE / f"{name}.zip")
        refused = sum("refused" in c for c in made)
        size = (HERE / f"{name}.zip").stat().st_size
        print(f"{name}: {len(made)} cases, {refused} refused, {size} bytes")


if __name__ == "__main__":
    main()
