"""Batch: every experiment is B prompts x G responses x T tokens.

  B prompts   G responses per prompt   T tokens (prompt followed by response, right-padded)
  N = B*G rows   V vocabulary   D width   H heads   K head size   L layers
  S blocks   R rows a block   L tokens a row (of a Layout)

SFT is G=1, preference pairs are G=2 (slot 0 chosen, slot 1 rejected), rankings G=K,
RL groups and best-of-N G=N.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]  # nested dict of arrays, the tree that a model owns
Number = float | Float[Array, ""]  # a hyper-parameter of a loss: traced in a step
Metrics = dict[str, Any]  # name -> scalar (evaluations may add 'samples': rows of text)
# {'role': 'system' | 'user' | 'assistant', 'content': text}; an assistant's may have a
# 'prefill': the beginning of its content that it is given and that is not scored.
Message = dict[str, str]


class Example(NamedTuple):
    """One prompt and its responses as text: what `data/*` yields, one row of a Batch.

    A prompt or a response that is a plain string is one user or one assistant turn.
    A response may hold several turns; only its assistant turns are scored.
    """

    id: str  # where it came from, e.g. 'train.jsonl:17'
    prompt: str | Sequence[Message]
    responses: Sequence[
        str | Sequence[Message]
    ]  # G of them; pairs are (chosen, rejected)
    feedback: Sequence[float] = ()  # G numbers: label, rank or reward; () means zeros
    columns: Mapping[str, float] = MappingProxyType({})  # one number each: Batch.extra


class Layout(NamedTuple):
    """Where the tokens of a batch stand when each is computed once: see `layout.build`.

    S blocks of R rows of L tokens; block s holds prompts sB/S .. (s+1)B/S - 1 of the
    batch. In a row stand several groups, each its shared tokens (the prompt) and then
    what each response goes on with. A token sees the shared tokens before it and those
    before it of its own branch. A layout belongs to the tokens and the mask it was built
    from; it holds no number of theirs that a loss reads.
    """

    tokens: Int[Array, "S R L"]
    positions: Int[Array, "S R L"]  # in its own response's row: every branch goes on
    group: Int[Array, "S R L"]  # which group of its row a token is of; 0 is padding
    branch: Int[Array, "S R L"]  # 0 = shared, g + 1 = of response g alone
    previous: Int[Array, "S R L"]  # column of the token before, whose state predicts it
    scored: Bool[Array, "S R L"]  # True where some response's mask is
    places: Int[
        Array, "B G T"
    ]  # place in the block's R * L of a token; 0 behind the last scored one


class Batch(NamedTuple):
    """What every loss, evaluation and sampler reads. Fields are described in place."""

    tokens: Int[Array, "B G T"]  # prompt + response + padding, always right-padded
    mask: Bool[
        Array, "B G T"
    ]  # True on response tokens to score; False on prompt and padding
    lengths: Int[Array, "B G"]  # real tokens in the row; never inferred from pad ids
    feedback: Float[
        Array, "B G"
    ]  # what the world says, raw: label {0,1}, rank or reward
    valid: Bool[
        Array, "B G"
    ]  # False drops a response (ragged group, filtered, eval padding)
    ref_logps: Float[Array, "B G T"] | None = None  # nats, under the frozen reference
    old_logps: Float[Array, "B G T"] | None = (
        None  # nats, under the law that sampled it
    )
    advantages: Float[Array, "B G T"] | None = None  # what shaping/ made of feedback
    layout: Layout | None = None  # host-built; None = one row per response
    extra: dict[str, Array] | None = None  # columns private to one method


class Scores(NamedTuple):
    """The differentiable half of a loss: what the kernel read off one LM."""

    logps: Float[
        Array, "B G T"
    ]  # nats; exactly 0 where mask is False: .sum(-1) is log p(y|x)
    entropy: Float[Array, "B G T"] | None = (
        None  # each filled only when a loss NEEDS it
    )
    kl: Float[Array, "B G T"] | None = None  # exact, over the vocabulary: KL(π ‖ ref)
    values: Float[Array, "B G T"] | None = (
        None  # scalar head on the prefix that ends at t
    )
    forward_kl: Float[Array, "B G T"] | None = None  # KL(ref ‖ π), likewise
    collision: Float[Array, "B G T"] | None = None  # log Σ_v π(v)²
    state_values: Float[Array, "B G T"] | None = (
        None  # scalar head on the prefix before t: a critic's V when t is drawn
    )


COMPARED = ("kl", "forward_kl")  # fields of Scores that need a frozen LM


class LM(NamedTuple):
    """A model is data: a static config and a tree of parameters."""

    config: (
        Any  # models.transformer.ModelConfig, a frozen dataclass registered as static
    )
    params: Params


def check(batch: Batch) -> Batch:
    """Returns `batch` unchanged if its fields agree with each other.

    Args:
      batch: host arrays, or device arrays that this process can read.

    Raises:
      ValueError: names the field, what it holds and what was expected.
    """
    tokens = np.asarray(batch.tokens)
    if tokens.ndim != 3:
        raise ValueError(f"Batch.tokens has shape {tokens.shape}, expected [B, G, T]")
    b, g, t = tokens.shape
    shapes = dict(
        mask=(b, g, t), lengths=(b, g), feedback=(b, g), valid=(b, g),
        ref_logps=(b, g, t), old_logps=(b, g, t), advantages=(b, g, t),
    )  # fmt: skip
    for name, shape in shapes.items():
        value = getattr(batch, name)
        if value is not None and np.shape(value) != shape:
            raise ValueError(
                f"Batch.{name} has shape {np.shape(value)}, expected {shape}"
            )
    for name, kinds in (
        ("tokens", "iu"),
        ("lengths", "iu"),
        ("mask", "b"),
        ("valid", "b"),
    ):
        dtype = np.asarray(getattr(batch, name)).dtype
        if dtype.kind not in kinds:
            kind = {"iu": "integers", "b": "booleans"}[kinds]
            raise ValueError(f"Batch.{name} has dtype {dtype}, expected {kind}")
    if (tokens < 0).any():
        raise ValueError("Batch.tokens holds negative ids, expected ids >= 0")
    lengths, mask = np.asarray(batch.lengths), np.asarray(batch.mask)
    if (lengths < 0).any() or (lengths > t).any():
        raise ValueError(
            f"Batch.lengths spans {lengths.min()}..{lengths.max()}, expected 0..T={t}"
        )
    if (mask & (np.arange(t) >= lengths[..., None])).any():
        raise ValueError(
            "Batch.mask is True beyond Batch.lengths, expected False on padding"
        )
    if mask[..., 0].any():
        raise ValueError(
            "Batch.mask is True at t=0, but the first token has no prefix to score"
        )
    if (np.asarray(batch.valid) & ~mask.any(-1)).any():
        raise ValueError("Batch.valid is True on a response without a scored token")
    if batch.layout is not None:
        _check_layout(batch.layout, tokens, mask)
    return batch


def _check_layout(layout: Layout, tokens: np.ndarray, mask: np.ndarray) -> None:
    """Every scored token stands, and is scored, where the layout says that it does."""
    places = np.asarray(layout.places)
    blocks = len(layout.tokens)
    if places.shape != tokens.shape or len(tokens) % blocks:
        raise ValueError(
            f"Batch.layout has places {places.shape} in {blocks} blocks, expected "
            f"{tokens.shape}"
        )

    def at(field):
        rows = np.asarray(field).reshape(blocks, -1)
        found = np.take_along_axis(rows, places.reshape(blocks, -1), 1)
        return found.reshape(tokens.shape)

    if (mask & ((at(layout.tokens) != tokens) | ~at(layout.scored))).any():
        raise ValueError(
            "Batch.layout holds other tokens, or scores others: lay the batch out anew "
            "after a change of tokens or mask"
        )


def from_pairs(prompts, chosen, rejected, *, length: int, pad: int = 0) -> Batch:
    """Builds a preference batch (G=2, slot 0 chosen) from lists of token ids.

    Args:
      prompts: B lists of token ids, each with at least one token.
      chosen: B lists of token ids, each non-empty.
      rejected: B lists of token ids, each non-empty.
      length: T, tokens per row.
      pad: id written on padding; no meaning is ever read from it.

    Returns:
      A Batch of host arrays with feedback [1, 0] in every row.

    Raises:
      ValueError: lists of different lengths, an empty prompt or response, or a row
        longer than `length` (truncation is the source's business: it must be counted).
    """
    if not len(prompts) == len(chosen) == len(rejected):
        raise ValueError(
            f"from_pairs got {len(prompts)} prompts, {len(chosen)} chosen and "
            f"{len(rejected)} rejected; expected as many of each"
        )
    pairs = list(zip(chosen, rejected, strict=True))
    feedback = [(1.0, 0.0)] * len(pairs)
    return from_groups(prompts, pairs, length=length, pad=pad, feedback=feedback)


def from_groups(
    prompts, responses, *, length: int, pad: int = 0, feedback=None, scored=None
) -> Batch:
    """Builds a batch of groups from lists of token ids.

    Args:
      prompts: B lists of token ids, each with at least one token.
      responses: B lists of up to G non-empty lists of token ids; a group that is
        smaller than the largest one is filled with invalid rows.
      length: T, tokens per row.
      pad: id written on padding; no meaning is ever read from it.
      feedback: B lists of numbers shaped like `responses`, or None for zeros.
      scored: B lists of lists of booleans shaped like `responses`, True on the tokens
        to score (several turns in one response), or None to score every response token.

    Returns:
      A Batch of host arrays, [B, G, length].

    Raises:
      ValueError: an empty prompt or response, or a row longer than `length`.
    """
    if len(prompts) != len(responses):
        raise ValueError(
            f"from_groups got {len(prompts)} prompts and {len(responses)} groups of responses"
        )
    b, g = len(prompts), max((len(r) for r in responses), default=0)
    tokens = np.full((b, g, length), pad, np.int32)
    mask = np.zeros((b, g, length), bool)
    lengths = np.zeros((b, g), np.int32)
    values = np.zeros((b, g), np.float32)
    valid = np.zeros((b, g), bool)
    for i, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        for j, response in enumerate(group):
            if not len(prompt) or not len(response):
                raise ValueError(
                    f"row [{i}, {j}] has {len(prompt)} prompt and {len(response)} response "
                    "tokens; each needs at least one"
                )
            end = len(prompt) + len(response)
            if end > length:
                raise ValueError(
                    f"row [{i}, {j}] has {end} tokens, but length is {length}"
                )
            tokens[i, j, :end] = [*prompt, *response]
            mask[i, j, len(prompt) : end] = True if scored is None else scored[i][j]
            lengths[i, j] = end
            valid[i, j] = mask[i, j].any()
            if feedback is not None:
                values[i, j] = feedback[i][j]
    fields: tuple[Any, ...] = (tokens, mask, lengths, values, valid)  # on the host
    return Batch(*fields)


def flatten(batch: Batch) -> tuple[Any, Any, Any]:
    """Returns (tokens, mask, lengths) as [N, T], [N, T], [N] with N = B*G."""
    b, g, t = batch.tokens.shape
    return (
        batch.tokens.reshape(b * g, t),
        batch.mask.reshape(b * g, t),
        batch.lengths.reshape(b * g),
    )


def num_rows(batch: Batch) -> int:
    """B, the number of prompts: the size that shards and accumulates."""
    return jax.tree.leaves(batch)[0].shape[0]
