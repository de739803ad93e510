"""Calls a reward function on a batch of responses and checks what it returns.

A response whose reward is no finite number, or for which the function raises or takes too
long, has failed. A call tolerates so many of them and names the first.
"""

import copy
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
from alignax.reward_functions import process, signature, time_limit
from alignax.reward_functions.signature import Signature

# of files that are not the user's
OTHERS = tuple(
    folder + os.sep
    for folder in (os.path.dirname(alignax.__file__), sysconfig.get_path("purelib"))
)


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


NONE = "gave None"
OF_GROUP = "failed for another response of the group, and so"


class _Shape(ValueError):
    """A reward gave something else than a number for every response."""


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

    def part(self, b: int, g: slice = slice(None)) -> "Responses":
        """Some responses to one prompt."""
        at = (slice(b, b + 1), g)
        batch = jax.tree.map(lambda x: x[at[: min(np.ndim(x), 2)]], self.batch)
        if self.examples is not None:
            extra = {**(batch.extra or {}), "row": self.places[b : b + 1]}
            batch = batch._replace(extra=extra)
        return self._replace(batch=batch, texts=[self.texts[b][g]])


def judge(
    reward: Bound, given: Responses, *, apart: bool = True, seconds: float = 0.0,
    tolerated: float = 0.0, none: bool = False,
) -> Judged:  # fmt: skip
    """The rewards of a batch, on this host.

    A function that raises or takes too long on a batch is called for every prompt, and the
    whole group of a prompt on which it does so again has failed: a reward may compare the
    responses of a group.

    Args:
      reward: from `rewards.load`.
      given: responses, and what else the reward may read.
      apart: whether some of the responses can be judged apart; not where all hosts compute
        with an LM together.
      seconds: that one call of the function may take; 0 for any time.
      tolerated: share of the valid responses that may fail.
      none: any number of responses may get None.

    Raises:
      ValueError: more responses fail; the message shows the first and the traceback of the
        function. The reward gave another shape, or needs what is not given.
    """
    form = signature.read(reward.function, reward.name)
    call = _Call(reward, form, seconds)
    valid = given.valid
    if form.kind == "text":
        found = _one_by_one(call, given, tolerated)
    else:
        found = _together(call, given, tolerated if apart else 0.0, apart)
    failed = np.zeros(valid.shape, bool)
    for at in found.failures:
        failed[at] = True
    worse = {
        at: f for at, f in found.failures.items() if not (none and f.reason == NONE)
    }
    _check_share(reward, given, worse, tolerated)
    keep = valid & ~failed
    clean = {
        k: np.where(keep, v, 0.0).astype(np.float32) for k, v in found.members.items()
    }
    return Judged(np.where(keep, found.values, 0.0).astype(np.float32), failed, clean)


class Found(NamedTuple):
    """What calls of a reward gave."""

    values: np.ndarray  # [B, G]
    failures: dict[tuple[int, int], Failure]
    members: dict[str, np.ndarray]  # [B, G]

    def put(self, b: int, g: slice, part: "Found") -> None:
        """Writes what was found for some responses to prompt b."""
        self.values[b : b + 1, g] = part.values
        for label, own in part.members.items():
            whole = self.members.setdefault(label, np.zeros(self.values.shape))
            whole[b : b + 1, g] = own
        for (_, i), failure in part.failures.items():
            self.failures[b, (g.start or 0) + i] = failure


class _Call(NamedTuple):
    """A reward, how it is called, and for how long at most."""

    reward: Bound
    form: Signature
    seconds: float

    def __call__(self, given: Responses) -> Found:
        """One call; what it raises goes on."""
        if self.form.kind == "text":
            ((text,),) = given.texts
            handed: Callable[[], Any] = functools.partial(self.reward.__call__, text)
        else:
            handed = arguments(self.reward, self.form, given)
        with process.kept(self.reward.name), time_limit.limited(self.seconds):
            out = handed()
        if self.form.kind == "text":
            out = [[out]]
        return _numbers(self.reward, self.form, out, given.valid.shape, given)


# sys.exit() in a reward is an error too: it would end the run as if all were well
ERRORS = (Exception, SystemExit, time_limit.TimeUp)


