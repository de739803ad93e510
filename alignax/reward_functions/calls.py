"""Calls a reward function on a batch of responses and checks what it returns.

A response whose reward is no finite number, or for which the function raises or takes too
long, has failed. A call tolerates so many of them and names the first.
"""

import functools
import math
import os
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

import alignax
from alignax.batch import Batch, Example
from alignax.inputs import detokenize
from alignax.plugin import Bound
from alignax.reward_functions import signature, time_limit
from alignax.reward_functions.signature import Signature

# of files that are not the user's
OTHERS = (os.path.dirname(alignax.__file__), sysconfig.get_path("purelib"))


class Judged(NamedTuple):
    """Rewards of B groups of G responses."""

    values: Float[np.ndarray, "B G"]  # 0 where not valid and where failed
    failed: Bool[np.ndarray, "B G"]  # valid responses without a reward
    members: dict[
        str, Float[np.ndarray, "B G"]
    ]  # of what the reward combines, by label


class Failure(NamedTuple):
    """Why a response has no reward."""

    reason: str
    cause: BaseException | None = None


class Responses(NamedTuple):
    """What a reward can be handed, for B prompts with G responses each."""

    batch: Batch
    texts: list[list[str]]
    lms: Any
    tokenizer: Any = None
    score: Callable | None = None
    # what batch.extra['row'] counts in; without that array B of them, in order
    examples: Sequence[Example] | None = None
    prefill: str = ""  # that all responses were begun with, beside that of their prompt

    @property
    def valid(self) -> Bool[np.ndarray, "B G"]:
        return np.asarray(self.batch.valid)

    @property
    def places(self) -> np.ndarray:
        """[B] indices into `examples`; ValueError where these are not known."""
        if self.examples is None:
            raise ValueError("the rows of the data are not given here")
        rows = (self.batch.extra or {}).get("row")
        return np.arange(len(self.texts)) if rows is None else np.asarray(rows)

    @property
    def own(self) -> list[Example]:
        """The B examples."""
        places, examples = self.places, self.examples
        assert examples is not None
        return [examples[int(i)] for i in places]

    def alone(self, b: int, g: int) -> "Responses":
        """One response to one prompt."""
        at = (slice(b, b + 1), slice(g, g + 1))
        batch = jax.tree.map(lambda x: x[at[: min(np.ndim(x), 2)]], self.batch)
        if self.examples is not None:
            extra = {**(batch.extra or {}), "row": self.places[b : b + 1]}
            batch = batch._replace(extra=extra)
        return self._replace(batch=batch, texts=[[self.texts[b][g]]])


def judge(
    reward: Bound, given: Responses, *, alone: bool = True, seconds: float = 0.0,
    tolerated: float = 0.0,
) -> Judged:  # fmt: skip
    """The rewards of a batch.

    Args:
      reward: from `rewards.load`.
      given: responses, and what else the reward may read.
      alone: whether responses can be judged one at a time; not where all hosts compute
        with an LM together.
      seconds: that one call of the function may take; 0 for any time.
      tolerated: share of the valid responses that may fail.

    Raises:
      ValueError: more responses fail; the message shows the first and the traceback of the
        function. The reward gave another shape, or needs what is not given.
    """
    form = signature.read(reward.function, reward.name)
    valid = given.valid
    if form.kind == "text":
        found = _one_by_one(reward, form, given, seconds, tolerated)
    else:
        whole = _whole(reward, form, given, alone, seconds, tolerated)
        found = whole or _one_by_one(reward, form, given, seconds, tolerated)
    values, failures, members = found
    failed = np.zeros(valid.shape, bool)
    for b, g in failures:
        failed[b, g] = True
    _check_share(reward, given, failures, tolerated)
    keep = valid & ~failed
    clean = {k: np.where(keep, v, 0.0).astype(np.float32) for k, v in members.items()}
    return Judged(np.where(keep, values, 0.0).astype(np.float32), failed, clean)


class Found(NamedTuple):
    """What calls of a reward gave."""

    values: np.ndarray  # [B, G]
    failures: dict[tuple[int, int], Failure]
    members: dict[str, np.ndarray]  # [B, G]


def _whole(
    reward: Bound, form: Signature, given: Responses, alone: bool, limit: float,
    tolerated: float,
) -> Found | None:  # fmt: skip
    """One call for all responses; None where it raised, so that each is tried alone."""
    handed = arguments(reward, form, given)
    try:
        with time_limit.limited(limit):
            out = handed()
    except (Exception, time_limit.TimeUp) as error:
        if tolerated and alone:
            return None
        if alone:
            found = _one_by_one(reward, form, given, limit, 0.0)
            _check_share(reward, given, found.failures, 0.0)
        raise ValueError(  # or alone none of them fails
            f"reward {reward.name} {described(error, limit)} on a batch that begins with "
            f"{given.texts[0][0]!r}{_trace(error)}"
        ) from error
    shape = given.valid.shape
    return _numbers(reward, form, out, shape, given)


