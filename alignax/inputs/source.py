"""Where batches come from: a source is (next, state, restore), plus what it counted.

`dataset_source` turns examples into batches by a plan that is a pure function of the
step: which examples share a batch, in which order, at which T. Grain draws the order
(one permutation an epoch) and walks the plan; its iterator state is the state. Every
host plans the whole batch and builds its own rows of it, so that all hosts agree on
shapes and on when the data end, and a run can resume on another number of hosts.

Lengths are met in this order, on lists of ids: the prompt loses tokens on its left (BOS
stays) down to one; then the response loses its right end and, with it, its EOS; a
response without a scored token left drops the example. All of it is counted.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from alignax import logprob
from alignax.batch import LM, Batch, Example
from alignax.inputs import layout
from alignax.inputs.plan import (
    ENDLESS,
    Filled,
    Order,
    Packing,
    Plan,
    Row,
    bucket_sizes,
    fit,
)
from alignax.inputs.plan import identity as plan_identity
from alignax.inputs.tokenizer import Tokenized, Tokenizer

log = logging.getLogger(__name__)

SHOWN = 20  # how many dropped or malformed ids a report lists


class Source(NamedTuple):
    """Batches in order, with a place to stop and go on.

    Attributes:
      next: (params, step, average) -> Batch of this host's rows; `average` is that of the
        parameters, None where the run keeps none. Offline sources ignore all three.
        Raises StopIteration when the epochs are over.
      state: () -> a JSON-serialisable dict.
      restore: takes what `state` gave; the batches that follow are bit-identical.
      report: () -> counts over the data ('read', 'used', 'cut', 'dropped',
        'malformed'), over one epoch 'padding' (share of tokens) and 'useful' (share of
        distinct ones, what responses share counted once), the first 'dropped_ids' and
        'malformed_ids' with their reasons; 'ids' of the last batch, and 'metrics' of it.
    """

    next: Callable[..., Batch]
    state: Callable[[], dict[str, Any]]
    restore: Callable[[dict[str, Any]], None]
    report: Callable[[], dict[str, Any]]


class PromptBatch(NamedTuple):
    """Prompts to generate from."""

    tokens: Int[np.ndarray, "B P"]  # right-padded
    lengths: Int[np.ndarray, " B"]  # at least 1, also where a row is filler
    valid: Bool[np.ndarray, " B"]  # False on rows that fill up the last batch
    texts: list[str]  # the prompts as the model reads them
    ids: list[str]
    columns: dict[str, Float[np.ndarray, " B"]]  # of the examples


def dataset_source(
    examples: Sequence[Example] | Mapping[str, tuple[Sequence[Example], float]],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    buckets: Sequence[int] = (),
    shuffle: bool = True,
    epochs: int | None = None,
    host: tuple[int, int] = (0, 1),
    vocab_size: int | None = None,
    window: int = 16,
    grid: tuple[int, int] | None = None,
    filled: bool = True,
) -> Source:
    """Batches of a data set, or of a mixture with a fixed ratio in every step.

    Every example occurs once an epoch. Plain batches hold examples of like length: within
    a window of shuffled batches rows are sorted by length, cut into batches, and the
    batches shuffled again. A batch may hold the end of one epoch and the start of the
    next; the last batch of all is filled up with invalid rows.

    Packed batches (see `layout`) all have one shape, whose rows hold as many tokens as
    `batch_size` prompts have on average. They are filled up to that: a batch has up to
    `batch_size` prompts, the places left over are invalid; those at the end of an epoch
    have what is left of it. That needs room for some prompts beside each other, on every
    device. Where there is none, and in a mixture, whose ratio is exact, batches are those
    of plain rows, and each is packed into one of eight shapes.

    An example that cannot be tokenised (its prompt's ids are no prefix of the whole, a
    turn holds two EOS, ...) counts as malformed and is named with its reason.

    Args:
      examples: random-access examples, or {name: (examples, ratio)}. In a mixture each
        step holds exactly that ratio, in blocks of rows in the order of the names, and
        `extra['source']` (int32 [B]) is the index of the name.
      tokenizer: from `tokenizer.load`.
      batch_size: B, prompts a step over all hosts.
      length: tokens a row may have; longer examples are cut.
      seed: of the order.
      buckets: the values of T that occur, at most `length`; by default 1, 2, 3, 4,
        6 and 8 eighths of it. Each value that occurs is compiled once.
      shuffle: False keeps the order of `examples`.
      epochs: passes over the data, None for no end. In a mixture the part that takes
        the most steps is passed this often, and the others repeat.
      host: (process index, process count).
      vocab_size: V of the model, to refuse ids beyond it; None does not check.
      window: number of batches over which rows are sorted by length, or out of which
        packed ones are filled.
      grid: (shards over all hosts, micro-batches) that batches are laid out for; None
        leaves one row per response.
      filled: fill packed rows; False packs batches of examples of like length.

    Returns:
      A Source of host batches [B / process count, G, T], G the largest group.

    Raises:
      ValueError: no usable example; a ratio that `batch_size` cannot hold exactly; a
        batch that the hosts, or shards and micro-batches, cannot share evenly; a bucket
        beyond `length`; an id at or beyond `vocab_size`.
    """
    parts = examples if isinstance(examples, Mapping) else {"data": (examples, 1)}
    shares = _shares({k: ratio for k, (_, ratio) in parts.items()}, batch_size)
    index, count = host
    if not 0 <= index < count:
        raise ValueError(
            f"host is {host}, expected (index, count) with 0 <= index < count"
        )
    if batch_size % count:
        raise ValueError(f"batch_size {batch_size} does not divide over {count} hosts")
    counts = _counts()
    data = [_read(d, tokenizer, length, vocab_size, counts) for d, _ in parts.values()]
    named = {k: sorted(rows[0].columns) for k, rows in zip(parts, data, strict=True)}
    if len({tuple(names) for names in named.values()}) > 1:
        raise ValueError(f"the parts of a mixture have different columns: {named}")
    mixture = isinstance(examples, Mapping)
    if grid is not None and batch_size % (grid[0] * grid[1]):
        raise ValueError(
            f"batch_size {batch_size} does not divide over {grid[0]} shards x "
            f"{grid[1]} micro-batches"
        )
    need = [-(-len(rows) // b) if epochs is None else -(-len(rows) * epochs // b)
            for rows, b in zip(data, shares, strict=True)]  # fmt: skip
    steps = ENDLESS if epochs is None else max(need)
    orders: list[Any] = [
        Order(
            [row.length() if grid is None else row.distinct for row in rows],
            share,
            window=window,
            seed=seed + i,
            shuffle=shuffle,
            limit=None if epochs is None or n < steps else len(rows) * epochs,
        )
        for i, (rows, share, n) in enumerate(zip(data, shares, need, strict=True))
    ]
    sizes = bucket_sizes(buckets, length)
    packing = None
    if grid is not None:  # T costs next to nothing: one will do
        sizes = (fit(max(row.length() for rows in data for row in rows), sizes),)
        packing = Packing(*grid)
    planned = functools.partial(
        Plan, data, buckets=sizes, host=host, pad=tokenizer.pad_id, mixture=mixture
    )
    plan = planned(orders, steps, packing=packing)
    report = plan.shares(min(steps, max(need)))
    if grid is not None and filled and not mixture:
        order = Filled(
            [row.distinct for row in data[0]], batch_size,
            window=window, seed=seed, shuffle=shuffle,
        )  # fmt: skip
        steps = ENDLESS if epochs is None else order.steps(epochs)
        plan = planned([order], steps, packing=order.packing(*grid))
        grouped, report = report, plan.shares(order.steps(1))
        if report["useful"] < grouped["useful"] - 0.02:
            log.warning(
                "%.0f %% of what packed rows compute is useful, %.0f %% where batches are "
                "of like length: few prompts a device want config.layout = 'grouped'",
                100 * report["useful"], 100 * grouped["useful"],
            )  # fmt: skip
    # The state is worth nothing on other data or another layout: it says which it is of.
    settings: tuple[Any, ...] = (
        tokenizer.fingerprint,
        batch_size,
        length,
        seed,
        plan.buckets,
    )
    settings += (shuffle, epochs, window, shares)
    if grid is not None:
        settings += ("packed", filled)
    identity = plan_identity(data, settings)
    walk = iter(
        grain.MapDataset.source(plan).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
    )
    counts |= report
    last: dict[str, Any] = {"ids": [], "metrics": {}}

    def next_batch(params: Any = None, step: int = 0, average: Any = None) -> Batch:
        del params, step, average
        batch, last["ids"], last["metrics"] = next(walk)
        return batch

    def state() -> dict[str, Any]:
        return {"grain": walk.get_state(), "data": identity}

    def restore(saved: dict[str, Any]) -> None:
        if saved.get("data") != identity:
            raise ValueError(
                "the saved data position belongs to other data, another tokenizer or "
                f"another batch layout: saved {saved.get('data')}, here {identity}"
            )
        walk.set_state(saved["grain"])

    return Source(next_batch, state, restore, lambda: {**counts, **last})


class EvalBatches:
    """Every example once, at known places: `batches[i]` holds the examples `ids(i)`."""

    def __init__(self, plan: "Plan", report: dict[str, Any]):
        self._plan, self.report = plan, report

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return self._plan[index % len(self)][0]

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def ids(self, index: int) -> list[str]:
        """Ids of the valid rows of batch `index`, in order."""
        return self._plan.ids(index % len(self))


def eval_batches(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    buckets: Sequence[int] = (),
    host: tuple[int, int] = (0, 1),
    vocab_size: int | None = None,
) -> EvalBatches:
    """Every example exactly once, shortest first, the last batch filled up.

    Args: as for `dataset_source`.

    Returns:
      A sequence of host batches with `ids(i)` and the counts in `report`.

    Raises:
      ValueError: as for `dataset_source`.
    """
    if batch_size % host[1]:
        raise ValueError(
            f"batch_size {batch_size} does not divide over {host[1]} hosts"
        )
    counts = _counts()
    rows = _read(examples, tokenizer, length, vocab_size, counts)
    rows.sort(key=Row.length)
    lengths = [row.length() for row in rows]
    order = Order(lengths, batch_size, window=1, seed=0, shuffle=False, limit=len(rows))
    plan = Plan(
        [rows], [order], -(-len(rows) // batch_size),
        buckets=bucket_sizes(buckets, length), host=host, pad=tokenizer.pad_id, mixture=False,
    )  # fmt: skip
    counts |= plan.shares(len(plan))
    return EvalBatches(plan, counts)


def prompt_batches(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    buckets: Sequence[int] = (),
) -> list[PromptBatch]:
    """The prompts of `examples` in their order, ready to generate from.

    Args:
      examples: only their prompts are read.
      tokenizer: from `tokenizer.load`.
      batch_size: B; the last batch is filled up with copies marked invalid.
      length: tokens a prompt may have; longer ones lose their left, BOS stays.
      buckets: the values of P that occur; as for `dataset_source`.

    Raises:
      ValueError: no examples, or examples with different columns.
    """
    if not len(examples):
        raise ValueError("no prompts: the data set is empty")
    names = column_names(examples)
    sizes = bucket_sizes(buckets, length)
    out = []
    for start in range(0, len(examples), batch_size):
        some = [
            examples[i] for i in range(start, min(start + batch_size, len(examples)))
        ]
        ids = [cut_prompt(tokenizer.prompt(e), length, tokenizer.bos_id) for e in some]
        fill = batch_size - len(some)
        ids, some = ids + ids[:1] * fill, some + some[:1] * fill
        tokens = np.full((batch_size, fit(max(map(len, ids)), sizes)), tokenizer.pad_id)
        for row, prompt in zip(tokens, ids, strict=True):
            row[: len(prompt)] = prompt
        out.append(
            PromptBatch(
                tokens.astype(np.int32),
                np.array([len(i) for i in ids], np.int32),
                np.arange(batch_size) < batch_size - fill,
                [tokenizer.decode(i, keep_specials=True) for i in ids],
                [e.id for e in some[: batch_size - fill]],
                {k: np.array([e.columns[k] for e in some], np.float32) for k in names},
            )
        )
    return out


def column_names(examples: Sequence[Example]) -> list[str]:
    """The columns that all examples have.

    Raises:
      ValueError: two examples have different ones.
    """
    first = examples[0]
    names = sorted(first.columns)
    for i in range(len(examples)):
        e = examples[i]
        if sorted(e.columns) != names:
            raise ValueError(
                f"{e.id} has columns {sorted(e.columns)}, {first.id} has {names}"
            )
    return names


def cut_prompt(ids: list[int], room: int, bos_id: int | None) -> list[int]:
    """The last `room` (at least 1) ids of a prompt; a BOS at its start stays."""
    if len(ids) <= room:
        return ids
    if ids[0] == bos_id:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[-room:]


def cut(
    tokenized: Tokenized, length: int, bos_id: int | None
) -> tuple[Tokenized, bool]:
    """Cuts an example to `length` tokens: the prompt's left, then the responses' right.

    Args:
      tokenized: a prompt and its G responses; they keep one common prompt.
      length: at least 2.
      bos_id: kept if the prompt starts with it; None if there is none.

    Returns:
      The example, in which a response may have lost all of its scored tokens, and
      whether anything was cut.
    """
    prompt, responses, scored = tokenized
    longest = max(map(len, responses))
    if len(prompt) + longest <= length:
        return tokenized, False
    prompt = cut_prompt(prompt, max(1, length - longest), bos_id)
    room = length - len(prompt)
    return Tokenized(
        prompt, [r[:room] for r in responses], [s[:room] for s in scored]
    ), True


def texts(batch: Batch, tokenizer: Tokenizer) -> list[list[str]]:
    """The scored tokens of every response as text: B lists of G."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    return [
        [tokenizer.decode(t[m].tolist()) for t, m in zip(*group, strict=True)]
        for group in zip(tokens, mask, strict=True)
    ]


