"""The tokenizers of `golden/templates`, dialogues for them at random, and how to ask them."""

import functools
import pathlib
import tempfile
import zipfile

from hypothesis import strategies as st

from alignax.text import tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden" / "templates"
FAMILIES = sorted(p.stem for p in GOLDEN.glob("*.zip"))
PIECES = (
    "Hello", "two plus two", "four", "é", "東", "a\u0301", " ", "  ", "\n", "\n\n", "\t", "x",
    "<think>", "</think>", "<think>\n\n</think>\n\n", "<|im_end|>", "<|im_start|>assistant\n",
    "<|eot_id|>", "</s>", "<s>", "<eos>", "<end_of_turn>", "<|end|>", "[INST]", "[/USER]",
    "<tool_response>", "{", "%s", "{0}", "{{ x }}", "<b>&", "\r\n", "\u2028", "\u00a0",
)  # fmt: skip
EDGES = (
    "",
    " ",
    "\n",
    "\n\n  ",
    "user",
    "assistant",
    "\ue000",
    "0",
    "</think>",
    " \ue0000\ue001 ",
)


@functools.cache
def load(family):
    """The tokenizer of a family, or of 'bytes'."""
    if family == "bytes":
        return tokenizer.load("bytes")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(GOLDEN / f"{family}.zip") as packed:
            packed.extractall(folder)
        return tokenizer.load(folder)


def source(family):
    return (GOLDEN / f"{family}.jinja").read_text()


def texts():
    """Texts with blanks, control tokens, marks of thoughts and of templates."""
    mixed = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
    return st.one_of(
        st.sampled_from(EDGES), mixed, st.text(max_size=8).filter(encodable)
    )


def encodable(text):
    return not any("\ud800" <= c <= "\udfff" for c in text)


def role(role, content, **more):
    return {"role": role, "content": content, **more}


user = functools.partial(role, "user")
assistant = functools.partial(role, "assistant")
system = functools.partial(role, "system")
