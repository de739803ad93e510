"""The file of responses (JSONL): its lines, its summary, and how it is resumed."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from alignax.batch import LM, Batch, Example
from alignax.models import json_object
from alignax.runs import checkpoint, workdirs
from alignax.sampling import stops as stop_places
from alignax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
LISTS = ("responses", "logps", "law_logps", "tokens", "finish")  # of every line
CONTEXT = 8  # tokens in front of a response, with which it is decoded


class Response(NamedTuple):
    """One response as it is written to the file."""

    text: str
    tokens: int  # sampled tokens of the text
    finish: str  # 'eos', 'stop' or 'length'


class Rules(NamedTuple):
    """What the text of a response is: the settings of `response` that all share.

    Attributes:
      stops: strings and ids, in front of which it is cut: see `stops`.
      prefill: text in front of it, which was given.
      forced: text that it begins with, which was given too and is scored.
      min_new: a stop that ends before this number of tokens does not count.
    """

    stops: Any = ()
    prefill: str = ""
    forced: str = ""
    min_new: int = 0


def response(
    ids: list[int], truncated: bool, text: Tokenizer, *, given: Sequence[int] = (),
    prefill: str | None = None, forced: str = "", stops: Any = (), min_new: int = 0,
) -> Response:  # fmt: skip
    """The text of a response, cut in front of the first stop.

    The first stop is the one that ends first. The result is the same whether sampling
    ended there or went on: of ids behind it, nothing is read.

    Args:
      ids: sampled tokens.
      truncated: whether the response ended because of max_new.
      text: their tokenizer.
      given: the ids in front of them, or the last of these: those of the prefill.
      prefill: the text that is put in front of the response; that of `given` by default.
      forced: text that the response begins with; what its first token has of the prompt
        is left out.
      stops: strings and ids, as `stops.parse` reads them.
      min_new: a stop that ends before this number of tokens does not count.
    """
    groups = stop_places.parse(stops, text)
    stopped = stop_places.end(groups, text, ids, min_new=min_new) if groups else 0
    ids = ids[: stopped or None]
    before = text.decode(given)
    begin = len(before)
    if forced:
        begin += _straddled(ids, text, given, begin, forced)

    def hits(n: int) -> list[int]:
        return stop_places.places(
            groups, text, given, ids[:n], begin=begin, min_new=min_new
        )

    n = len(ids)
    places = hits(n)
    while n > 1 and places and (fewer := hits(n - 1)):
        n, places = n - 1, fewer
    whole = text.decode([*given, *ids[:n]])
    written = whole[begin : min(places, default=None)]
    shown = (before if prefill is None else prefill) + written
    if places or stopped:
        return Response(shown, n, "stop")
    ended = "eos" if ids and ids[-1] in text.eos_ids else "stop"
    return Response(shown, n, "length" if truncated else ended)


def _plain(text: Tokenizer, words: str) -> str:
    """A text as it is decoded behind another one: without special tokens."""
    shown = text.decode(text.encode("a" + words))
    return shown[1:] if shown[:1] == "a" else text.decode(text.encode(words))


def _straddled(
    ids: Sequence[int], text: Tokenizer, given: Sequence[int], begin: int, forced: str
) -> int:
    """Characters of the prompt in the first token of a response."""
    shown = _plain(text, forced)
    for n in range(1, min(len(ids), len(shown) + 1) + 1):
        found = text.decode([*given, *ids[:n]])[begin:]
        if found.endswith(shown):
            return len(found) - len(shown)
    return 0


def answers(
    batch: Batch, truncated: np.ndarray, text: Tokenizer, rules: Rules,
    min_new: Sequence[int] | None = None,
) -> list[list[Response]]:  # fmt: skip
    """B lists of G responses, as they are written to the file and scored.

    Args:
      batch: on the host.
      truncated: [B, G], whether a response ended because of max_new.
      text: their tokenizer.
      rules: what their text is.
      min_new: of each prompt, where it is not that of the rules.
    """
    prefill = _plain(text, rules.prefill)
    begun = bool(rules.prefill or rules.forced)

    def one(b: int, g: int) -> Response:
        ids, mask = batch.tokens[b, g], batch.mask[b, g]
        first = int(mask.argmax() if mask.any() else batch.lengths[b, g])
        # Some tokenizers drop a blank at the beginning of what they decode.
        given = ids[max(0, first - CONTEXT) : first].tolist() if begun else []
        return response(
            ids[mask].tolist(), bool(truncated[b, g]), text, given=given, prefill=prefill,
            forced=rules.forced, stops=rules.stops,
            min_new=rules.min_new if min_new is None else min_new[b],
        )  # fmt: skip

    groups = range(batch.mask.shape[1])
    return [[one(b, g) for g in groups] for b in range(len(batch.mask))]


def begin(
    path: epath.Path, examples: Sequence[Example], lms: Mapping[str, LM],
    text: Tokenizer, *, reward: str = "", grammar: str = "",
    settings: Mapping[str, np.ndarray] = MappingProxyType({}), write: bool,
) -> set[str]:  # fmt: skip
    """Ids of the prompts that a file already answers; drops an incomplete last line.

    Args:
      path: of the responses; checksums of the prompts and weights are in a .json beside it.
      examples: the prompts.
      lms: the models whose weights the responses depend on.
      text: the tokenizer.
      reward: what the scores depend on, from `rewards.identity`; '' without a reward.
      grammar: of the responses, its identity; '' without one.
      settings: that prompts have for themselves.
      write: whether this process writes.

    Raises:
      ValueError: the file is damaged, or belongs to other prompts, weights, grammar,
        tokenizer or reward; the message has the differences.
    """
    prompts = [
        (e.id, e.prompt, *([dict(e.template)] if e.template else [])) for e in examples
    ]
    here = {
        "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        "number of prompts": len(examples),
        "tokenizer": text.fingerprint,
    } | {
        f"weights of {name}": checkpoint.fingerprint(lm.params)
        for name, lm in lms.items()
    }
    here |= {"grammar": grammar} if grammar else {}
    if settings:
        values = {k: v.tolist() for k, v in sorted(settings.items())}
        digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
        here["settings of rows"] = digest
    if reward:
        here["reward"] = hashlib.sha256(reward.encode()).hexdigest()[:16]
    beside = path.with_suffix(".json")
    if not path.exists():
        if write:
            workdirs.write_json(beside, here)
        return set()
    found = read(path)
    there = json_object.read(beside) if beside.exists() else {}
    differ = [
        f"{k} ({there.get(k, 'absent')} there, {here.get(k, 'absent')} here)"
        for k in dict.fromkeys((*there, *here))
        if there.get(k) != here.get(k)
        and not (k == "reward" and k not in there)  # of an earlier version
    ]
    wanted = {e.id: json.loads(json.dumps(e.prompt)) for e in examples}
    other = [row for row in found if wanted.get(row["id"]) != row["prompt"]]
    if other and not differ:
        raise ValueError(
            f"{path} is damaged: {other[0]['id']} is no prompt of this run, or has another "
            "text: delete that line, or put a copy of the file back"
        )
    if differ:
        hint = ""
        if other:
            ask = wanted.get(other[0]["id"])
            hint = f"; {other[0]['id']} is {other[0]['prompt']!r:.60} there, " + (
                "no prompt here" if ask is None else f"{ask!r:.60} here"
            )
        raise ValueError(
            f"{path} answers something else; take another workdir: "
            + "; ".join(differ)
            + hint
        )
    if write:
        read(path, repair=True)  # only now: the file is known to be of this run
    return {row["id"] for row in found}


def read(path: epath.Path, *, repair: bool = False) -> list[dict[str, Any]]:
    """The complete lines of a file.

    Raises:
      ValueError: a line is not a response; an incomplete last line is no error.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data) and repair:
        log.warning("%s: the last line is incomplete and is dropped", path)
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    out = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            check_line(row)
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no response: {error!r}") from error
        out.append(row)
    return out