def describe(batch: Batch, tokenizer: Tokenizer, row: int = 0) -> str:
    """One prompt of a batch as text, with what is scored between ⟦ and ⟧.

    Args:
      batch: host or addressable arrays.
      tokenizer: the one that made it.
      row: index into B.
    """
    lines = []
    for g in range(batch.tokens.shape[1]):
        tokens, mask = np.asarray(batch.tokens)[row, g], np.asarray(batch.mask)[row, g]
        n = int(np.asarray(batch.lengths)[row, g])
        # Runs of equal mask are decoded whole: a character may span several tokens.
        edges = [0, *(np.flatnonzero(np.diff(mask[:n])) + 1).tolist(), n]
        text = ""
        for a, b in itertools.pairwise(edges):
            run = tokenizer.decode(tokens[a:b].tolist(), keep_specials=True)
            text += f"⟦{run}⟧" if a < b and mask[a] else run
        valid = "" if np.asarray(batch.valid)[row, g] else ", not valid"
        lines.append(
            f"[{row}, {g}] {n} tokens, {int(mask.sum())} scored, {len(tokens) - n} padding, "
            f"feedback {float(np.asarray(batch.feedback)[row, g]):g}{valid}\n{text}"
        )
    return "\n".join(lines)


def _read(examples, tokenizer, length, vocab_size, counts) -> list[Row]:
    """Tokenises and cuts all examples; what happened to them is added to `counts`."""
    if length < 2:
        raise ValueError(f"length is {length}, expected at least 2")
    found = getattr(examples, "report", None) or {}
    for kind, lines in found.items():
        name = "malformed" if kind == "malformed" else "dropped"
        _note(counts, name, *lines)
        counts["read"] += len(lines)
    rows: list[Row] = []
    for i in range(len(examples)):
        example = examples[i]
        counts["read"] += 1
        try:
            if not example.responses:
                raise ValueError("no response")
            if example.feedback and len(example.feedback) != len(example.responses):
                raise ValueError(
                    f"{len(example.feedback)} feedback values for "
                    f"{len(example.responses)} responses"
                )
            whole = tokenizer.tokenize(example)
        except ValueError as e:
            _note(counts, "malformed", f"{example.id}: {e}")
            continue
        part, was_cut = cut(whole, length, tokenizer.bos_id)
        # A scored token needs a prefix, which the prompt always gives.
        if not all(any(s) for s in part.scored):
            _note(
                counts, "dropped", f"{example.id}: no response left at length {length}"
            )
            continue
        counts["cut"] += was_cut
        counts["used"] += 1
        responses = [np.array(r, np.int32) for r in part.responses]
        scored = [np.array(s, bool) for s in part.scored]
        row = Row(
            example.id,
            np.array(part.prompt_ids, np.int32),
            responses,
            scored,
            tuple(map(float, example.feedback)),
            {k: float(v) for k, v in example.columns.items()},
            len(part.prompt_ids) + layout.group(responses, scored).size(),
        )
        if rows and row.columns.keys() != rows[0].columns.keys():
            raise ValueError(
                f"{example.id} has columns {sorted(row.columns)}, {rows[0].id} has "
                f"{sorted(rows[0].columns)}"
            )
        if vocab_size is not None:
            top = max(int(x.max()) for x in (row.prompt, *row.responses))
            if top >= vocab_size:
                raise ValueError(
                    f"{example.id}: token id {top} "
                    f"({tokenizer.decode([top], keep_specials=True)!r}) is beyond the "
                    f"model's vocabulary of {vocab_size}"
                )
        rows.append(row)
    if not rows:
        reasons = counts["malformed_ids"] + counts["dropped_ids"]
        why = "; first: " + reasons[0] if reasons else ": the data set is empty"
        raise ValueError(f"no usable example among {counts['read']} read{why}")
    return rows


