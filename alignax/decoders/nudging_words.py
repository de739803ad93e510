"""Nudging word by word: two models that share no vocabulary exchange text.

  the nudging model writes a few words; the first is taken, and more of them, but the last,
      until    max p_base(· | text) >= γ
      or       the base's first token, with its blank, begins the next word
  the base then gives that first token, and goes on greedily up to the next token with
      max p_base < γ
  and so on, until the nudging model ends the response

A single word is taken without a call of the base, which gives nothing in that round. The
same words for the fourth time in a row end the response.

Fei et al. 2024, https://arxiv.org/abs/2410.09300 (γ = 0.4). `decoders.nudging` works token
by token, for models that share a vocabulary.

Differs from the paper: what it leaves open is as in its code,
https://github.com/fywalter/nudging: the base's first token is accepted even below γ, a
single word is not judged, blanks count, the last word is compared, and four equal nudges end
the response. Unlike that code, the limit is in the base's tokens, the nudging model gets the
text of the base's prompt, blanks around the response are kept, and a chunk goes on to the
end of its last character: none is divided between the two models.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from alignax.batch import LM, from_groups
from alignax.sampling import automaton, decode, generation_settings
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated
from alignax.search import hypotheses
from alignax.text import tokenizer as tokenizers
from alignax.text.tokenizer import Tokenizer

RANGES = {
    "gamma": "[0, inf)", "chunk": "[1, inf)", "rounds": "[1, inf)", "repeats": "[1, inf)",
}  # fmt: skip
REPEATED = 30  # characters: a longer ending that is repeated is kept once
KNOWN = 5  # words: a longer chunk of the base that repeats earlier text is dropped
CHARACTER = 4  # bytes of the longest character, and so most tokens of one
PART = "\ufffd"  # how a tokenizer shows a part of a character
SPECIALS = False  # responses are text: no stop can be a special token


class Continuation(NamedTuple):
    """Greedy next tokens of a model."""

    ids: list[int]
    probabilities: list[float]  # of each, which is the best one, and of EOS
    ended: bool  # by EOS, which is not among them


class Speaker(NamedTuple):
    """A model that continues a text, with what it was asked."""

    lm: LM
    tokens: Tokenizer
    asked: list[int]  # ids of the prompt
    eos: list[int]
    chunk: int  # tokens of a call
    stats: dict[str, Any]  # 'tokens_sampled' is counted


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
    stops: Automaton | None = None,
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
      stops: over the base's vocabulary; no round begins behind one.
      tokenizer: the base's.
      nudge: name of the nudging model.
      nudge_tokenizer: a path of its tokenizer, with its chat template; '' is the base's.
      gamma: γ; even at 0 the first word of each round is the nudging model's.
      chunk: most tokens per call of either model, but up to three more where they complete
        a character.
      rounds: most of them.
      repeats: the response ends if the nudging model repeats its last words this often.

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
    prompts, lengths = np.asarray(prompts), np.asarray(lengths)
    generation_settings.check_prompts(jnp.asarray(prompts), jnp.asarray(lengths))
    asked, responses, truncated = [], [], []
    for row, n in zip(prompts, lengths, strict=True):
        ids = row[:n].tolist()
        answer, nudged, ended = _talk(
            Speaker(lm, text, ids, ends[0], chunk, stats),
            Speaker(lms[nudge], other, other.prompt(text.decode(ids)), ends[1], chunk, stats),
            gamma, max_new, rounds, repeats, stops,
        )  # fmt: skip
        stats["nudged"] += nudged / max(len(answer), 1) / len(prompts)
        answer = once(answer)
        response = [*text.encode(answer), *([ends[0][0]] if ended and ends[0] else [])]
        asked.append(ids)
        responses.append([response[:max_new] or [text.eos_id]])
        truncated.append([not ended or len(response) > max_new])
    batch = from_groups(asked, responses, length=prompts.shape[1] + max_new)
    raw = hypotheses.score(lm, jax.tree.map(jnp.asarray, batch)).logps
    return Generated(batch, raw, jnp.array(truncated), stats)


def _talk(
    base: Speaker,
    nudge: Speaker,
    gamma: float,
    max_new: int,
    rounds: int,
    repeats: int,
    stops: Automaton | None,
) -> tuple[str, int, bool]:
    """(the response, characters of the nudging model, whether that model ended it)."""
    answer, nudged, before, same = "", 0, "", 0
    for _ in range(rounds):
        ids = base.tokens.encode(answer)
        if len(ids) >= max_new or (stops and automaton.stopped(stops, ids)):
            break
        base.stats["rounds"] += 1
        said = continuation(nudge, answer)
        words = after(nudge.tokens, answer, said.ids)
        if said.ended:
            return answer + words, nudged + len(words), True
        taken, follows = nudges(words, base, answer, gamma)
        same = same + 1 if taken == before else 0
        if not taken or same >= repeats:
            break
        before = taken
        answer, nudged = answer + taken, nudged + len(taken)
        answer += own(base, answer, follows, gamma, max_new)
    return answer, nudged, False


def continuation(who: Speaker, answer: str) -> Continuation:
    """The next tokens of a model after the response so far, up to a whole character."""
    front = [*who.asked, *who.tokens.encode(answer)]
    ids, best, ended = _draw(who, front)
    for _ in range(CHARACTER - 1):
        if ended or not after(who.tokens, answer, ids).endswith(PART):
            break
        more = _draw(who, [*front, *ids])
        for n in range(1, len(more.ids) + 1):
            if not after(who.tokens, answer, [*ids, *more.ids[:n]]).endswith(PART):
                return Continuation(
                    ids + more.ids[:n], best + more.probabilities[:n], False
                )
        ids, best, ended = ids + more.ids, best + more.probabilities, more.ended
    return Continuation(ids, best, ended)


def _draw(who: Speaker, front: list[int]) -> Continuation:
    """The next tokens, at most `chunk`."""
    tokens, size = generation_settings.ragged([front])
    out = decode.generate(
        who.lm, tokens, size, jax.random.key(0), max_new=who.chunk, temperature=0.0,
        eos_ids=who.eos,
    )  # fmt: skip
    mask = np.asarray(out.batch.mask[0, 0])
    new = np.asarray(out.batch.tokens[0, 0])[mask].tolist()
    best = np.exp(np.asarray(out.raw_logps[0, 0])[mask]).tolist()
    ended = bool(new) and new[-1] in who.eos
    who.stats["tokens_sampled"] += len(new)
    return Continuation(new[:-1] if ended else new, best, ended)


def nudges(
    words: str, base: Speaker, answer: str, gamma: float
) -> tuple[str, Continuation]:
    """The words that are taken, and the base's continuation of them.

    Args:
      words: of the nudging model, divided by blanks.
      base: the base.
      answer: the response in front of the words.
      gamma: γ.

    Returns:
      The words, and the continuation, of which the first token is accepted; it has no ids
      if the base is not asked, unsure behind all of the words, or has nothing to say.
    """
    blanks = len(words) - len(words.lstrip(" "))
    parts = words[blanks:].split(" ")
    nothing = Continuation([], [], False)
    if len(parts) == 1:
        return words, nothing
    for n, following in enumerate(parts[1:], 1):
        if not following:  # of several blanks
            continue
        taken = " " * blanks + " ".join(parts[:n])
        said = continuation(base, answer + taken)
        size = first_character(base.tokens, answer + taken, said.ids)
        first = after(base.tokens, answer + taken, said.ids[:size])
        unsure = bool(said.probabilities) and said.probabilities[0] < gamma
        if not unsure or (first and (" " + following).startswith(first)):
            return taken, said
    return " " * blanks + " ".join(parts[:-1]), nothing


def first_character(tokens: Tokenizer, text: str, ids: Sequence[int]) -> int:
    """The fewest ids behind a text that end with a whole character; all if none do."""
    every = after(tokens, text, ids)
    for n in range(1, len(ids)):
        some = after(tokens, text, ids[:n])
        if some and every.startswith(some):
            return n
    return len(ids)


def last_character(
    tokens: Tokenizer, text: str, ids: Sequence[int], most: int
) -> int:  # fmt: skip
    """The most ids behind a text, at most `most`, that end with a whole character."""
    every = after(tokens, text, ids)
    for n in range(most, 0, -1):
        if every.startswith(after(tokens, text, ids[:n])):
            return n
    return 0


def own(
    base: Speaker, answer: str, said: Continuation, gamma: float, max_new: int
) -> str:
    """What the base adds to the response by itself.

    Args:
      base: the base.
      answer: the response so far.
      said: its continuation, of which the first token is accepted, or no ids.
      gamma: γ; it goes on up to a token of which it is less sure.
      max_new: most tokens of the response.
    """

    tokens, out = base.tokens, ""
    skip = first_character(tokens, answer, said.ids)
    while said.ids:
        text, ids = answer + out, said.ids
        sure = [p >= gamma or n < skip for n, p in enumerate(said.probabilities)]
        many = sure.index(False) if False in sure else len(ids)
        kept = last_character(tokens, text, ids, many)
        given = after(tokens, text, ids[:skip])
        rest = after(tokens, text, ids).removeprefix(given)
        more = after(tokens, text, ids[:kept]).removeprefix(given)
        out += given
        known = len(more.split(" ")) > KNOWN and more in answer + out
        if not rest or rest in out or known:
            break
        out, skip = out + more, 0
        if many < len(ids) or said.ended:
            break
        if len(tokens.encode(answer + out)) >= max_new:
            break
        said = continuation(base, answer + out)
    return out


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