def check_line(row: Any) -> None:
    """Raises ValueError, KeyError or TypeError for what is no line of such a file."""
    row["prompt"]
    if not isinstance(row["id"], str):
        raise ValueError("its id is no text")
    lists = {k: row[k] for k in (*LISTS, "scores") if k != "scores" or k in row}
    for key, value in lists.items():
        if not isinstance(value, list) or len(value) != len(row["responses"]):
            raise ValueError(f"it has no list {key!r} with an entry for each response")


def append(path: epath.Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Appends lines in one write; they are on the disk when it returns."""
    text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
    with open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def arrange(path: epath.Path, ids: Sequence[str]) -> None:
    """Sorts the lines into the order of the prompts."""
    lines = {
        json.loads(x)["id"]: x for x in path.read_bytes().splitlines(keepends=True)
    }
    fresh = path.parent / f".{path.name}"
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    fresh.write_bytes(b"".join(lines[i] for i in ids))
    fresh.replace(path)


def summary(
    lines: Sequence[Mapping[str, Any]], stats: Mapping[str, list[float]], seconds: float
) -> str:
    """Counts, rates and scores of the responses, in a few lines of text."""
    tokens = [n for row in lines for n in row["tokens"]]
    ends = [f for row in lines for f in row["finish"]]
    shares = ", ".join(
        f"{ends.count(f) / len(ends):.0%} {f}" for f in ("eos", "stop", "length")
    )
    text = (
        f"{len(ends)} responses of {np.mean(tokens):.1f} tokens ({shares}) in "
        f"{seconds:.1f} s, {sum(tokens) / seconds:.1f} tokens/s with compilation"
    )
    scores = [s for row in lines for s in row.get("scores", ())]
    if scores:
        text += f"\n  score  mean {np.mean(scores):.4g}, best {np.max(scores):.4g}"
    # counts add up, rates do not
    for name, values in stats.items():
        if name in ("tokens_sampled", "judge_calls", "steps"):
            text += f"\n  {name}  {sum(values):g}"
        else:
            text += f"\n  {name}  {np.mean(values):.4g} per batch"
    return text
