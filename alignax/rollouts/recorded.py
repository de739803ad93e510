"""Responses of another sampler, from a file: their ids and their log-probabilities.

One response a line: {"id": of its prompt, "ids": token ids with the end, "logps": as many
nats under the distribution that was sampled, "truncated": true if it was cut off}. Without
"truncated" a response is cut off that does not end with an end-of-sequence id. Ids and not
text: another tokenization of the same text has other log-probabilities.
"""

import hashlib
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax.batch import Batch
from alignax.inputs.prompts import PromptBatch
from alignax.records import files
from alignax.sampling.decode import Generated


class Response(NamedTuple):
    """A response to some prompt."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]  # nats, as many
    truncated: bool


class Recorded(NamedTuple):
    """The responses of a file."""

    path: str
    by_id: dict[str, list[Response]]  # in the order of the file
    digest: str  # of all of them


def read(path: str, *, eos_ids: Collection[int], vocab_size: int) -> Recorded:
    """Reads a file of responses.

    Args:
      path: .jsonl, or another type of `records.files`.
      eos_ids: any of them ends a response.
      vocab_size: ids are 0..vocab_size - 1.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line that is no response, with its number; a file without any.
    """
    found: dict[str, list[Response]] = {}
    digest = hashlib.sha256()
    for number, row in files.read_json_lines(files.existing(pathlib.Path(path))):
        try:
            name, response = _response(row, eos_ids, vocab_size)
        except ValueError as error:
            raise ValueError(f"rollout.source {path}:{number}: {error}") from None
        found.setdefault(name, []).append(response)
        digest.update(repr((name, response)).encode())
    if not found:
        raise ValueError(f"rollout.source {path} holds no responses")
    return Recorded(path, found, digest.hexdigest()[:16])


def _response(
    row: Any, eos_ids: Collection[int], vocab_size: int
) -> tuple[str, Response]:
    if isinstance(row, ValueError):
        raise row
    missing = {"id", "ids", "logps"} - {*row} if isinstance(row, dict) else {"id"}
    if missing:
        raise ValueError(f"no {sorted(missing)[0]!r}, expected 'id', 'ids' and 'logps'")
    ids, logps = row["ids"], row["logps"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"'ids' is {ids!r}, expected token ids, at least one")
    if not all(0 <= i < vocab_size for i in ids):
        raise ValueError(f"'ids' spans {min(ids)}..{max(ids)}, expected 0..{vocab_size - 1}")  # fmt: skip
    numbers = isinstance(logps, list) and all(type(x) in (int, float) for x in logps)
    if not numbers or len(logps) != len(ids):
        many = len(logps) if isinstance(logps, list) else type(logps).__name__
        raise ValueError(f"'logps' has {many}, expected {len(ids)} numbers")
    if not all(-np.inf < x <= 0 for x in logps):
        wrong = next(x for x in logps if not -np.inf < x <= 0)
        raise ValueError(f"'logps' holds {wrong}, expected finite numbers up to 0")
    cut = row.get("truncated", ids[-1] not in eos_ids)
    if not isinstance(cut, bool):
        raise ValueError(f"'truncated' is {cut!r}, expected true or false")
    return str(row["id"]), Response(tuple(ids), tuple(map(float, logps)), cut)


def check(recorded: Recorded, names: Sequence[str]) -> None:
    """Raises ValueError unless there is a response to every one of these prompts."""
    if missing := [n for n in names if n not in recorded.by_id]:
        raise ValueError(
            f"rollout.source {recorded.path} has no response to {len(missing)} of "
            f"{len(names)} prompts, the first being {missing[0]!r}; it has some to "
            f"{sorted(recorded.by_id)[:3]}"
        )


def generated(
    recorded: Recorded, prompts: PromptBatch, key: Any, *, group: int, max_new: int
) -> Generated:
    """The recorded responses to some prompts, as if they had been drawn now.

    Of more than G responses to a prompt, G are taken by chance; where there are fewer, the
    other places are not valid.

    Args:
      recorded: from `read`.
      prompts: ids of prompts beyond those of the file are errors of `check`.
      key: decides which responses are taken.
      group: G.
      max_new: most tokens of a response.

    Returns:
      Generated on the host, whose raw_logps are the recorded ones.

    Raises:
      ValueError: a response that is too long.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    names = [*prompts.ids, *prompts.ids[:1] * (len(prompts.lengths) - len(prompts.ids))]
    taken: list[list[Response]] = []
    for name in names:
        known = recorded.by_id[name]
        places = np.arange(len(known))
        if len(known) > group:
            places = np.sort(rng.permutation(places)[:group])
        taken.append([known[i] for i in places])
    longest = max(len(r.ids) for some in taken for r in some)
    if longest > max_new:
        raise ValueError(
            f"rollout.source {recorded.path} has a response of {longest} tokens, expected "
            f"at most rollout.max_new={max_new}"
        )
    tokens = np.pad(prompts.tokens, ((0, 0), (0, max_new)))
    tokens = np.repeat(tokens[:, None], group, 1)
    lengths = np.repeat(np.asarray(prompts.lengths)[:, None], group, 1)
    mask, logps = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.float32)
    valid, cut = np.zeros(lengths.shape, bool), np.zeros(lengths.shape, bool)
    for b, some in enumerate(taken):
        for g, response in enumerate(some):
            start = int(prompts.lengths[b])
            lengths[b, g] = end = start + len(response.ids)
            at = (b, g, slice(start, end))
            tokens[at], mask[at], logps[at] = response.ids, True, response.logps
            valid[b, g], cut[b, g] = True, response.truncated
    none = np.zeros(lengths.shape, np.float32)
    fields: tuple[Any, ...] = (tokens, mask, lengths, none, valid)  # on the host
    old: Any = logps
    ended: Any = cut
    return Generated(Batch(*fields)._replace(old_logps=old), old, ended, {})
