"""The byte-level BPE tokenizer that a .gguf file describes in its metadata."""

import logging
import pathlib
from typing import Any

from alignax.models import sizes
from alignax.models.gguf import check_header
from alignax.models.json_object import one_line

log = logging.getLogger(__name__)
# The pre-tokenizer of each family, by `tokenizer.ggml.pre`. It belongs to the vocabulary:
# with another pattern the same text gets other ids.
_GPT2 = None  # the default pattern of tokenizers' ByteLevel
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GGUF_PRE = {  # name: (pattern, single digits first, Unicode NFC, whole words first)
    "gpt-2": (_GPT2, False, False, False),
    "smollm": (_GPT2, True, False, False),
    "starcoder": (_GPT2, True, False, False),
    "llama-bpe": (_LLAMA3, False, False, True),
    "qwen2": (_QWEN2, False, True, False),
}


def read(path: pathlib.Path) -> tuple[dict[str, Any], str | None]:
    """The `tokenizer.ggml.*` fields by their last name, and the chat template.

    Raises:
      ImportError: the gguf library is not installed; names the extra.
      ValueError: the file is damaged.
    """
    try:
        import gguf
    except ImportError as e:
        raise ImportError("a .gguf file needs a package: pip install gguf") from e
    check_header(path)
    names = ["model", "pre", "tokens", "merges", "token_type", "add_bos_token"]
    names += [f"{kind}_token_id" for kind in ("bos", "eos", "eot", "eom", "padding")]
    try:
        fields = gguf.GGUFReader(str(path)).fields

        def get(name: str) -> Any:
            field = fields.get(name)
            return None if field is None else field.contents()

        ggml = {name: get(f"tokenizer.ggml.{name}") for name in names}
        template = get("tokenizer.chat_template")
    except (ValueError, LookupError, OSError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged or not GGUF: {one_line(e)}") from e
    _check(ggml, template, path)
    return ggml, template


def _check(ggml: dict[str, Any], template: Any, path: pathlib.Path) -> None:
    """Raises ValueError for fields of other types; leaves out ids that no token has."""
    tokens = ggml["tokens"]
    for name in ("tokens", "merges"):
        found = ggml[name]
        texts = isinstance(found, list) and all(isinstance(x, str) for x in found)
        if found is not None and not texts:
            raise ValueError(f"{path}: tokenizer.ggml.{name} holds no texts")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: tokenizer.chat_template is no text")
    for name, value in ggml.items():
        if name.endswith("_token_id") and value is not None and tokens is not None:
            field = f"{path}: tokenizer.ggml.{name}"
            sizes.number(field, value, -(2**31), 2**32 - 1, whole=True)
            if not 0 <= value < len(tokens):
                log.warning(
                    "%s is %d, which no token has: it is left out", field, value
                )
                ggml[name] = None


def rebuild(ggml: dict[str, Any], where: str | pathlib.Path) -> Any:
    """A `tokenizers.Tokenizer` of the vocabulary, merges and special tokens.

    Args:
      ggml: from `read`.
      where: named in errors.

    Raises:
      ValueError: a vocabulary that is not byte-level BPE, or an unknown pre-tokenizer.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    if ggml.get("model") != "gpt2" or not ggml.get("merges"):
        raise ValueError(
            f"{where}: tokenizer model {ggml.get('model')!r} cannot be rebuilt, only "
            "byte-level BPE ('gpt2' with merges); use the Hugging Face directory instead"
        )
    pre = ggml.get("pre")
    if pre not in _GGUF_PRE:
        raise ValueError(
            f"{where}: unknown pre-tokenizer {pre!r}, known are {sorted(_GGUF_PRE)}; "
            "use the Hugging Face directory instead"
        )
    pattern, digits, nfc, whole = _GGUF_PRE[pre]
    tokens, types = ggml["tokens"] or [], ggml["token_type"] or []
    if len(tokens) != len(types) or len({*tokens}) != len(tokens):
        raise ValueError(
            f"{where}: {len(tokens)} tokens, {len({*tokens})} of them different, have "
            f"{len(types)} types"
        )
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(m.split(" ", 1)) for m in ggml["merges"]],
            ignore_merges=whole,
        )
    )
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    steps.append(
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    if nfc:
        core.normalizer = normalizers.NFC()
    for kind, special in ((3, True), (4, False)):
        core.add_tokens(
            [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, k in zip(tokens, types, strict=True)
                if k == kind
            ]
        )
    return core
