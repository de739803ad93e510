"""Whether the ids of two tokenizers mean the same tokens."""

from alignax.inputs import tokenizer_files
from alignax.inputs.tokenizer import Tokenizer


def difference(one: Tokenizer, other: Tokenizer) -> str:
    """The first id that means different tokens; '' if there is none.

    Only ids that both have are compared. One tokenizer may have more of them (an added pad
    token, the tokens of a later release), other merges, or another template.

    Args:
      one: from `tokenizer.load`.
      other: likewise.
    """
    if one._vocab_hash == other._vocab_hash:
        return ""
    ours, theirs = _tokens(one), _tokens(other)
    for i in sorted(ours.keys() & theirs.keys()):
        if ours[i] != theirs[i]:
            return f"id {i} is {ours[i]!r} in {one.path or 'bytes'} and {theirs[i]!r} in {other.path or 'bytes'}"
    return ""


def _tokens(text: Tokenizer) -> dict[int, str]:
    vocabulary = tokenizer_files.as_core(text).get_vocab(with_added_tokens=True)
    return {i: token for token, i in vocabulary.items()}
