"""Rewards: what a response is worth, one file per judge.

A reward is a function of one of three forms (see `alignax/reward_functions/signature.py`):

  f(text) -> float                       of one response
  f(texts, answer, ...) -> [B, G]        of all responses, by the names of its arguments
  f(completions, answer, **kwargs)       as in TRL: flat lists

A file here defines `reward`; a dotted name points to any other function. Positional
arguments are handed in, keyword-only arguments are hyper-parameters. The same function
judges rollouts, evaluations, searches and attacks.

Reading order: final_answer (compares with the row), constraints and instructions
(programs; of the run and of the row), model and
sequence_classifier (trained here, or with transformers), judge and self_evaluation
(questions to an LM), ensemble, relevance.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignax import plugin
from alignax.batch import Batch, Example
from alignax.inputs.detokenize import texts
from alignax.inputs.prompts import PromptBatch
from alignax.plugin import Bound
from alignax.reward_functions import calls, signature, time_limit
from alignax.reward_functions.calls import Judged, Responses
from alignax.reward_functions.digest import DIGESTS


def load(reward: str | Mapping[str, Any]) -> Bound:
    """A reward by its name, or by {'name': ..., its hyper-parameters}.

    The `members` of a reward that combines others are loaded too, so that a mistake in one
    of them is reported here.
    """
    spec = {"name": reward} if isinstance(reward, str) else dict(reward)
    if "name" not in spec:
        raise ValueError(f"reward has no 'name': {spec}")
    name = spec.pop("name")
    handed = signature.keywords(plugin.find("rewards", name))
    bound = plugin.load("rewards", name, spec, handed=handed)
    signature.read(bound.function, bound.name)
    for label, member in bound.hyper.get("members", {}).items():
        try:
            load(member if isinstance(member, str) else dict(member))
        except (ValueError, TypeError) as error:
            raise ValueError(f"member {label!r} of {bound.name}: {error}") from error
    return bound


def attempt(
    reward: Bound, batch: Batch, texts: list[list[str]], lms: Any, *, tokenizer: Any = None,
    score: Callable | None = None, examples: Sequence[Example] | None = None,
    prefill: str = "", seconds: float = 0.0, tolerated: float = 0.0,
) -> Judged:  # fmt: skip
    """Rewards of B groups of G responses, some of which may fail.

    Args:
      reward: from `load`.
      batch: prompts and responses; extra['row'], int32[B], are places in `examples`.
      texts: the responses as text, B lists of G.
      lms: frozen LMs by name.
      tokenizer: the one that made the batch.
      score: `logprob.score` of host batches, spread over the run's devices (see
        `parallel.scorer`); for rewards that read an LM, which otherwise use one device.
      examples: whose prompts and columns a reward may read; every host holds all of them.
        Without extra['row'] they are the B of this batch.
      prefill: that all responses were begun with, beside that of their prompt.
      seconds: that one call of a function that reads no LM may take; 0 for
        `time_limit.usual`.
      tolerated: share of the responses that may fail (see `reward_functions.calls`).

    Returns:
      Rewards [B, G] float32, 0 where not valid; and which responses failed. On every
      host the same.

    Raises:
      ValueError: more responses failed than are tolerated, and the message shows the
        first; the reward gave another shape, or it needs an argument that is not given.
        It raised on some hosts only, or its numbers differ between hosts.
    """
    given = Responses(batch, texts, lms, tokenizer, score, examples, prefill)
    read = names(reward)
    several = jax.process_count() > 1
    how: dict[str, Any] = {
        "apart": not (several and "score" in read), "tolerated": tolerated,
        "seconds": 0.0 if {"lms", "score"} & read else seconds or time_limit.usual(),
    }  # fmt: skip
    if not several:
        return calls.judge(reward, given, **how)
    found, error = None, None
    try:
        found = calls.judge(reward, given, **how)
    except Exception as e:  # the other hosts wait in the allgather
        error = e
    return _agreed(reward, given, found, error)


def _agreed(
    reward: Bound, given: Responses, found: Judged | None, error: Exception | None
) -> Judged:
    """What all hosts found: a response that failed on one host has failed.

    A time limit may be exceeded on one host only, so it is outside of what is the same in
    every run of a config.
    """
    nothing = np.zeros(given.valid.shape, np.float32)
    mine = [nothing, nothing] if found is None else [found.failed, found.values]
    everywhere = multihost_utils.process_allgather(
        np.stack([*mine, np.full_like(nothing, error is not None)]).astype(np.float32)
    )
    if error is not None:
        raise error
    failed, values, raised = everywhere.swapaxes(0, 1)
    if raised.any():
        raise ValueError(
            f"reward {reward.name} raised on hosts "
            f"{np.flatnonzero(raised.any((1, 2))).tolist()}; see their output"
        )
    assert found is not None
    bad = failed.any(0)
    values = np.where(bad, np.float32(0), values)
    if (values != values[:1]).any():
        raise ValueError(
            f"reward {reward.name} gave hosts different numbers for the same responses: "
            "every host computes the reward itself, so it must be deterministic"
        )
    return Judged(found.values * ~bad, bad, found.members)


def call(
    reward: Bound, batch: Batch, texts: list[list[str]], lms: Any, **given: Any
) -> np.ndarray:
    """Rewards [B, G] of responses none of which may fail; arguments as for `attempt`."""
    return attempt(reward, batch, texts, lms, **given).values


def of_samples(
    reward: Bound, batch: Batch, prompts: PromptBatch, lms: Any, *, tokenizer: Any,
    score: Callable | None = None,
) -> tuple[np.ndarray, list[list[str]]]:  # fmt: skip
    """Rewards [B, G] of responses to a batch of prompts, and their texts.

    Args:
      reward: from `load`.
      batch: the responses.
      prompts: what they answer, with the rows of the data.
      lms, tokenizer, score: as for `attempt`.
    """
    extra: Any = prompts.extra
    batch = batch._replace(extra=extra)
    words = texts(batch, tokenizer)
    values = call(
        reward, batch, words, lms, tokenizer=tokenizer, score=score,
        examples=prompts.examples,
    )  # fmt: skip
    return values, words


def check(reward: Bound, examples: Sequence[Example]) -> list[str]:
    """`columns` of examples.

    Raises:
      ValueError: as `columns`; or an example lacks a column that the reward names.
    """
    if not reads_rows(reward):
        return []  # without reading the data once more
    lacking: dict[str, int] = {}
    available: set[str] = set()
    for i in range(len(examples)):
        mine = {*examples[i].columns}
        for name in mine - available if i else ():
            lacking[name] = 0
        for name in available - mine:
            lacking.setdefault(name, i)
        available |= mine
    read = columns(reward, sorted(available))
    required = {name for form in forms(reward) for name in form.required}
    for name in sorted({*read} & {*lacking} & required):
        raise ValueError(
            f"reward {reward.name} reads the column {name!r}, which "
            f"{examples[lacking[name]].id} lacks"
        )
    return read


def columns(reward: Bound, available: Sequence[str]) -> list[str]:
    """Names of the columns of the data that a reward and its members read, sorted.

    Raises:
      ValueError: it takes an argument that is neither a column nor a name of
        `reward_functions.signature.NAMES`.
    """
    form = signature.read(reward.function, reward.name)
    signature.check(form, available, reward.name)
    read = {*signature.columns(form, available)}
    for member in members(reward).values():
        read |= {*columns(member, available)}
    return sorted(read)


def reads_rows(reward: Bound) -> bool:
    """Whether a reward, or one of its members, may read columns of the data."""
    return any(map(signature.reads_rows, forms(reward)))


def names(reward: Bound) -> set[str]:
    """Names that a reward is handed; of one that combines others, those of its members."""
    return {name for form in forms(reward) for name in form.names}


def forms(reward: Bound) -> list[signature.Signature]:
    """The signature of a reward; of one that combines others, those of its members."""
    if several := members(reward):
        return [form for member in several.values() for form in forms(member)]
    return [signature.read(reward.function, reward.name)]


def members(reward: Bound) -> dict[str, Bound]:
    """The rewards that a reward combines, by label."""
    return {
        label: load(member if isinstance(member, str) else dict(member))
        for label, member in reward.hyper.get("members", {}).items()
    }


def identity(reward: Bound, earlier: int = 0) -> str:
    """What the numbers of a reward depend on, as far as it can be read: names and code.

    Comments, docstrings and the layout of the source do not count.

    Args:
      reward: from `load`.
      earlier: 0, or the place in `digest.DIGESTS` of what an earlier version saved.
    """
    several = {k: identity(m, earlier) for k, m in members(reward).items()}
    parts = [
        reward.name, sorted(reward.hyper.items()), DIGESTS[earlier](reward.function),
        sorted(several.items()),
    ]  # fmt: skip
    return " ".join(str(p) for p in parts if p != [])
