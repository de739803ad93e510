"""Responses of several turns: between two turns of the policy a function of the user's replies.

  prompt, turn, reply, turn, reply, ... turn      the turns of the policy are scored

The row of such a response holds the replies as the chat template renders them, with the
mask False on them: losses, ratios and KLs are of the policy's own tokens. Each turn is
drawn after everything before it, so that its log-probabilities are those of the whole row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.batch import Batch, Example, Message
from alignax.inputs.prompts import PromptBatch
from alignax.sampling.decode import Generated
from alignax.text.tokenizer import Tokenizer

SAID = "A"  # stands for a turn of the policy where only what follows it is looked for
Reply = Callable[[list[dict[str, Any]], list[list[str]]], Sequence[str | None]]


class Conversation(NamedTuple):
    """How responses of several turns go on.

    Attributes:
      reply: (rows, texts) -> replies, one for each conversation that goes on. `rows` are
        mappings of all columns of its row, `texts` the policy's turns so far. A reply is
        the text of a user turn, or None where the conversation is done. It is called on
        every host and has to give all of them the same.
      turns: most turns of the policy.
    """

    reply: Reply
    turns: int


class _State(NamedTuple):
    """N = B x G conversations on the host; the arrays are changed in place."""

    tokens: np.ndarray  # [N, T]
    mask: np.ndarray  # [N, T] True on the policy's tokens
    old: np.ndarray  # [N, T] nats, under the sampling distribution
    raw: np.ndarray  # [N, T] nats, under the unmodified policy
    starts: np.ndarray  # [N] tokens of the prompt
    ends: np.ndarray  # [N] tokens so far
    live: np.ndarray  # [N] the policy has another turn
    truncated: np.ndarray  # [N]
    texts: list[list[str]]  # the policy's turns
    replies: list[list[str]]


def converse(
    say: Callable[..., Generated], conversation: Conversation, prompts: PromptBatch,
    tokenizer: Tokenizer, *, group: int, max_new: int,
) -> Generated:  # fmt: skip
    """Draws a group of conversations after every prompt.

    Args:
      say: (turn, tokens, lengths, group, limits) -> Generated on the host, of at most
        `max_new` tokens, and of at most limits[n] in row n (None: max_new).
      conversation: who replies, and how often.
      prompts: their last turn is the user's.
      tokenizer: renders the replies as turns.
      group: G.
      max_new: most tokens behind the prompt, those of replies too.

    Returns:
      Generated as of one call, with T = P + max_new. A response is truncated where a turn
      has no end, or nothing fits behind a reply; that reply is then left out.

    Raises:
      ValueError: what `reply` does wrong; a prompt that ends with an assistant turn; a chat
        template that renders earlier turns differently once others follow.
    """
    text = tokenizer.for_data(prompts.examples)
    places: Any = prompts.places
    own = [prompts.examples[int(i)] for i in np.repeat(places, group)]
    out = say(0, prompts.tokens, prompts.lengths, group, None)
    state = _begin(out, np.repeat(np.asarray(prompts.lengths), group), max_new)
    _add(state, out, text)
    for turn in range(1, conversation.turns):
        _reply(state, conversation.reply, own, text, max_new)
        if not state.live.any():
            break
        room = np.where(state.live, state.starts + max_new - state.ends, 1)
        _add(state, say(turn, state.tokens, state.ends, 1, room), text)
    return _generated(state, len(prompts.lengths), group)


def _begin(out: Generated, starts: np.ndarray, max_new: int) -> _State:
    """Conversations before their first turn."""
    n, t = len(starts), np.asarray(out.batch.tokens).shape[-1]
    tokens = np.array(out.batch.tokens).reshape(n, t)
    zeros = np.zeros(tokens.shape, np.float32)
    return _State(
        tokens, np.zeros(tokens.shape, bool), zeros, zeros.copy(), starts, starts.copy(),
        np.ones(n, bool), np.zeros(n, bool), [[] for _ in range(n)], [[] for _ in range(n)],
    )  # fmt: skip


def _add(state: _State, out: Generated, text: Tokenizer) -> None:
    """One more turn of the policy in every conversation that goes on."""
    n, t = state.tokens.shape

    def rows(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.reshape(n, *x.shape[2:])

    drawn, mask = rows(out.batch.tokens), rows(out.batch.mask)
    old, raw = rows(out.batch.old_logps), rows(out.raw_logps)
    cut = rows(out.truncated)
    for i in np.flatnonzero(state.live):
        at = np.flatnonzero(mask[i, :t])
        state.tokens[i, at], state.mask[i, at] = drawn[i, at], True
        state.old[i, at], state.raw[i, at] = old[i, at], raw[i, at]
        state.ends[i] = at[-1] + 1
        state.texts[i].append(text.decode(drawn[i, at].tolist()))
        state.truncated[i] = cut[i]
        state.live[i] = not cut[i]


def _reply(
    state: _State, reply: Reply, own: Sequence[Example], text: Tokenizer, max_new: int
) -> None:
    """Replies to the conversations that go on; ends those without one, or without room."""
    going = np.flatnonzero(state.live).tolist()
    if not going:
        return
    rows = [dict(own[i].columns) for i in going]
    said = [list(state.texts[i]) for i in going]
    for i, answer in zip(going, _called(reply, rows, said), strict=True):
        if answer is None:
            state.live[i] = False
            continue
        ended = int(state.tokens[i, state.ends[i] - 1]) in text.eos_ids
        history = dialogue(own[i].prompt, state.replies[i])
        ids = between(text, history, answer, ended=ended)
        end = state.ends[i] + len(ids)
        if end >= state.starts[i] + max_new:
            state.live[i], state.truncated[i] = False, True
            continue
        state.tokens[i, state.ends[i] : end] = ids
        state.ends[i] = end
        state.replies[i].append(answer)


def _called(reply: Reply, rows: list, texts: list) -> list[str | None]:
    """The replies; ValueError for what is none."""
    try:
        found = list(reply(rows, texts))
    except Exception as error:
        raise ValueError(
            f"rollout.reply raised {type(error).__name__}({error}) on conversations of "
            f"which the first is {texts[0]!r}"
        ) from error
    if len(found) != len(rows):
        raise ValueError(
            f"rollout.reply gave {len(found)} replies to {len(rows)} conversations"
        )
    for answer in found:
        if answer is not None and not isinstance(answer, str):
            raise ValueError(
                f"rollout.reply gave {answer!r}, expected a text, or None where the "
                "conversation is done"
            )
    return found


def dialogue(
    prompt: str | Sequence[Message], replies: Sequence[str]
) -> list[Mapping[str, Any]]:
    """A conversation up to a turn of the policy, for each of whose turns SAID stands.

    Raises:
      ValueError: the prompt ends with a turn of the assistant's.
    """
    first = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said: list[Mapping[str, Any]] = list(first)
    if said and said[-1].get("role") == "assistant":
        raise ValueError(
            "rollout.reply takes prompts whose last turn is not the assistant's"
        )
    for answer in replies:
        said.append({"role": "assistant", "content": SAID})
        said.append({"role": "user", "content": answer})
    return [*said, {"role": "assistant", "content": SAID}]


def between(
    text: Tokenizer, history: Sequence[Mapping[str, Any]], reply: str, *, ended: bool
) -> list[int]:
    """The ids between a turn of the policy and its next one: those of the reply's turn.

    They are what the chat template puts behind the end of the assistant's turn. A turn
    without an end-of-sequence id (it ended at a stop) gets the template's first.

    Args:
      text: the tokenizer.
      history: from `dialogue`.
      reply: text of the user turn.
      ended: whether the turn of the policy has its end-of-sequence id.

    Raises:
      ValueError: the template renders the earlier turns differently now.
    """
    *asked, last = map(dict, history)
    before = _ids(text, Example("", asked, [last["content"]]))
    later = [*asked, last, {"role": "user", "content": reply}]
    whole = _ids(text, Example("", later, ()))
    if whole[: len(before)] != before:
        raise ValueError(
            "rollout.reply needs a chat template that renders earlier turns in one way: "
            f"this one differs from token {len(before)} of a conversation on"
        )
    return whole[len(before) - (not ended) :]


def _ids(text: Tokenizer, example: Example) -> list[int]:
    """The prompt and its response, if there is one."""
    found = text.dialogues.ids(text.dialogues.render(example))
    return [*found.prompt, *(i for response in found.responses for i in response)]


def _generated(state: _State, b: int, group: int) -> Generated:
    """Conversations as the responses of one call."""

    def split(x: np.ndarray) -> Any:
        return x.reshape(b, group, *x.shape[1:])

    none = np.zeros(len(state.ends), np.float32)
    valid = np.ones(len(state.ends), bool)
    # what was drawn behind the last turn, and padding, is not there
    real = np.arange(state.tokens.shape[1]) < state.ends[:, None]
    batch = Batch(
        split(np.where(real, state.tokens, 0)), split(state.mask), split(state.ends),
        split(none), split(valid), old_logps=split(state.old),
    )  # fmt: skip
    return Generated(batch, split(state.raw), split(state.truncated), {})