def _together(call: _Call, given: Responses, tolerated: float, apart: bool) -> Found:
    """One call for all responses; if it raises, one for every prompt."""
    arguments(call.reward, call.form, given)  # what is not given is no failure
    try:
        return call(given)
    except _Shape:
        raise
    except ERRORS as error:
        cause = error
    if apart:
        found = _by_prompt(call, given, tolerated)
        if tolerated or found.failures:
            return found
    raise ValueError(
        f"reward {call.reward.name} {described(cause, call.seconds)} on a batch that "
        f"begins with {given.texts[0][0]!r}{_trace(cause)}"
    ) from cause


def _by_prompt(call: _Call, given: Responses, tolerated: float) -> Found:
    """A call for every prompt, until more responses have failed than are tolerated."""
    valid = given.valid
    found = Found(np.zeros(valid.shape), {}, {})
    for b in np.flatnonzero(valid.any(1)).tolist():
        part = given.part(b)
        try:
            found.put(b, slice(None), call(part))
        except _Shape:
            raise
        except ERRORS as error:
            why = Failure(described(error, call.seconds), error)
            single = _one_by_one(call, part, 1.0).failures
            alike = [g for (_, g), f in single.items() if type(f.cause) is type(error)]
            first = min(alike, default=int(valid[b].argmax()))
            for g in np.flatnonzero(valid[b]).tolist():
                mine = single.get((0, g), why) if g == first else Failure(OF_GROUP)
                found.failures[b, g] = mine
        if len(found.failures) > tolerated * valid.sum():
            break
    return found


def _one_by_one(call: _Call, given: Responses, tolerated: float) -> Found:
    """A call for every valid response, until more have failed than are tolerated."""
    valid = given.valid
    found = Found(np.zeros(valid.shape), {}, {})
    for b, g in np.argwhere(valid).tolist():
        one = slice(g, g + 1)
        try:
            found.put(b, one, call(given.part(b, one)))
        except ERRORS as error:
            found.failures[b, g] = Failure(described(error, call.seconds), error)
        if len(found.failures) > tolerated * valid.sum():
            break
    return found


def arguments(reward: Bound, form: Signature, given: Responses) -> Callable[[], Any]:
    """The reward with its arguments bound.

    Raises:
      ValueError: something that it takes is not given here.
    """
    flat = form.kind == "completions"
    has: dict[str, Callable[[], Any]] = {"lms": lambda: _copied(given.lms)}
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
        required = name in form.required
        has[name] = functools.partial(
            _column, given, name, repeat, reward.name, required
        )
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
        "batch": lambda: jax.tree.map(_read_only, given.batch),
        "texts": lambda: [list(group) for group in given.texts],
        "ids": lambda: response_ids(given.batch),
        "given": lambda: given,
    }
    if given.tokenizer is not None:
        has["whole"] = lambda: whole_texts(given)
    if given.examples is not None:
        has["prompts"] = lambda: [copy.deepcopy(e.prompt) for e in given.own]
        has["rows"] = lambda: [dict(e.columns) for e in given.own]
    return has


def _copied(lms: Any) -> Any:
    """LMs in containers of their own: what a reward puts there stays there."""
    if not isinstance(lms, Mapping):
        return lms
    return {name: jax.tree.map(lambda x: x, lm) for name, lm in lms.items()}


def _read_only(array: Any) -> Any:
    """A view of an array that a reward cannot write to."""
    if not isinstance(array, np.ndarray):
        return array  # jax's are constant
    view = array.view()
    view.flags.writeable = False
    return view


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
        has["prompts"] = lambda: [
            copy.deepcopy(e.prompt if isinstance(e.prompt, str) else list(e.prompt))
            for e in repeated(given.own)
        ]
    return has


def _column(
    given: Responses, name: str, repeat: int, reward: str, required: bool
) -> list[Any]:
    """A column, one entry per prompt, or per response; None where a row lacks it."""
    out = []
    for e in given.own:
        if required and name not in e.columns:
            raise ValueError(f"reward {reward} reads {name!r}, which {e.id} lacks")
        out += [e.columns.get(name)] * repeat
    return out


