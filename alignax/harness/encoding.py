"""Strings to ids by the rules of lm-evaluation-harness, which its `hf` model follows.

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.13:
lm_eval/api/model.py (`_encode_pair`, `loglikelihood`), lm_eval/models/huggingface.py
(`tok_encode`, `_loglikelihood_tokens`) and lm_eval/utils.py (`get_rolling_token_windows`)
"""

from collections.abc import Sequence
from typing import NamedTuple

from alignax.text.tokenizer import Tokenizer


class Row(NamedTuple):
    """One log-likelihood to compute: of `continuation`, given `context`."""

    context: list[int]  # at least one id
    continuation: list[int]  # at least one id


class Codec(NamedTuple):
    """How strings become ids.

    Attributes:
      text: the tokenizer.
      add_bos: whether a text begins with BOS.
      prefix: the id in front of a text that has no context.
    """

    text: Tokenizer
    add_bos: bool
    prefix: int

    def encode(self, string: str) -> list[int]:
        """Ids of a text, with BOS where `add_bos` says so.

        A text that begins with the text of `prefix` gets none: a chat template wrote it.
        """
        ids = self.text.encode(string)
        begun = string.startswith(self.text.decode([self.prefix], keep_specials=True))
        if not self.add_bos or begun or self.text.bos_id is None:
            return ids
        return [self.text.bos_id, *ids]

    def pair(self, context: str, continuation: str) -> Row:
        """A context and its continuation.

        Both are encoded as one text. Blanks at the end of the context belong to the
        continuation, so that its tokens begin with them. The prefix is the context where
        there is none.

        Raises:
          ValueError: no token belongs to the continuation.
        """
        if not context:
            ids = self.text.encode(continuation)
            own = ids[:1] == [self.prefix]
            row = Row(ids[:1], ids[1:]) if own else Row([self.prefix], ids)
        else:
            before = self.encode(context.rstrip())
            after = self.encode(context + continuation)[len(before) :]
            row = Row(before or [self.prefix], after)
        if not row.continuation:
            raise ValueError(
                f"the continuation {continuation!r} of ...{context[-40:]!r} has no token "
                "of its own"
            )
        return row

    def rolling(self, string: str, length: int) -> list[Row]:
        """Rows that score each token of a text once.

        Args:
          string: the text.
          length: most tokens that the model reads of a row, all but its last.

        Returns:
          Rows of at most `length` continuation tokens; the first one's context is the
          prefix, the others have as much context as fits. None for an empty text.
        """
        return windows(self.encode(string), self.prefix, length)


def windows(ids: Sequence[int], prefix: int, length: int) -> list[Row]:
    """Consecutive parts of ids with the context that fits: see `Codec.rolling`."""
    found = []
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        context = [*ids[end - length - 1 : start]] if start else [prefix]
        found.append(Row(context, [*ids[start:end]]))
    return found


def truncate(row: Row, length: int) -> Row:
    """A row of which the model reads at most `length` tokens; the context loses its first.

    The last token of a row is scored and not read, so a row has `length` + 1 of them.

    Raises:
      ValueError: the continuation alone is too long.
    """
    many = len(row.continuation)
    if many > length:
        raise ValueError(
            f"a continuation has {many} tokens, and the context of the model is {length}"
        )
    return Row(row.context[-(length + 1 - many) :], row.continuation)
