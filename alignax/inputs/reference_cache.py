"""Log-probabilities under the frozen reference, computed once and kept on disk.

The reference never changes, so its forward pass over a data set need not be repeated in
every epoch and every run; nor need its samples (a file of their rewards is written and
read by the same functions). A file holds, for each distinct row (tokens and mask), the
log-probabilities of its scored tokens; a row is found by its content, whatever batch it
is in (in a batch of another shape, the numbers may round differently). The file has a key
that describes its model, data and settings: if any of them differs, it is refused.
"""

import dataclasses
import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from etils import epath

from alignax.batch import LM, Batch
from alignax.inputs.source import EvalBatches, Source
from alignax.models import json_object
from alignax.models.transformer import HOW, LATER
from alignax.runs import checkpoint

KERNEL = 1  # raised when logprob.score changes its numbers by more than rounding
UNREADABLE = (
    zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, MemoryError,
    OverflowError, RuntimeError, zlib.error,
)  # fmt: skip
Table = dict[bytes, np.ndarray]  # content of a row -> float32 log-probs, scored tokens


def describe(lm: LM, batches: Iterable[Batch], **more: Any) -> dict[str, str]:
    """The key of a cache: what its numbers depend on, part by part.

    Args:
      lm: the reference.
      batches: the whole data set.
      **more: further parts, such as tokenizer and length.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for content, _ in _rows(batch):
            digest.update(content)
    return describe_lm(lm, data=digest.hexdigest()[:16], **more)


def describe_lm(lm: LM, **more: Any) -> dict[str, str]:
    """What the numbers of an LM depend on, part by part, and further parts."""
    model = {}
    for f in dataclasses.fields(lm.config):
        value = getattr(lm.config, f.name)
        # caches from before a field was there still hold
        if f.name not in HOW and not (f.name in LATER and value == f.default):
            model[f.name] = value
    return {
        "parameters": checkpoint.fingerprint(lm.params),
        "dtype": str(lm.config.dtype),
        "platform": jax.default_backend(),
        "model": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
        "kernel": str(KERNEL),
        **{k: str(v) for k, v in more.items()},
    }


def compute(batches: Iterable[Batch], score: Callable[[Batch], np.ndarray]) -> Table:
    """Scores every row of a data set.

    Args:
      batches: the whole data set, on the host.
      score: batch -> log-probs under the reference, [B, G, T].
    """
    table: Table = {}
    for batch in batches:
        logps = np.asarray(score(batch), np.float32)
        for content, (b, g) in _rows(batch):
            table[content] = logps[b, g][np.asarray(batch.mask)[b, g]]
    return table


def transfer(rows: EvalBatches, others: EvalBatches, table: Table) -> Table:
    """A table for `rows` from one for `others`, which has the same responses.

    So the reference may be given another prompt than the policy: examples are matched by
    their ids, responses by their slot, scored tokens by their order.

    Args:
      rows: the data set that is trained on.
      others: the one that `table` was computed on.
      table: from `compute`.

    Raises:
      ValueError: an example that `others` lacks or has twice, a response with other
        scored tokens there, or two examples that are one here and two there.
    """
    found = {}
    for i in range(len(others)):
        batch = others[i]
        for content, (b, g) in _rows(batch):
            place = others.ids(i)[b], g
            if place in found:
                raise ValueError(f"reference_data has two examples {place[0]}")
            found[place] = batch.tokens[b, g][batch.mask[b, g]], table[content]
    out: Table = {}
    for i in range(len(rows)):
        batch = rows[i]
        for content, (b, g) in _rows(batch):
            name, tokens = rows.ids(i)[b], batch.tokens[b, g][batch.mask[b, g]]
            if (name, g) not in found:
                raise ValueError(f"reference_data has no response {g} of {name}")
            there, logps = found[name, g]
            if not np.array_equal(tokens, there):
                raise ValueError(
                    f"response {g} of {name} is another in reference_data: "
                    f"{len(tokens)} scored tokens here, {len(there)} there"
                )
            if not np.array_equal(out.setdefault(content, logps), logps):
                raise ValueError(
                    f"{name}: another example has the same tokens here, and another "
                    "prompt in reference_data"
                )
    return out


def save(path, table: Table, key: dict[str, str]) -> None:
    """Writes a table and its key; the file appears complete or not at all."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.parent / f".{path.name}"
    with fresh.open("wb") as file:
        np.savez(
            file,
            key=np.array(json.dumps(key)),
            rows=np.frombuffer(b"".join(table), np.uint8).reshape(len(table), -1),
            ends=np.cumsum([len(x) for x in table.values()]),
            logps=np.concatenate([*table.values(), np.zeros(0, np.float32)]),
        )
    fresh.replace(path)