def _counts() -> dict[str, Any]:
    zeros = dict.fromkeys(("read", "used", "cut", "dropped", "malformed"), 0)
    return {**zeros, "dropped_ids": [], "malformed_ids": []}


def _note(counts: dict[str, Any], name: str, *lines: str) -> None:
    counts[name] += len(lines)
    shown = counts[f"{name}_ids"]
    shown += lines[: SHOWN - len(shown)]


def _shares(ratios: dict[str, float], batch_size: int) -> list[int]:
    """Rows of each part of a mixture in one batch."""
    exact = {k: Fraction(r).limit_denominator(10**6) for k, r in ratios.items()}
    if not exact or any(r <= 0 for r in exact.values()):
        raise ValueError(f"a mixture needs positive ratios, got {ratios}")
    rows = [batch_size * r / sum(exact.values()) for r in exact.values()]
    if batch_size < 1 or any(r.denominator != 1 for r in rows):
        base = np.lcm.reduce(
            [(r / sum(exact.values())).denominator for r in exact.values()]
        )
        raise ValueError(
            f"batch_size {batch_size} cannot hold the ratio {ratios} exactly; "
            f"use a multiple of {base}"
        )
    return [int(r) for r in rows]


def unfilled(batch: Batch, needs: Sequence[str]) -> list[str]:
    """The '<name>_logps' among `needs` that a batch does not bring along."""
    extra = batch.extra or {}
    columns = [n for n in needs if n.endswith("_logps") and n != "old_logps"]
    return [
        n
        for n in columns
        if (batch.ref_logps if n == "ref_logps" else extra.get(n)) is None
    ]


def annotate(
    batch: Batch,
    lms: Mapping[str, LM],
    *,
    needs: Sequence[str] = ("ref_logps",),
    score: Callable[..., Any] = logprob.score,
) -> Batch:
    """Adds the per-token log-probabilities of frozen LMs that a loss needs.

    'ref_logps' is the field, filled by lms['ref']; any other '<name>_logps' goes to
    `extra` and is filled by lms['<name>']. What is there already is left alone.

    Args:
      batch: [B, G, T].
      lms: frozen models by name.
      needs: what the loss declares; names that do not end in '_logps' are ignored.
      score: `logprob.score`, perhaps with a mesh bound.

    Raises:
      ValueError: a need without its LM; the ones that exist are listed.
    """
    for need in unfilled(batch, needs):
        name = need.removesuffix("_logps")
        if name not in lms:
            raise ValueError(
                f"{need!r} is needed but there is no LM {name!r}; there are {sorted(lms)}"
            )
        logps = jax.lax.stop_gradient(score(lms[name], batch).logps)
        if name == "ref":
            batch = batch._replace(ref_logps=logps)
        else:
            batch = batch._replace(extra={**(batch.extra or {}), need: logps})
    return batch
