"""A tokenizer written as a Hugging Face folder gives the same ids when it is read again."""

import datetime
import json

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from alignax.text import tokenizer, tokenizer_files

NOW = datetime.datetime(2024, 7, 26)
TEXTS = (
    "",
    "a",
    " 12 a\n\n",
    "<bos>a<eos>",
    "Grüße, 東京 \x00\t!",
    "\u2028 ''",
    "é" * 3,
)


def ggml(**changes):
    """The fields of a .gguf file with a byte-level vocabulary and four merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ċ Ċ", "1 2", "12 3", "Ġ a"]
    tokens = ["<bos>", "<eos>", "<tool>", *letters]
    tokens += [m.replace(" ", "") for m in merges]
    types = [3, 3, 4] + [1] * (len(tokens) - 3)
    fields = dict(
        model="gpt2", pre="smollm", tokens=tokens, merges=merges, token_type=types,
        bos_token_id=0, eos_token_id=1, padding_token_id=1,
    )  # fmt: skip
    return fields | changes


MADE = {
    "bytes": lambda: tokenizer.load("bytes", now=NOW),
    "gguf": lambda: tokenizer.from_ggml(ggml(), "{{ messages }}", now=NOW),
    "gguf with BOS": lambda: tokenizer.from_ggml(
        ggml(add_bos_token=True), None, now=NOW
    ),
    "gguf of Llama": lambda: tokenizer.from_ggml(ggml(pre="llama-bpe"), None, now=NOW),
    "gguf with a second EOS": lambda: tokenizer.from_ggml(
        ggml(eot_token_id=2), None, now=NOW
    ),
}


def written(text, folder):
    folder.mkdir()
    for name, content in tokenizer_files.files(text).items():
        (folder / name).write_bytes(content)
    return tokenizer.load(folder, now=NOW)


@pytest.mark.parametrize("name", MADE)
def test_ids_and_specials_survive(name, tmp_path):
    text = MADE[name]()
    again = written(text, tmp_path / "hf")
    for sample in TEXTS:
        assert again.encode(sample) == text.encode(sample) or name == "bytes"
    for sample in TEXTS[:3] + TEXTS[4:]:  # 'bytes' has no text for its specials
        assert again.encode(sample) == text.encode(sample)
        assert again.decode(text.encode(sample)) == text.decode(text.encode(sample))
    for field in ("vocab_size", "eos_ids", "eos_id", "bos_id", "pad_id", "add_bos", "chat_template"):  # fmt: skip
        assert getattr(again, field) == getattr(text, field), field
    twice = written(again, tmp_path / "again")  # now its files are copied
    assert twice.fingerprint == again.fingerprint


def test_transformers_adds_bos_where_alignax_does(tmp_path):
    """By the post-processor, which transformers applies and alignax does not."""
    for name, ids in (("gguf with BOS", [0]), ("gguf", [])):
        text = MADE[name]()
        written(text, tmp_path / name)
        core = tokenizers.Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        assert core.encode("a").ids == [*ids, *text.encode("a")]


def test_the_ids_that_end_a_response_are_in_the_generation_config(tmp_path):
    text = MADE["gguf with a second EOS"]()
    made = json.loads(tokenizer_files.files(text)["generation_config.json"])
    assert made == {"eos_token_id": [1, 2], "pad_token_id": 1, "bos_token_id": 0}
