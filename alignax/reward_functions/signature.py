"""Which arguments a reward function gets: one rule, by the names in its signature.

  f(text) -> float                          one positional name, which is none of NAMES
  f(texts, rows, ...) -> [B, G]             names of NAMES and columns of the data
  f(completions, answer, **kwargs) -> [N]   TRL's form: flat lists, N = B * G

Positional arguments are handed in. Keyword-only arguments are hyper-parameters, set in the
config; `tokenizer` and `score` may be either.
"""

import difflib
import inspect
from collections.abc import Callable, Collection
from typing import NamedTuple

NAMES = {  # what a positional argument of this name gets
    "texts": "B lists of G responses as text; several turns are on lines of their own",
    "whole": "the same, with special tokens, replies, and what the response began with",
    "ids": "B lists of G lists of token ids of the responses",
    "prompts": "B prompts: text or messages",
    "rows": "B dicts of all columns of the data, numbers or text",
    "batch": "the Batch; arrays of [B, G, T]",
    "lms": "frozen LMs by name",
    "tokenizer": "the tokenizer of the run",
    "score": "logprob.score of host batches, over the devices of the run",
    "given": "all of these (`calls.Responses`), to hand on to another reward",
}
FLAT = ("prompts", "completions", "completion_ids")  # names of TRL's form
EITHER = ("tokenizer", "score")  # handed in also where they are keyword-only
TEXT = (
    "text",
    "response",
    "completion",
    "output",
    "answer_text",
)  # names of a response
KINDS = ("text", "groups", "completions")


class Signature(NamedTuple):
    """The arguments of a reward function.

    Attributes:
      kind: one of KINDS, the forms above.
      required: names without a default that are handed in.
      optional: names with a default; handed in where there is something of that name.
      rest: whether it takes any keyword; it then gets all other columns.
      first: its first names are positional-only, so many.
    """

    kind: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    rest: bool = False
    first: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """All names that may be handed in."""
        return (*self.required, *self.optional)


def read(function: Callable, name: str = "") -> Signature:
    """The signature of a reward function.

    Args:
      function: the reward.
      name: of the reward in messages.

    Raises:
      ValueError: a function without a positional argument, or with *args.
    """
    name = name or getattr(function, "__name__", "reward")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin that does not tell
        return Signature("text", ("text",), first=1)
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward {name} is async; wrap it in a function that waits")
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ValueError(f"reward {name} takes *args; {_expected()}")
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    flat = any(p.name == "completions" for p in parameters)
    handed = [p for p in parameters if _is_handed(p, flat)]
    required = tuple(p.name for p in handed if p.default is p.empty)
    optional = tuple(p.name for p in handed if p.default is not p.empty)
    first = sum(p.kind is p.POSITIONAL_ONLY for p in parameters)
    if flat:
        return Signature("completions", required, optional, rest, first)
    if not required:
        if not any(n in NAMES for n in optional):
            raise ValueError(f"reward {name} has no positional argument; {_expected()}")
    elif len(required) == 1 and required[0] not in NAMES:
        return Signature("text", required, optional, rest, first)
    return Signature("groups", required, optional, rest, first)


def _is_handed(parameter: inspect.Parameter, flat: bool) -> bool:
    p = parameter
    if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
        return True
    if p.kind is not p.KEYWORD_ONLY:
        return False
    # TRL passes everything by keyword, so a function may ask for columns behind a '*'
    return p.name in (*EITHER, *(FLAT if flat else ())) or (
        flat and p.default is p.empty
    )


def keywords(function: Callable) -> tuple[str, ...]:
    """Keyword-only names that are handed in, and so are no hyper-parameters."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    flat = any(p.name == "completions" for p in parameters)
    return tuple(
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY and _is_handed(p, flat)
    )


def reads_rows(signature: Signature) -> bool:
    """Whether a reward may read columns of the data."""
    known = (*FLAT, *EITHER, "lms") if signature.kind == "completions" else (*NAMES,)
    named = {*signature.names} - {*known}
    every = signature.rest or "rows" in signature.names
    return signature.kind != "text" and bool(named or every)


def columns(signature: Signature, available: Collection[str]) -> list[str]:
    """Names of the columns of the data that a reward reads, sorted."""
    if signature.kind == "text":
        return []
    if signature.rest or "rows" in signature.names:
        return sorted(available)
    known = FLAT if signature.kind == "completions" else NAMES
    return sorted(n for n in signature.names if n in available and n not in known)


def check(signature: Signature, available: Collection[str], name: str) -> None:
    """Raises ValueError for an argument that nothing is handed in for.

    Args:
      signature: of the reward.
      available: names of the columns of the data.
      name: of the reward in messages.
    """
    if signature.kind == "text":
        _check_text(signature, available, name)
        return
    flat = signature.kind == "completions"
    known = (*FLAT, *EITHER, "lms") if flat else (*NAMES,)
    unknown = [n for n in signature.required if n not in (*known, *available)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*known, *available], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"reward {name} takes {unknown[0]!r}{hint}, which is neither a column of the "
            f"data, {sorted(available) or 'which have none'}, nor one of {', '.join(known)}; "
            "hyper-parameters are keyword-only arguments, behind a '*'"
        )
    both = sorted({*signature.names} & {*known} & {*available})
    if flat:  # all of them are handed in, if it takes any keyword
        both = sorted({*FLAT} & {*available} & {*(FLAT if signature.rest else both)})
    if both:
        raise ValueError(
            f"the data have a column {both[0]!r}, and a reward gets something else under "
            f"this name: rename it, as in config.data.columns = {{{both[0]!r}: "
            f"'my_{both[0]}'}}"
        )


def _check_text(signature: Signature, available: Collection[str], name: str) -> None:
    """Raises ValueError for a function of a text that would miss an argument."""
    first, *others = signature.names
    lost = [n for n in others if n in available or n in NAMES]
    lost += ["**"] * signature.rest
    lost += [first] * (first in available and first not in TEXT)
    if lost:
        raise ValueError(
            f"reward {name} would get the text of one response as {first!r} and nothing "
            f"else, but it has {lost[0]!r} too: name its first argument 'texts' (B lists of "
            "G) or 'completions' (a flat list), then columns are handed in"
        )


def _expected() -> str:
    return (
        "expected f(text), or arguments named like columns of the data or one of "
        + ", ".join(NAMES)
        + ", or TRL's completions"
    )