def response_ids(batch: Batch) -> list[list[list[int]]]:
    """The ids of the scored tokens of every response: B lists of G lists."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    return [
        [t[m].tolist() for t, m in zip(*group, strict=True)]
        for group in zip(tokens, mask, strict=True)
    ]


def whole_texts(given: Responses) -> list[list[str]]:
    """The responses with special tokens, replies between turns, and the prefill."""
    tokens, mask = np.asarray(given.batch.tokens), np.asarray(given.batch.mask)

    def decode(ids: np.ndarray, scored: np.ndarray) -> str:
        at = np.flatnonzero(scored)
        span = ids[at[0] : at[-1] + 1] if at.size else ids[:0]
        return given.tokenizer.decode(span.tolist(), keep_specials=True)

    begun = [given.prefill] * len(tokens)
    if given.examples is not None:
        begun = [detokenize.begun(e.prompt) + given.prefill for e in given.own]
    return [
        [first + decode(t, m) for t, m in zip(*group, strict=True)]
        for first, *group in zip(begun, tokens, mask, strict=True)
    ]


def _numbers(
    reward: Bound, form: Signature, out: Any, shape: tuple[int, int], given: Responses
) -> Found:
    """What a reward returned for a batch, as numbers and failures.

    It may be a pair: the rewards, and a dict of those of its members.

    Raises:
      ValueError: another shape.
    """
    members: Mapping[str, Any] = {}
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict):
        out, members = out
    shaped = functools.partial(_shaped, reward, form, shape=shape, given=given)
    values, failures = np.zeros(shape), {}
    for at, item in np.ndenumerate(shaped(out, what="")):
        number = _number(item)
        if not isinstance(number, Failure):
            values[at] = number
        elif given.valid[at]:
            failures[at] = number
    own = {
        str(k): np.asarray(shaped(v, what=f"member {k!r} of "), np.float64)
        for k, v in members.items()
    }
    return Found(values, failures, own)


def _shaped(
    reward: Bound,
    form: Signature,
    x: Any,
    *,
    what: str,
    shape: tuple[int, int],
    given: Responses,
) -> np.ndarray:
    """What a reward returned as an array of objects [B, G]; raises _Shape on another."""
    want: tuple[int, ...] = shape
    expected = f"numbers [B, G] = {shape}"
    if form.kind == "completions":
        want = (math.prod(shape),)
        expected = f"a list of {want[0]} numbers"
    items = _objects(x, len(want))
    if items.shape != want:
        kind = "" if hasattr(x, "__array__") else f" (a {type(x).__name__})"
        raise _Shape(
            f"reward {reward.name} gave {what}shape {items.shape}{kind}, expected "
            f"{expected}, for responses the first of which is {given.texts[0][0]!r}"
        )
    return items.reshape(shape)


def _objects(out: Any, depth: int) -> np.ndarray:
    """Nested sequences as an array of objects, of as many axes as are regular."""
    if hasattr(out, "__array__"):
        return np.asarray(out)
    if out is None or isinstance(out, str | Mapping) or not hasattr(out, "__iter__"):
        return np.empty((), object)
    rows = list(out)
    items = np.empty(len(rows), object)
    items[:] = rows
    if depth == 1 or not rows:
        return items
    inner = [_objects(r, depth - 1) for r in rows]
    same = len({x.shape for x in inner}) == 1 and inner[0].ndim == depth - 1
    return np.stack(inner) if same else items


def _number(x: Any) -> float | Failure:
    """x as a finite number, or why it is none."""
    if x is None:
        return Failure(NONE)
    if isinstance(x, str | bytes):
        return Failure(f"gave the text {x!r}, expected a number,")
    try:
        number = float(x)
    except OverflowError:
        return Failure("gave an integer that no float can hold")
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
    b, g = min(failures, key=lambda at: (failures[at].reason == OF_GROUP, at))
    first = failures[b, g]
    count = sum(f.reason != OF_GROUP for f in failures.values())
    many = f"; {count} of {int(given.valid.sum())} responses failed"
    on = "for" if first.cause is None else "on"
    limit = " (rollout.invalid_rewards is the share that may fail)"
    raise ValueError(
        f"reward {reward.name} {first.reason} {on} the response {given.texts[b][g]!r}"
        + many * (count > 1) + limit * (tolerated > 0) + _trace(first.cause)
    ) from first.cause  # fmt: skip


def described(error: BaseException, limit: float) -> str:
    """What happened; quotes within the message of an error are not escaped."""
    if isinstance(error, time_limit.TimeUp):
        return f"took more than {limit:g} seconds (rollout.reward_seconds)"
    try:
        said = str(error)
    except Exception as second:
        said = f"with a message that raises {type(second).__name__}"
    return f"raised {type(error).__name__}({said})"


def _trace(error: BaseException | None) -> str:
    """The part of a traceback that is in the user's own files, on lines of its own."""
    if error is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(OTHERS)]
    return "".join(["\n", *traceback.format_list(own)]).rstrip() if own else ""
