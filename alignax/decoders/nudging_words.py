"""Nudging word by word: two models that share no vocabulary exchange text.

  the nudging model writes a few words; the first is taken, and more of them while
      max p_base(· | text) < γ   and the base would not begin the next word itself
  the base goes on, greedily, up to its first token with max p_base < γ
  and so on, until the nudging model ends the response

Fei et al. 2024, https://arxiv.org/abs/2410.09300 (γ = 0.4). `decoders.nudging` works
token by token, for models that share a vocabulary.

Differs from the paper: the last of several words is left for the next round, because the
limit of tokens may have cut it off; the nudging model gets the text of the base's prompt.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from alignax.batch import LM, from_groups
from alignax.sampling import decode, generation_settings
from alignax.sampling.decode import Generated
from alignax.search import hypotheses
from alignax.text import tokenizer as tokenizers
from alignax.text.tokenizer import Tokenizer

RANGES = {
    "gamma": "[0, inf)", "chunk": "[1, inf)", "rounds": "[1, inf)", "repeats": "[1, inf)",
}  # fmt: skip
REPEATED = 30  # characters: a longer ending that is repeated is kept once
KNOWN = 5  # words: a longer chunk of the base that repeats earlier text is dropped
SPECIALS = False  # responses are text: no stop can be a special token


class Continuation(NamedTuple):
    """Greedy next tokens of a model."""

    ids: list[int]
    probabilities: list[float]  # of each, which is the best one
    ended: bool  # by EOS, which is not among them


def search(
    lm: LM,
    lms: dict[str, LM],
    prompts: Any,
    lengths: Any,
    key: Array,
    *,
    max_new: int,
    judge: Any = None,
    temperature: float = 1.0,
    eos_ids: Sequence[int] = (),
    tokenizer: Tokenizer | None = None,
    nudge: str = "nudge",
    nudge_tokenizer: str = "",
    gamma: float = 0.4,
    chunk: int = 16,
    rounds: int = 150,
    repeats: int = 3,
) -> Generated:
    """Nudging across tokenizers. *Approximate*: greedy text, which has no distribution.

    Args:
      lm: the base.
      lms: has the nudging model.
      prompts: ids [B, P] of the base, right-padded.
      lengths: real tokens of each prompt, [B].
      key: not used: nothing is random.
      max_new: most tokens of a response, in the base's tokens.
      judge: not used.
      temperature: not used: both models are greedy.
      eos_ids: end a chunk of either model; the base's do not end the response.
      tokenizer: the base's.
      nudge: name of the nudging model.
      nudge_tokenizer: a path of its tokenizer, with its chat template; '' is the base's.
      gamma: γ; even at 0 the first word of each round is the nudging model's.
      chunk: most tokens per call of either model.
      rounds: most of them.
      repeats: the response ends if the nudging model gives the same words this often in
        a row.

    Returns:
      Generated, G = 1, in the base's tokens; old_logps is None. stats: 'tokens_sampled',
      'judge_calls' (0), 'rounds' and 'nudged' (share of the nudging model's characters).

    Raises:
      ValueError: an argument out of its range, no such model, or no tokenizer.
    """
    del judge, temperature
    if min(chunk, rounds, repeats) < 1 or gamma < 0:
        raise ValueError(
            f"chunk={chunk}, rounds={rounds}, repeats={repeats}, gamma={gamma}; expected "
            "gamma >= 0, the others >= 1"
        )
    if max_new < 1:
        raise ValueError(f"max_new={max_new}, expected at least 1")
    if nudge not in lms:
        raise ValueError(f"no LM {nudge!r}; there are {sorted(lms)}")
    if tokenizer is None:
        raise ValueError("nudging_words exchanges text: it needs the tokenizer")
    text, other = tokenizer, tokenizer
    if nudge_tokenizer:
        other = tokenizers.load(nudge_tokenizer)
    ends = sorted(eos_ids), sorted(other.eos_ids if nudge_tokenizer else eos_ids)
    stats = {"tokens_sampled": 0, "judge_calls": 0, "rounds": 0, "nudged": 0.0}

    def continuation(model, ids, eos) -> Continuation:
        tokens, size = generation_settings.ragged([ids])
        out = decode.generate(
            model, tokens, size, key, max_new=chunk, temperature=0.0, eos_ids=eos
        )
        mask = np.asarray(out.batch.mask[0, 0])
        new = np.asarray(out.batch.tokens[0, 0])[mask].tolist()
        best = np.exp(np.asarray(out.raw_logps[0, 0])[mask]).tolist()
        ended = bool(new) and new[-1] in eos
        stats["tokens_sampled"] += len(new)
        return Continuation(new[:-1] if ended else new, best[: len(new) - ended], ended)

    def one(prompt: list[int]) -> tuple[str, bool]:
        """(the response, whether the nudging model ended it)."""
        asked = other.prompt(text.decode(prompt))
        answer, nudged, ended, last = "", 0, False, [""] * repeats
        for _ in range(rounds):
            if len(text.encode(answer)) >= max_new:
                break
            stats["rounds"] += 1
            from_nudge = continuation(
                lms[nudge], [*asked, *other.encode(answer)], ends[1]
            )
            words = after(other, answer, from_nudge.ids)
            if from_nudge.ended:
                answer, nudged, ended = answer + words, nudged + len(words), True
                break
            taken, base = nudges(
                words,
                lambda w, a=answer: continuation(lm, [*prompt, *text.encode(a + w)], ends[0]),
                lambda ids, a=answer: after(text, a, ids), gamma,
            )  # fmt: skip
            last = [*last[1:], taken]
            if not taken or (last[0] and len(set(last)) == 1):
                break
            answer, nudged = answer + taken, nudged + len(taken)
            while base.ids:
                sure = [p >= gamma for p in base.probabilities]
                many = sure.index(False) if False in sure else len(sure)
                more = after(text, answer, base.ids[:many])
                if len(more.split()) > KNOWN and more.strip() in answer:
                    break
                answer += more
                whole = many == chunk and not base.ended
                if not whole or len(text.encode(answer)) >= max_new:
                    break
                base = continuation(lm, [*prompt, *text.encode(answer)], ends[0])
        stats["nudged"] += nudged / max(len(answer), 1) / len(prompts)
        return once(answer), ended

    prompts, lengths = np.asarray(prompts), np.asarray(lengths)
    generation_settings.check_prompts(jnp.asarray(prompts), jnp.asarray(lengths))
    asked, responses, truncated = [], [], []
    for row, n in zip(prompts, lengths, strict=True):
        ids = row[:n].tolist()
        answer, ended = one(ids)
        response = [*text.encode(answer), *([ends[0][0]] if ended and ends[0] else [])]
        asked.append(ids)
        responses.append([response[:max_new] or [text.eos_id]])
        truncated.append([not ended or len(response) > max_new])
    batch = from_groups(asked, responses, length=prompts.shape[1] + max_new)
    raw = hypotheses.score(lm, jax.tree.map(jnp.asarray, batch)).logps
    return Generated(batch, raw, jnp.array(truncated), stats)


def nudges(words: str, base, read, gamma: float) -> tuple[str, Continuation]:
    """The words that are taken, and the base's continuation of them.

    Args:
      words: of the nudging model.
      base: (some of the words) -> the base's continuation.
      read: (ids of the base) -> their text.
      gamma: γ.
    """
    parts = re.findall(r"\s*\S+", words) or ([words] if words else [])
    parts = parts[:-1] if len(parts) > 1 else parts
    taken = ""
    for i, part in enumerate(parts):
        taken += part
        next_tokens = base(taken)
        unsure = bool(next_tokens.ids) and next_tokens.probabilities[0] < gamma
        following = parts[i + 1].strip() if i + 1 < len(parts) else ""
        first = read(next_tokens.ids[:1]).strip() if next_tokens.ids else ""
        if not unsure or (first and following.startswith(first)):
            break
    return taken, next_tokens if taken else Continuation([], [], False)


def after(tokens: Tokenizer, text: str, ids: Sequence[int]) -> str:
    """The text that ids add to a text; some tokenizers drop a blank at the beginning."""
    before = tokens.encode(text)
    return tokens.decode([*before, *ids]).removeprefix(tokens.decode(before))


def once(text: str) -> str:
    """A text without repetitions of a long ending."""
    for n in range(len(text) // 2, REPEATED - 1, -1):
        while len(text) >= 2 * n and text[-n:] == text[-2 * n : -n]:
            text = text[:-n]
    return text
