"""Rewards: `reward(batch, texts, lms, *, ...) -> f32[B, G]`, one file per judge.

A dotted name may also point to any function from a response's text to a number. A reward
that takes the keywords `tokenizer` or `score` receives those of the run, and as `asked` the
prompts as messages or text.

Reading order: constraints (a program), model (a trained reward model), ensemble, relevance.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax import plugin
from alignax.plugin import Bound


def load(reward: str | Mapping[str, Any]) -> Bound:
    """A reward by its name, or by {'name': ..., its hyper-parameters}.

    The `members` of a reward that combines others are loaded too, so that a mistake in one
    of them is reported here.
    """
    spec = {"name": reward} if isinstance(reward, str) else dict(reward)
    if "name" not in spec:
        raise ValueError(f"reward has no 'name': {spec}")
    name = spec.pop("name")
    bound = plugin.load("rewards", name, spec)
    for label, member in bound.hyper.get("members", {}).items():
        try:
            load(member if isinstance(member, str) else dict(member))
        except (ValueError, TypeError) as error:
            raise ValueError(f"member {label!r} of {bound.name}: {error}") from error
    return bound


def call(
    reward: Bound, batch, texts: list[list[str]], lms, *, tokenizer=None,
    score: Callable | None = None, asked: Sequence[Any] | None = None,
) -> np.ndarray:  # fmt: skip
    """Scores B groups of G responses with a reward file or a function of text.

    Args:
      reward: from `load`.
      batch: prompts and responses.
      texts: the responses as text, B lists of G.
      lms: frozen LMs by name.
      tokenizer: the one that made the batch; for rewards that read the prompt's text.
      score: `logprob.score` of host batches, spread over the run's devices (see
        `parallel.scorer`); for rewards that read an LM, which otherwise use one device.
      asked: the B prompts as messages or text, where they are known; for rewards that
        read an LM of another tokenizer.

    Returns:
      [B, G] float32, finite on valid responses and 0 on the others; on every host the
      same.

    Raises:
      ValueError: the reward raised, gave another shape or a number that is not finite;
        the message shows the response that caused it. It needs an argument that was not
        given. It raised on some hosts only, or its numbers differ between hosts.
    """
    if jax.process_count() == 1:
        return _judged(reward, batch, texts, lms, tokenizer, score, asked)
    values, failure = None, None
    try:
        values = _judged(reward, batch, texts, lms, tokenizer, score, asked)
    except Exception as error:  # the other hosts wait in the allgather
        failure = error
    digest = 0 if values is None else zlib.crc32(np.ascontiguousarray(values).tobytes())
    mine = np.array([failure is not None, digest], np.uint32)
    failed, digests = multihost_utils.process_allgather(mine).T
    if failure is not None:
        raise failure
    if failed.any():
        raise ValueError(
            f"reward {reward.name} raised on hosts {np.flatnonzero(failed).tolist()}; "
            "see their output"
        )
    if len(set(digests.tolist())) > 1:
        raise ValueError(
            f"reward {reward.name} gave hosts different numbers for the same responses: "
            "every host computes the reward itself, so it must be deterministic"
        )
    assert values is not None
    return values


def identity(reward: Bound, *, digest: Callable[[Callable], str] | None = None) -> str:
    """What the numbers of a reward depend on, as far as it can be read: names and code.

    Comments, docstrings and the layout of the source do not count.

    Args:
      reward: from `load`.
      digest: of a function; `saved_digest` by default.
    """
    digest = digest or saved_digest
    members = {
        label: identity(
            load(member if isinstance(member, str) else dict(member)), digest=digest
        )
        for label, member in reward.hyper.get("members", {}).items()
    }
    parts = [
        reward.name, sorted(reward.hyper.items()), digest(reward.function),
        sorted(members.items()),
    ]  # fmt: skip
    return " ".join(str(p) for p in parts if p != [])


def earlier_identity(reward: Bound) -> str:
    """The identity that runs before 2026-12 saved, in which comments and docstrings count.

    The docstrings of this package's rewards have changed since, so EARLIER holds the
    digest of their source at the time; the source of any other function is read again.
    """

    def digest(function: Callable) -> str:
        now = saved_digest(function)
        return EARLIER.get(now) or _digest(_source(function))

    return identity(reward, digest=digest)


# saved_digest of a reward -> the digest of its source at commit 2628565.
EARLIER: dict[str, str] = {
    "6a0459135f010bb8": "28455d78bbf2763d",  # constraints
    "91989e8a084975b2": "c071a8295fc8a781",  # ensemble
    "ded57b2fd2be0487": "7607432f0f4c40e8",  # model
    "e33aeb694ca0fedd": "c98c8c18b9c2a89f",  # relevance
}


# code_digest of a reward -> that of earlier code with the same numbers, which runs have
# saved. An entry holds only as long as the code is the same.
SAME: dict[str, str] = {
    "23bd83a425404267": "ded57b2fd2be0487",  # model: text for another tokenizer
    "fea3581b95690c66": "91989e8a084975b2",  # ensemble: hands on the prompts
}


def saved_digest(function: Callable) -> str:
    """`code_digest`; of code that changed without its numbers, the digest from before."""
    now = code_digest(function)
    return SAME.get(now, now)


def code_digest(function: Callable) -> str:
    """16 hex digits of a function's syntax tree without comments and docstrings."""
    if isinstance(function, functools.partial):
        keywords = sorted(function.keywords.items())
        return _digest(repr((code_digest(function.func), function.args, keywords)))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        # defined interactively, or a lambda in the middle of an expression
        return _digest(_source(function))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            body[:1] = [] if len(body) > 1 else [ast.Pass()]
    return _digest(repr(_plain_tree(tree)))


