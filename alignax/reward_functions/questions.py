"""Questions to an LM with two answers: which one it gives, as log-odds.

  log-odds = log P(first answer | question) - log P(second answer | question)

Both answers are scored by the kernel; nothing is sampled. `quoted_difference` asks which of
two documents the LM would rather repeat, which it reads by PINE, whatever their order.
"""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from alignax import logprob
from alignax.batch import LM, Example, Message
from alignax.inputs.detokenize import retokenize
from alignax.models import pine, transformer
from alignax.records import messages
from alignax.text import tokenizer as tokenizers
from alignax.text.documents import SEPARATOR, pieces
from alignax.text.tokenizer import Tokenizer

# `logprob.score` where a reward is given no scorer of the run's devices
one_device = jax.jit(logprob.score, static_argnames=("needs",))
NAMES = {"system": "Instructions", "user": "User", "assistant": "Assistant"}


def log_odds(
    lm: LM, questions: Sequence[str], answers: tuple[str, str], *,
    tokenizer: Tokenizer, score: Callable | None = None, chunk: int = 16,
) -> Float[np.ndarray, " N"]:  # fmt: skip
    """Log-odds of the first answer against the second, to each question.

    Args:
      lm: reads ids of `tokenizer`: see `reader`.
      questions: user turns. One that is too long loses its beginning.
      answers: what the LM may say, such as 'A' and 'B'; the end of the turn does not count.
      tokenizer: of the LM.
      score: `logprob.score` over the run's devices; one device by default.
      chunk: questions that are scored together.

    Returns:
      [N] nats.
    """
    out, chunk = [], max(1, min(chunk, len(questions)))
    for start in range(0, len(questions), chunk):
        some = list(questions[start : start + chunk])
        filled = some + some[:1] * (chunk - len(some))  # one shape, few compilations
        batch = retokenize(
            filled, [list(answers)] * chunk, np.ones((chunk, 2), bool), tokenizer,
            length=lm.config.max_length,
        )  # fmt: skip
        ends = np.isin(np.asarray(batch.tokens), [*tokenizer.eos_ids])
        mask: Any = np.asarray(batch.mask) & ~ends
        logps = (score or one_device)(lm, batch._replace(mask=mask)).logps
        total = np.asarray(logps, np.float64).sum(-1)[: len(some)]
        out.append(total[:, 0] - total[:, 1])
    return np.concatenate(out) if out else np.zeros(0)


def quoted_difference(
    lm: LM, questions: Sequence[tuple[str, str, str, str]], *, tokenizer: Tokenizer
) -> Float[np.ndarray, " N"]:
    """How much rather the LM repeats the first of two documents than the second, by PINE.

    One row after the other, without a mesh: for a few pairs, on one host.

    Args:
      lm: a model without local layers, which reads ids of `tokenizer`.
      questions: (what stands before, first document, second document, what stands behind),
        together a user turn, each as `plain` leaves it. The reply is one of the documents.
      tokenizer: of the LM.

    Returns:
      [N] mean log-probability per token of the first document as the reply, less that of
      the second, in nats. Exchanged documents change the sign, up to rounding.

    Raises:
      ValueError: an empty document, a question that is too long, a model with local
        layers, or several hosts.
    """
    if jax.process_count() > 1:
        raise ValueError("questions by PINE are asked on one host")
    return np.array([_quoted(lm, q, tokenizer) for q in questions])


def plain(text: str, tokenizer: Tokenizer) -> str:
    """A text without separators of documents and names of control tokens."""
    marks = {SEPARATOR, *tokenizer.encoder.control} - {""}
    while found := [mark for mark in marks if mark in text]:  # cut, parts may form one
        for mark in found:
            text = text.replace(mark, "")
    return text


def _quoted(lm: LM, question: tuple[str, ...], tokenizer: Tokenizer) -> float:
    asked = SEPARATOR.join(question)
    ids = tokenizer.prompt(Example("", asked, ()))
    prefix, *documents, suffix = pieces(tokenizer, ids, separator=SEPARATOR)
    found = []
    for reply in documents:
        row = sum(map(len, (prefix, *documents, suffix, reply)))
        if row > lm.config.max_length:
            raise ValueError(
                f"a question with two documents has {row} tokens, and the LM that reads it "
                f"{lm.config.max_length}"
            )
        size = 1 << (row - 1).bit_length()  # few compilations
        tokens, layout = pine.lay(prefix, documents, [*suffix, *reply], size)
        before_reply = jnp.arange(row - len(reply) - 1, row - 1)
        filled = jnp.zeros(size, jnp.int32).at[: len(tokens)].set(tokens)
        h = pine.hidden(lm, filled, layout)[before_reply]
        logps = logprob.token_logps(transformer.unembed(lm, h), jnp.asarray(reply))
        found.append(float(np.asarray(logps, np.float64).mean()))
    return found[0] - found[1]


def reader(
    lms: Mapping[str, LM], name: str, tokenizer: Tokenizer | None, *, who: str
) -> tuple[LM, Tokenizer]:
    """An LM as one that reads ids, and its tokenizer.

    Args:
      lms: frozen LMs by name.
      name: of the LM.
      tokenizer: of the run, which is that of an LM without one of its own.
      who: asks for it, for messages.

    Raises:
      ValueError: no such LM, or the tokenizer is not given.
    """
    if name not in lms:
        raise ValueError(
            f"{who} needs an LM {name!r}; there are {sorted(lms)}: set config.lms.{name} "
            "to a path, or to 'init' for the policy as it is at the start"
        )
    if tokenizer is None:
        raise ValueError(f"{who} reads the tokenizer, which is not given here")
    lm = lms[name]
    if not lm.config.tokenizer:
        return lm, tokenizer
    own = load_tokenizer(lm.config.tokenizer, tokenizer.now)
    return LM(dataclasses.replace(lm.config, tokenizer=""), lm.params), own


@functools.lru_cache(maxsize=8)
def load_tokenizer(path: str, now: datetime.datetime) -> Tokenizer:
    """A tokenizer, read once; `now` is what its chat template prints as the date."""
    return tokenizers.load(path, now=now)


def transcript(prompt: str | Sequence[Message]) -> str:
    """A prompt as text for a question: who said what, a turn after the other."""
    if isinstance(prompt, str):
        return f"User: {prompt}"
    return "\n\n".join(
        f"{NAMES.get(turn['role'], turn['role'])}: "
        f"{messages.text({'content': None, **turn})}"
        for turn in prompt
    )
