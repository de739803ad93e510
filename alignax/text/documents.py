"""A prompt as prefix, documents and suffix, which separators in its text divide."""

from alignax.text.tokenizer import Tokenizer

SEPARATOR = "<|document|>"


def pieces(text: Tokenizer, ids: list[int], *, separator: str) -> list[list[int]]:
    """Ids of the prefix, of each document, and of the suffix of a prompt.

    Raises:
      ValueError: what is wrong with the prompt.
    """
    whole = text.decode(ids, keep_specials=True)
    if text.encode(whole) != ids:
        raise ValueError(f"the ids of a prompt are not those of its text {whole!r}")
    parts = whole.split(separator)
    if len(parts) < 3:
        raise ValueError(
            f"a prompt has the separator {separator!r} {len(parts) - 1} times, expected "
            f"it in front of its documents, between them and behind them: {whole!r}"
        )
    prefix, *documents, suffix = map(text.encode, parts)
    if not all(map(len, documents)) or not suffix:
        raise ValueError(
            f"a prompt has an empty document or nothing behind them: {whole!r}"
        )
    return [prefix, *documents, suffix]