def load(
    path, key: dict[str, str], *, what: str = "log-probabilities",
    setting: str = "config.reference_cache", also: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Table:  # fmt: skip
    """Reads a table whose key is exactly `key`.

    Args:
      path: of the file.
      key: from `describe` or `describe_lm`.
      what: the numbers, for messages.
      setting: which key of the config names their folder, for messages.
      also: parts of the key as earlier versions of this package wrote them.

    Raises:
      ValueError: it has another key; the parts that differ are named.
    """
    try:
        saved, made_of = _read(path)
    except (*UNREADABLE, KeyError, TypeError, AttributeError) as error:
        why = json_object.one_line(error)
        raise ValueError(f"{path} does not read back ({why}): delete it") from error
    differ = [
        f"{k} ({made_of.get(k, 'absent')} there, {key.get(k, 'absent')} here)"
        for k in sorted({*made_of, *key})
        if made_of.get(k) not in (key.get(k), *also.get(k, ()))
    ]
    if differ:
        raise ValueError(
            f"{path} holds {what} of something else: {'; '.join(differ)}; name another "
            f"folder in {setting}, or delete the file"
        )
    parts = np.split(saved["logps"], saved["ends"][:-1])
    return {row.tobytes(): x for row, x in zip(saved["rows"], parts, strict=True)}


def _read(path: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, and its key; no more memory than the file has bytes.

    Raises:
      ValueError, or one of UNREADABLE, KeyError, TypeError, AttributeError: a damaged file.
    """
    with epath.Path(path).open("rb") as file:
        packed = zipfile.ZipFile(file)
        held = {
            member.filename.removesuffix(".npy"): member for member in packed.filelist
        }
        if any(member.compress_type != zipfile.ZIP_STORED for member in held.values()):
            raise ValueError("it is compressed, which such a file never is")
        saved = {}
        for name in ("key", "rows", "ends", "logps"):
            with packed.open(held[name]) as part:
                _, shape, fortran, dtype = _header(part)
            size = math.prod(shape) * dtype.itemsize
            if fortran or dtype.hasobject or size > held[name].file_size:
                raise ValueError(f"its array {name!r} is of {dtype} {shape}")
            with packed.open(held[name]) as part:
                saved[name] = np.lib.format.read_array(part, allow_pickle=False)
    made_of = json.loads(str(saved["key"]))
    rows, ends, logps = saved["rows"], saved["ends"], saved["logps"]
    fits = rows.dtype == np.uint8 and rows.ndim == 2 and logps.dtype == np.float32
    fits = fits and ends.dtype.kind in "iu" and ends.shape == rows.shape[:1]
    last = [0, *ends.tolist()] if fits else []
    if not fits or logps.shape != (last[-1],) or last != sorted(last):
        raise ValueError("its arrays do not belong together")
    if np.isnan(logps).any():
        raise ValueError("it holds numbers that are NaN")
    if not isinstance(made_of, dict):
        raise ValueError("its key is no object")
    return saved, made_of


def _header(part: Any) -> tuple[Any, tuple[int, ...], bool, np.dtype]:
    """(version, shape, Fortran order, dtype) of an array in a file."""
    version = np.lib.format.read_magic(part)
    read = {(1, 0): np.lib.format.read_array_header_1_0}
    read[2, 0] = np.lib.format.read_array_header_2_0
    return version, *read[version](part)


def attach(source: Source, table: Table) -> Source:
    """The source, with `ref_logps` filled in every batch."""

    def next_batch(params: Any = None, step: int = 0, average: Any = None) -> Batch:
        batch = source.next(params, step, average)
        ref: Any = np.zeros(batch.mask.shape, np.float32)
        for content, (b, g) in _rows(batch):
            ref[b, g][batch.mask[b, g]] = table[content]
        return batch._replace(ref_logps=ref)

    return source._replace(next=next_batch)


def _rows(batch: Batch):
    """(digest of tokens and mask, (b, g)) of every valid row; padding is not content."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    lengths = np.asarray(batch.lengths)
    for b, g in np.argwhere(np.asarray(batch.valid)):
        n = lengths[b, g]
        content = hashlib.sha256(tokens[b, g, :n].astype(np.int32).tobytes())
        content.update(mask[b, g, :n].tobytes())
        yield content.digest(), (b, g)
