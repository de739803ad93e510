"""Batch: every experiment is B prompts x G responses x T tokens.

  B prompts   G responses per prompt   T tokens (prompt followed by response, right-padded)
  N = B*G rows   V vocabulary   D width   H heads   K head size   L layers
  S blocks   R rows per block   L tokens per row (of a Layout)

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
# {'role': 'system' | 'user' | 'assistant' | 'tool', 'content': text}, and whatever else the
# chat template reads ('tool_calls', 'reasoning_content', 'name'). A turn with 'weight': 0 or
# 'train': False is read and not scored. The role 'assistant' may have a 'prefill': the
# beginning of its content, which is given to the model and not scored.
Message = dict[str, Any]

FORMS = {  # what a row of data is: see `form`
    "prompts": "a prompt alone",
    "demonstrations": "one response to imitate, without a label",
    "labelled": "one response with a label or a score",
    "mismatched": "one labelled response, and one that answers another prompt",
    "pairs": "a chosen and a rejected response, in this order",
    "groups": "two or more responses, each with a score, in any order",
    "unscored": "two or more responses without scores",
}


class Example(NamedTuple):
    """One prompt and its responses as text: an item of `data/*`, one prompt of a Batch.

    A prompt or a response that is a plain string is one user or one assistant turn.
    A response may hold several turns; only its assistant turns are scored.
    """

    id: str  # its source, e.g. 'train.jsonl:17'
    prompt: str | Sequence[Message]
    responses: Sequence[
        str | Sequence[Message]
    ]  # G of them; pairs are (chosen, rejected)
    feedback: Sequence[float] = ()  # G numbers: label, rank or reward; () means zeros
    columns: Mapping[str, float | str] = MappingProxyType({})  # further keys of the row
    form: str = ""  # one of FORMS; "" = as `form` tells from responses and feedback
    # What this row's chat template gets: 'tools', 'documents', 'enable_thinking', ...
    template: Mapping[str, Any] = MappingProxyType({})


def form(example: Example) -> str:
    """What an example is: one of FORMS.

    Two responses with the feedback (1, 0) are a pair; two with other scores are a group,
    whose order means nothing, unless the example says that it is a pair.
    """
    if example.form:
        return example.form
    many, scored = len(example.responses), bool(len(example.feedback))
    if many < 2:
        return ("prompts", "labelled" if scored else "demonstrations")[many]
    if not scored:
        return "unscored"
    return "pairs" if tuple(example.feedback) == (1.0, 0.0) else "groups"


class Layout(NamedTuple):
    """The packing of a batch in which shared tokens are computed once: see `layout.build`.

    S blocks of R rows of L tokens; block s holds prompts sB/S .. (s+1)B/S - 1 of the
    batch. A row holds several groups. A group is the tokens that its responses share (the
    prompt), followed by one branch per response with its own tokens. A token sees the
    earlier shared tokens of its group and the earlier tokens of its own branch. A layout
    belongs to the tokens and the mask from which it was built; losses read nothing of it.
    """

    tokens: Int[Array, "S R L"]
    positions: Int[Array, "S R L"]  # as in the response's own row: shared, then branch
    group: Int[Array, "S R L"]  # the group of the row that a token is of; 0 is padding
    branch: Int[Array, "S R L"]  # 0 = shared, g + 1 = only in response g
    previous: Int[Array, "S R L"]  # column of the token before, whose state predicts it
    scored: Bool[Array, "S R L"]  # True where the mask of some response is
    places: Int[
        Array, "B G T"
    ]  # index of a token in its block's R * L; 0 behind the last scored one


class Batch(NamedTuple):
    """The input of every loss, evaluation and sampler. Fields are described in place."""

    tokens: Int[Array, "B G T"]  # prompt + response + padding, always right-padded
    mask: Bool[
        Array, "B G T"
    ]  # True on response tokens to score; False on prompt and padding
    lengths: Int[Array, "B G"]  # real tokens in the row; never inferred from pad ids
    feedback: Float[
        Array, "B G"
    ]  # as in the data, without shaping: label {0, 1}, rank or reward
    valid: Bool[
        Array, "B G"
    ]  # False drops a response (ragged group, filtered, eval padding)
    ref_logps: Float[Array, "B G T"] | None = None  # nats, under the frozen reference
    old_logps: Float[Array, "B G T"] | None = (
        None  # nats, under the distribution that was sampled; None = the policy's own
    )
    advantages: Float[Array, "B G T"] | None = None  # from feedback, by shaping/
    layout: Layout | None = None  # built on the host; None = one row per response
    extra: dict[str, Array] | None = None  # further columns, for one method


class Scores(NamedTuple):
    """The differentiable input of a loss: what `logprob.score` computes with an LM."""

    logps: Float[
        Array, "B G T"
    ]  # nats; exactly 0 where mask is False: .sum(-1) is log p(y|x)
    entropy: Float[Array, "B G T"] | None = (
        None  # nats; like all fields below, only if the loss has it in NEEDS
    )
    kl: Float[Array, "B G T"] | None = None  # exact, over the vocabulary: KL(π ‖ ref)
    values: Float[Array, "B G T"] | None = (
        None  # value head on the prefix that ends at t
    )
    forward_kl: Float[Array, "B G T"] | None = None  # KL(ref ‖ π), exact too
    collision: Float[Array, "B G T"] | None = None  # log Σ_v π(v)²
    state_values: Float[Array, "B G T"] | None = (
        None  # value head on the prefix before t: V of the state in which t is sampled
    )
    best: Float[Array, "B G T"] | None = None  # max_v log π(v); no gradient


COMPARED = ("kl", "forward_kl")  # fields of Scores that need a frozen LM
# Of the behaviour policy: rollouts bring them. All other '<name>_logps' are of frozen LMs.
OF_BEHAVIOUR = ("old_logps", "sampler_logps")


class LM(NamedTuple):
    """A model: its static config and its tree of parameters."""

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
    """Raises ValueError unless every scored token is at its place in the layout."""
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
      pad: id of padding; padding is never recognised by this id.

    Returns:
      A Batch of host arrays with feedback [1, 0] in every row.

    Raises:
      ValueError: lists of different lengths, an empty prompt or response, or a row
        longer than `length` (sources truncate, and count what they cut).
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
      pad: id of padding; padding is never recognised by this id.
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
    """B, the number of prompts: the axis that is sharded and split into micro-batches."""
    return jax.tree.leaves(batch)[0].shape[0]
