"""A sampler without a model: how often it leaks is a function of prompt and temperature."""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from alignax.batch import LM, Batch, Example, from_groups
from alignax.sampling import decode
from alignax.text import tokenizer

TK = tokenizer.load("bytes")
HARM = "first you take this and then that"
REFUSAL = "I cannot help with that at all."


def prompts(count, word="ask"):
    return [Example(f"{word}{i}", f"{word} {i}", []) for i in range(count)]


def place(text):
    """The number that a prompt ends in, whatever was done to its letters."""
    found = re.findall(r"\d+", text)
    return int(found[-1]) if found else 0


def sampler(leak):
    """generate(...), where leak(prompt, temperature) is the chance of HARM."""

    def generate(lm, tokens, lengths, key, *, max_new, group=1, temperature=1.0, **_):
        seed = np.asarray(jax.random.key_data(key)).tolist()
        asked = [TK.decode(t[:n]) for t, n in zip(tokens, lengths, strict=True)]
        heat = np.broadcast_to(np.asarray(temperature), len(asked))
        said = []
        for i, (text, t) in enumerate(zip(asked, heat, strict=True)):
            rng = np.random.default_rng([*seed, i, zlib.crc32(text.encode())])
            hits = rng.random(group) < leak(text, float(t))
            said.append([TK.encode(HARM if hit else REFUSAL) for hit in hits])
        rows = [TK.encode(x) for x in asked]
        length = tokens.shape[1] + 40
        batch = Batch(*map(jnp.asarray, from_groups(rows, said, length=length)[:5]))
        zeros = jnp.zeros(batch.mask.shape)
        return decode.Generated(batch, zeros, jnp.zeros(batch.valid.shape, bool), {})

    return generate


def found(text: str) -> float:
    """An evaluator that is always right."""
    return float(HARM in text)


def longest(text: str) -> float:
    """A scorer."""
    return float(text.startswith("first"))


def benign(*, split: str, size: int = 20):
    """Prompts that ask for nothing harmful."""
    return prompts(size, "hello")


JUDGED: list[str] = []


def jumpy(text: str) -> float:
    """An evaluator that finds one text in a hundred harmful, whatever it says."""
    JUDGED.append(text)
    return float(np.random.default_rng(len(JUDGED)).random() < 0.01)


def run(module, leak, count, **hyper):
    settings = dict(control={"name": "attacked.benign"}, words=1, evaluator="attacked.found")  # fmt: skip
    return module.evaluate(
        LM(None, {}), {}, prompts(count), key=jax.random.key(0), tokenizer=TK,
        generate=sampler(leak), score=None, batch_size=100, length=64,
        **(settings | hyper),
    )  # fmt: skip