def _one_by_one(
    reward: Bound, form: Signature, given: Responses, limit: float, tolerated: float
) -> Found:
    """A call for every valid response, until more have failed than are tolerated."""
    valid = given.valid
    values = np.zeros(valid.shape)
    failures: dict[tuple[int, int], Failure] = {}
    members: dict[str, np.ndarray] = {}
    for b, g in np.argwhere(valid).tolist():
        if form.kind == "text":
            handed: Callable[[], Any] = functools.partial(
                reward.__call__, given.texts[b][g]
            )
        else:
            handed = arguments(reward, form, given.alone(b, g))
        try:
            with time_limit.limited(limit):
                out = handed()
        except (Exception, time_limit.TimeUp) as error:
            failures[b, g] = Failure(described(error, limit), error)
        else:
            if form.kind != "text":
                got = _numbers(reward, form, out, (1, 1), given.alone(b, g))
                values[b, g] = got.values[0, 0]
                for label, own in got.members.items():
                    members.setdefault(label, np.zeros(valid.shape))[b, g] = own[0, 0]
                if got.failures:
                    failures[b, g] = got.failures[0, 0]
            elif isinstance(number := _number(out), Failure):
                failures[b, g] = number
            else:
                values[b, g] = number
        if len(failures) > tolerated * valid.sum():
            break
    return Found(values, failures, members)


def arguments(reward: Bound, form: Signature, given: Responses) -> Callable[[], Any]:
    """The reward with its arguments bound.

    Raises:
      ValueError: something that it takes is not given here.
    """
    flat = form.kind == "completions"
    has: dict[str, Callable[[], Any]] = {"lms": lambda: given.lms}
    if given.tokenizer is not None:
        has["tokenizer"] = lambda: given.tokenizer
    if given.score is not None:
        has["score"] = lambda: given.score
    names: list[str] = []
    if given.examples is not None:
        known = {k for e in given.own for k in e.columns}
        signature.check(form, known, reward.name)
        names = signature.columns(form, known)
    has |= _flat(given) if flat else _grouped(given)
    group = given.valid.shape[1]
    for name in names:
        repeat = group if flat else 1
        has[name] = functools.partial(_column, given, name, repeat, reward.name)
    needed = [n for n in form.required if n not in has]
    if needed:
        row = needed[0] not in ("tokenizer", "score", "lms")
        why = ", because the rows of the data are not known" if row else ""
        raise ValueError(
            f"reward {reward.name} reads {needed[0]!r}, which is not given here{why}"
        )
    wanted = [n for n in form.names if n in has]
    if form.rest:
        wanted += [n for n in (*names, *(signature.FLAT if flat else ())) if n in has]
    values = {n: has[n]() for n in dict.fromkeys(wanted)}
    first = [values.pop(n) for n in form.names[: form.first] if n in values]
    return lambda: reward(*first, **values)


def _grouped(given: Responses) -> dict[str, Callable[[], Any]]:
    """What there is in groups, by the names of signature.NAMES."""
    has: dict[str, Callable[[], Any]] = {
        "batch": lambda: given.batch,
        "texts": lambda: given.texts,
        "ids": lambda: response_ids(given.batch),
    }
    if given.tokenizer is not None:
        has["whole"] = lambda: whole_texts(given)
    if given.examples is not None:
        has["prompts"] = lambda: [e.prompt for e in given.own]
        has["rows"] = lambda: [dict(e.columns) for e in given.own]
        has["examples"] = lambda: given.examples
    return has


def _flat(given: Responses) -> dict[str, Callable[[], Any]]:
    """What TRL hands to a reward function: one entry per response."""
    group = given.valid.shape[1]

    def repeated(items: Sequence[Any]) -> list[Any]:
        return [x for x in items for _ in range(group)]

    def completions() -> list[Any]:
        """Text, or one assistant message where the prompt is a list of messages."""
        out: list[Any] = []
        for b, texts in enumerate(given.texts):
            prompt = "" if given.examples is None else given.own[b].prompt
            if isinstance(prompt, str):
                out += texts
            else:
                out += [[{"role": "assistant", "content": t}] for t in texts]
        return out

    has: dict[str, Callable[[], Any]] = {
        "completions": completions,
        "completion_ids": lambda: [i for g in response_ids(given.batch) for i in g],
    }
    if given.examples is not None:
        has["prompts"] = lambda: repeated(
            [
                e.prompt if isinstance(e.prompt, str) else list(e.prompt)
                for e in given.own
            ]
        )
    return has


def _column(given: Responses, name: str, repeat: int, reward: str) -> list[Any]:
    """A column, one entry per prompt, or per response."""
    out = []
    for e in given.own:
        if name not in e.columns:
            raise ValueError(f"reward {reward} reads {name!r}, which {e.id} lacks")
        out += [e.columns[name]] * repeat
    return out


