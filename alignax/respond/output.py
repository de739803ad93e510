"""The file of responses (JSONL): its lines, its summary, and how it is resumed."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from alignax.batch import LM, Batch, Example
from alignax.inputs.tokenizer import Tokenizer
from alignax.runs import checkpoint

log = logging.getLogger(__name__)


class Response(NamedTuple):
    """One response as it is written to the file."""

    text: str
    tokens: int  # sampled tokens of the text
    finish: str  # 'eos', 'stop' or 'length'


def response(
    ids: list[int], truncated: bool, text: Tokenizer, *, given: Sequence[int] = (),
    stops: Sequence[str] = (), min_new: int = 0,
) -> Response:  # fmt: skip
    """The text of a response, cut before the first stop string.

    Args:
      ids: sampled tokens.
      truncated: whether the response ended because of max_new.
      text: their tokenizer.
      given: ids of the prefill, whose text begins the response.
      stops: stop strings.
      min_new: a stop string that ends before this number of tokens does not count.
    """
    begun = len(text.decode(given))
    early = len(text.decode([*given, *ids[: max(0, min_new - 1)]]))

    def hits(n: int) -> list[int]:
        begin = text.decode([*given, *ids[:n]])
        least = {s: max(begun, early - len(s) + 1) for s in stops}
        return [at for s in stops if (at := begin.find(s, least[s])) >= 0]

    n, whole = len(ids), text.decode([*given, *ids])
    if found := hits(n):
        while n > 1 and hits(n - 1):
            n -= 1
        return Response(whole[: min(found)], n, "stop")
    ended = "eos" if ids and ids[-1] in text.eos_ids else "stop"
    return Response(whole, n, "length" if truncated else ended)


def answers(
    batch: Batch, truncated: np.ndarray, text: Tokenizer, generate: Any
) -> list[list[Response]]:
    """B lists of G responses, as they are written to the file and scored.

    Args:
      batch: on the host.
      truncated: [B, G], whether a response ended because of max_new.
      text: their tokenizer.
      generate: the section of the config.
    """
    given = text.encode(generate.prefill)
    return [
        [
            response(
                batch.tokens[b, g][batch.mask[b, g]].tolist(), bool(truncated[b, g]), text,
                given=given, stops=generate.stops, min_new=generate.min_new,
            )
            for g in range(batch.mask.shape[1])
        ]
        for b in range(len(batch.mask))
    ]  # fmt: skip


def begin(
    path: epath.Path, examples: Sequence[Example], lms: Mapping[str, LM],
    text: Tokenizer, *, write: bool,
) -> set[str]:  # fmt: skip
    """Ids of the prompts that a file already answers; drops an incomplete last line.

    Args:
      path: of the responses; checksums of the prompts and weights are in a .json beside it.
      examples: the prompts.
      lms: the models whose weights the responses depend on.
      text: the tokenizer.
      write: whether this process writes.

    Raises:
      ValueError: the file is damaged, or belongs to other prompts, weights or another
        tokenizer; the message has the differences.
    """
    prompts = [(e.id, e.prompt) for e in examples]
    here = {
        "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        "number of prompts": len(examples),
        "tokenizer": text.fingerprint,
    } | {
        f"weights of {name}": f"{int(checkpoint.checksum(lm.params)):08x}"
        for name, lm in lms.items()
    }
    beside = path.with_suffix(".json")
    if not path.exists():
        if write:
            fresh = (
                beside.parent / f".{beside.name}"
            )  # a kill must not leave half of it
            fresh.write_text(json.dumps(here, indent=1))
            fresh.replace(beside)
        return set()
    found = read(path)
    there = json.loads(beside.read_text()) if beside.exists() else {}
    differ = [
        f"{k} ({there.get(k, 'absent')} there, {here.get(k, 'absent')} here)"
        for k in dict.fromkeys((*there, *here))
        if there.get(k) != here.get(k)
    ]
    if differ:
        wanted = {e.id: json.loads(json.dumps(e.prompt)) for e in examples}
        other = [row for row in found if wanted.get(row["id"]) != row["prompt"]]
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
            row["id"], row["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no response: {error!r}") from error
        out.append(row)
    return out


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
