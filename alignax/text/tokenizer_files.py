"""A tokenizer as the files of a Hugging Face folder, which transformers reads again.

Also whether the ids of two tokenizers mean the same tokens.
"""

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from alignax.models.save import TOKENIZER_FILES
from alignax.text.tokenizer import Tokenizer


def files(text: Tokenizer) -> dict[str, bytes]:
    """{name: content} of a tokenizer, with the ids that end and begin a text.

    The files of a Hugging Face folder are copied as they are, whatever was changed in
    `text`; for a .gguf file and for 'bytes' they
    are made. generation_config.json keeps what it says there, with the EOS ids of `text`.

    Args:
      text: from `tokenizer.load`.
    """
    folder = pathlib.Path(text.path)
    found = {}
    if text.path and (folder / "tokenizer.json").is_file():
        found = {n: folder / n for n in TOKENIZER_FILES if (folder / n).is_file()}
        out = {name: path.read_bytes() for name, path in found.items()}
    else:
        out = made(text)
    kept = folder / "generation_config.json"
    generation = json.loads(kept.read_text()) if found and kept.is_file() else {}
    generation |= {"eos_token_id": sorted(text.eos_ids), "pad_token_id": text.pad_id}
    if text.bos_id is not None:
        generation["bos_token_id"] = text.bos_id
    return out | {"generation_config.json": _json(generation)}


def made(text: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer that was not read from a Hugging Face folder."""
    core = as_core(text)
    if text.add_bos and text.bos_id is not None:
        # transformers adds BOS by the post-processor; alignax adds it by `add_bos`
        bos = text.specials["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, text.bos_id)],
        )  # fmt: skip
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": text.add_bos,
        "clean_up_tokenization_spaces": False,
        **text.specials,
    }
    if text.chat_template:
        config["chat_template"] = text.chat_template
    return {
        "tokenizer.json": core.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(config),
    }


def as_core(text: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as the library `tokenizers` has it."""
    if text._definition is not None:
        return tokenizers.Tokenizer.from_str(text._definition())
    # bytes: a byte-level vocabulary without merges, in which an id is its byte
    alphabet = {chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    names, spare = {}, 256
    for byte in range(256):
        if chr(byte) in alphabet:
            names[chr(byte)] = byte
        else:  # the stand-ins of GPT-2 for bytes that cannot be printed, in their order
            names[chr(spare)] = byte
            spare += 1
    core = tokenizers.Tokenizer(models.BPE(vocab=names, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = decoders.ByteLevel()
    ids = {"bos_token": text.bos_id, "eos_token": text.eos_id, "pad_token": text.pad_id}
    for name, _ in sorted(ids.items(), key=lambda item: item[1] or 0):
        core.add_special_tokens([text.specials[name]])
    return core


def difference(one: Tokenizer, other: Tokenizer) -> str:
    """The first id that means different tokens; '' if there is none.

    Only ids that both have are compared. One tokenizer may have more of them (an added pad
    token, the tokens of a later release), other merges, or another template.

    Args:
      one: from `tokenizer.load`.
      other: likewise.
    """
    if one._vocab_hash == other._vocab_hash:
        return ""
    ours, theirs = _tokens(one), _tokens(other)
    for i in sorted(ours.keys() & theirs.keys()):
        if ours[i] != theirs[i]:
            return f"id {i} is {ours[i]!r} in {one.path or 'bytes'} and {theirs[i]!r} in {other.path or 'bytes'}"
    return ""


def _tokens(text: Tokenizer) -> dict[int, str]:
    vocabulary = as_core(text).get_vocab(with_added_tokens=True)
    return {i: token for token, i in vocabulary.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