def response_ids(batch: Batch) -> list[list[list[int]]]:
    """The ids of the scored tokens of every response: B lists of G lists."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    return [
        [t[m].tolist() for t, m in zip(*group, strict=True)]
        for group in zip(tokens, mask, strict=True)
    ]


def whole_texts(given: Responses) -> list[list[str]]:
    """The responses with special tokens, and with the prefill of their prompt."""
    decode = functools.partial(given.tokenizer.decode, keep_specials=True)
    begun = [given.prefill] * len(given.texts)
    if given.examples is not None:
        begun = [detokenize.begun(e.prompt) + given.prefill for e in given.own]
    return [
        [first + decode(ids) for ids in group]
        for first, group in zip(begun, response_ids(given.batch), strict=True)
    ]


def _numbers(
    reward: Bound, form: Signature, out: Any, shape: tuple[int, int], given: Responses
) -> Found:
    """What a reward returned for a batch, as numbers and failures.

    It may be a pair: the rewards, and a dict of those of its members.

    Raises:
      ValueError: another shape.
    """
    members: dict[str, np.ndarray] = {}
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict):
        out, members = out
    first = repr(given.texts[0][0])
    want: tuple[int, ...] = shape
    expected = f"numbers [B, G] = {shape}"
    if form.kind == "completions":
        want = (math.prod(shape),)
        expected = f"a list of {want[0]} numbers"
    if hasattr(out, "__array__") or np.isscalar(out) or out is None:
        items = np.asarray(out)
    else:
        try:
            items = _objects(out, len(want))
        except TypeError as error:
            raise ValueError(
                f"reward {reward.name} gave {type(out).__name__}, expected {expected}, for "
                f"responses the first of which is {first}"
            ) from error
    if items.shape != want:
        raise ValueError(
            f"reward {reward.name} gave shape {items.shape}, expected {expected}, for "
            f"responses the first of which is {first}"
        )
    values, failures = np.zeros(shape), {}
    for (b, g), item in np.ndenumerate(items.reshape(shape)):
        number = _number(item)
        if not isinstance(number, Failure):
            values[b, g] = number
        elif given.valid[b, g]:
            failures[b, g] = number
    return Found(values, failures, members)


def _objects(out: Any, depth: int) -> np.ndarray:
    """Nested sequences as an array of objects; rows of unequal lengths have no shape.

    Raises:
      TypeError: something that is no sequence.
    """
    if isinstance(out, str | Mapping):
        raise TypeError
    rows = list(out)
    if depth == 1:
        items = np.empty(len(rows), object)
        items[:] = rows
        return items
    inner = [r if hasattr(r, "__array__") else list(r) for r in rows]
    if len({len(r) for r in inner}) > 1:
        raise TypeError
    items = np.empty((len(inner), len(inner[0]) if inner else 0), object)
    for i, r in enumerate(inner):
        items[i] = list(r)
    return items


def _number(x: Any) -> float | Failure:
    """x as a finite number, or why it is none."""
    if x is None:
        return Failure("gave None")
    if isinstance(x, str | bytes):
        return Failure(f"gave the text {x!r}, expected a number,")
    try:
        number = float(x)
    except (TypeError, ValueError):
        return Failure(f"gave {type(x).__name__}, expected a number,")
    if not np.isfinite(np.float32(number)):
        return Failure(f"gave {number}")
    return number


def _check_share(
    reward: Bound, given: Responses, failures: Mapping[tuple[int, int], Failure],
    tolerated: float,
) -> None:  # fmt: skip
    """Raises ValueError if more responses have failed than are tolerated."""
    if not failures or len(failures) <= tolerated * given.valid.sum():
        return
    (b, g), first = min(failures.items())
    many = f"; {len(failures)} of {int(given.valid.sum())} responses failed"
    on = "for" if first.cause is None else "on"
    limit = " (rollout.invalid_rewards is the share that may fail)"
    raise ValueError(
        f"reward {reward.name} {first.reason} {on} the response {given.texts[b][g]!r}"
        + many * (len(failures) > 1) + limit * (tolerated > 0) + _trace(first.cause)
    ) from first.cause  # fmt: skip


def described(error: BaseException, limit: float) -> str:
    """What happened; quotes within the message of an error are not escaped."""
    if isinstance(error, time_limit.TimeUp):
        return f"took more than {limit:g} seconds (rollout.reward_seconds)"
    return f"raised {type(error).__name__}({error})"


def _trace(error: BaseException | None) -> str:
    """The part of a traceback that is in the user's own files, on lines of its own."""
    if error is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(OTHERS)]
    return "".join(["\n", *traceback.format_list(own)]).rstrip() if own else ""