def _is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _plain_tree(node: Any) -> Any:
    """A syntax tree as tuples, without the empty fields that Python versions add."""
    if isinstance(node, list):
        return tuple(map(_plain_tree, node))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        (k, _plain_tree(v)) for k, v in ast.iter_fields(node) if v not in (None, [])
    ]
    return (type(node).__name__, *fields)


def _source(function: Callable) -> str:
    """The source text, or the byte code where there is none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # defined interactively, or no plain function
        made: Any = getattr(function, "__code__", None)
        return made.co_code.hex() if made else type(function).__qualname__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _judged(
    reward: Bound, batch, texts: list[list[str]], lms, tokenizer, score, asked
) -> np.ndarray:
    """The rewards that this host computes, [B, G]."""
    parameters = inspect.signature(reward.function).parameters
    if "batch" in parameters:
        handed = {"tokenizer": tokenizer, "score": score, "asked": asked}
        handed = {k: v for k, v in handed.items() if k in parameters and v is not None}
        for name, p in parameters.items():
            if name in plugin.HANDED and p.default is p.empty and name not in handed:
                raise ValueError(
                    f"reward {reward.name} reads the {name}, which is not given here"
                )
        try:
            values = np.asarray(reward(batch, texts, lms, **handed), np.float32)
        except Exception as error:
            # scores of an LM over several hosts cannot be computed one response at a time
            alone = jax.process_count() == 1 or "score" not in handed
            text = _culprit(reward, batch, texts, lms, handed) if alone else None
            on = "a batch that begins with" if text is None else "the response"
            raise ValueError(
                f"reward {reward.name} raised {_described(error)} on {on} "
                f"{texts[0][0] if text is None else text!r}"
            ) from error
    else:
        counts = np.asarray(batch.valid)
        values = np.zeros(counts.shape, np.float32)
        for b, g in np.argwhere(counts):
            values[b, g] = _one(reward, texts[b][g])
    shape = (len(texts), len(texts[0]))
    if values.shape != shape:
        raise ValueError(
            f"reward {reward.name} gave shape {values.shape} for {shape} responses, the "
            f"first being {texts[0][0]!r}"
        )
    valid = np.asarray(batch.valid)
    bad = np.argwhere(valid & ~np.isfinite(values))
    if len(bad):
        b, g = bad[0]
        raise ValueError(
            f"reward {reward.name} gave {values[b, g]} for the response {texts[b][g]!r}"
        )
    return np.where(valid, values, 0.0).astype(np.float32)


def _culprit(reward: Bound, batch, texts, lms, handed) -> str | None:
    """The first response on which a reward raises when it is scored alone."""
    for b, group in enumerate(texts):
        for g, text in enumerate(group):
            rows = (slice(b, b + 1), slice(g, g + 1))
            mine = dict(handed)
            if "asked" in mine:
                mine["asked"] = mine["asked"][b : b + 1]
            try:
                some = jax.tree.map(lambda x, at=rows: x[at[: min(x.ndim, 2)]], batch)
                reward(some, [[text]], lms, **mine)
            except Exception:
                return text
    return None


def _one(reward: Bound, text: str) -> float:
    try:
        return float(reward(text))
    except Exception as error:
        raise ValueError(
            f"reward {reward.name} raised {_described(error)} on the response {text!r}"
        ) from error


def _described(error: Exception) -> str:
    """As repr, but quotes within the message are not escaped."""
    return f"{type(error).__name__}({error})"
