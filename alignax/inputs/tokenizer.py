"""Text to token ids and back: bytes, a Hugging Face directory, or a .gguf file.

A conversation is rendered by its chat template to one string and that string is
tokenised once, without added specials. What a template leaves open is defined here:

  prompt     its ids must be a prefix of the ids of the whole, or the example is an error
  BOS        at most one; added only to raw text, never to what a template wrote
  EOS        a set of ids; exactly one ends every assistant turn, and it is scored.
             Where the template writes none it is inserted
  scored     assistant turns up to and including their EOS; never headers, never what
             a template writes after EOS
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, SupportsIndex

from alignax.batch import Example, Message
from alignax.inputs import chat_template as chat_templates
from alignax.inputs import gguf_vocab


class PrefixError(ValueError):
    """The ids of a prompt are not a prefix of the ids of the whole conversation."""


class Tokenized(NamedTuple):
    """One example as ids: a prompt shared by G responses, nothing cut yet."""

    prompt_ids: list[int]
    responses: list[list[int]]  # G lists of ids, each ends in its last scored token
    scored: list[list[bool]]  # G lists, True on assistant turns including their EOS


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back. Build it with `load`.

    Attributes:
      vocab_size: one more than the largest id; a model's table may be larger.
      eos_ids: every id that ends a turn.
      eos_id: the id inserted where the text has no EOS of its own; one of `eos_ids`.
      bos_id: id of the beginning-of-sequence token, or None.
      pad_id: id written on padding. May equal EOS: nothing is ever read from it.
      add_bos: whether raw text (no template) starts with BOS.
      chat_template: jinja2 source, or None for raw text.
      specials: special tokens as templates name them, e.g. {'eos_token': '</s>'}.
      now: what a template's `strftime_now` reads; fixed so that the ids are fixed too.
    """

    vocab_size: int
    eos_ids: frozenset[int]
    eos_id: int
    bos_id: int | None
    pad_id: int
    add_bos: bool
    chat_template: str | None
    specials: dict[str, str]
    now: datetime.datetime
    _encode: Callable[[str], list[int]]
    _decode: Callable[[list[int], bool], str]
    _vocab_hash: str
    path: str = ""  # of the folder or file that it was read from
    _definition: Callable[[], str] | None = None  # tokenizer.json, where it has one

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the ids depend on, for the keys of caches."""
        parts: tuple[Any, ...] = (
            self._vocab_hash,
            self.chat_template,
            sorted(self.eos_ids),
            self.eos_id,
        )
        parts += (self.bos_id, self.add_bos, sorted(self.specials.items()))
        if self.chat_template and "strftime_now" in self.chat_template:
            parts += (self.now.date().isoformat(),)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Specials in the text become their ids; none is ever added."""
        return self._encode(text)

    def decode(
        self, ids: Iterable[SupportsIndex], *, keep_specials: bool = False
    ) -> str:
        """Text of `ids` (a list or a 1-D array), without specials unless `keep_specials`."""
        return self._decode([int(i) for i in ids], keep_specials)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the one string that is tokenised.

        Raises:
          ValueError: the template refuses the messages; its message is included.
        """
        return chat_templates.render(
            self.chat_template, messages, add_generation_prompt,
            specials=self.specials, now=self.now,
        )  # fmt: skip

    def prompt(self, example: Example | str | Sequence[Message]) -> list[int]:
        """Ids to generate from: the prompt, up to where an assistant turn starts."""
        prompt = example.prompt if isinstance(example, Example) else example
        if isinstance(prompt, str):
            if not self.chat_template:
                return self._raw_prompt(prompt)
            prompt = [{"role": "user", "content": prompt}]
        return self._chat(list(prompt), open_turn=True)

    def tokenize(self, example: Example) -> Tokenized:
        """Ids of a prompt and its G responses, and which of them are scored.

        Raises:
          PrefixError: the prompt's ids are no prefix of the whole's; the message shows
            where they differ.
          ValueError: a response without an assistant turn, an assistant turn that
            holds an EOS of its own, two BOS at the start, or an empty prompt.
        """
        texts = [t for t in map(_raw, example.responses) if t is not None]
        plain = not self.chat_template and len(texts) == len(example.responses)
        if plain and isinstance(example.prompt, str):
            prompt_ids = self._raw_prompt(example.prompt)
            groups, scored = [], []
            for text, prefill in texts:
                ids, given = self.encode(text), self.encode(prefill)
                self._check_prefix(given, ids, "prefill")
                # A response that already ends in EOS keeps it.
                if not ids or ids[-1] not in self.eos_ids:
                    ids = [*ids, self.eos_id]
                self._check_one_eos(ids)
                groups.append(ids)
                scored.append([k >= len(given) for k in range(len(ids))])
            return Tokenized(prompt_ids, groups, scored)

        prompt = _messages(example.prompt, "user")
        turns = [_messages(r, "assistant") for r in example.responses]
        opened = all(t and t[0]["role"] == "assistant" for t in turns)
        prompt_ids = self._chat(prompt, open_turn=opened)
        groups, scored = [], []
        for response in turns:
            ids, marks = self._scored(prompt, response, prompt_ids)
            groups.append(ids)
            scored.append(marks)
        return Tokenized(prompt_ids, groups, scored)

    def _raw_prompt(self, text: str) -> list[int]:
        ids = self.encode(text)
        if self.bos_id is not None and (self.add_bos or not ids):
            ids = ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]
        if not ids:
            raise ValueError(
                "the prompt is empty and the tokenizer has no BOS to start from"
            )
        return self._check_one_bos(ids)

    def _chat(self, messages: list[Message], *, open_turn: bool) -> list[int]:
        """Ids of rendered messages, every assistant turn closed by an EOS."""
        ids = self.encode(self.render(messages, open_turn))
        if not self._template_writes_eos:
            for _, stop in reversed(self._turns(messages, ids)):
                ids.insert(stop, self.eos_id)
        if not ids:
            raise ValueError("the prompt is empty")
        return self._check_one_bos(ids)

    def _scored(self, prompt, response, prompt_ids) -> tuple[list[int], list[bool]]:
        """(ids, scored) of what `response` adds to `prompt_ids`, up to its last EOS."""
        messages = [*prompt, *response]
        ids = self.encode(self.render(messages))
        first = sum(m["role"] == "assistant" for m in prompt)
        # Turns of the prompt are skipped where the template closes them itself: it may
        # render old turns differently (Qwen3 removes their thinking).
        skip = first if self._template_writes_eos else 0
        turns = self._turns(messages, ids, skip)
        marks = [False] * len(ids)
        for k, (start, stop) in reversed(list(enumerate(turns, skip))):
            ends = [i for i in range(start, stop) if ids[i] in self.eos_ids]
            if not ends:
                ids.insert(stop, self.eos_id)
                marks.insert(stop, False)
                ends = [stop]
            self._check_one_eos(ids[start : ends[-1] + 1])
            if k >= first:
                marks[start : ends[0] + 1] = [True] * (ends[0] + 1 - start)
        if not any(marks):
            raise ValueError("the response has no assistant turn")
        self._check_one_bos(ids)
        self._check_prefix(prompt_ids, ids, "prompt")
        last = len(marks) - marks[::-1].index(True)
        n = len(prompt_ids)
        return ids[n:last], marks[n:last]

    def _turns(self, messages, ids, skip: int = 0) -> list[tuple[int, int]]:
        """[start, stop) in `ids` of each assistant turn after the first `skip`.

        A turn's 'prefill', the beginning of its content, is before its start.
        """
        spans = []
        at = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for i in at[skip:]:
            opened = self.render(messages[:i], True)
            if begun := messages[i].get("prefill"):
                content = messages[i]["content"]
                if not content.startswith(begun):
                    raise ValueError(f"prefill {begun!r} does not begin {content!r}")
                text = self.render(messages)
                opened = text[: text.index(begun, len(opened)) + len(begun)]
            head = self.encode(opened)
            self._check_prefix(head, ids, "prompt")
            stop = len(ids)
            if i + 1 < len(messages):
                whole = self.encode(self.render(messages[: i + 1]))
                self._check_prefix(whole, ids, f"conversation up to turn {i}")
                stop = len(whole)
            spans.append((len(head), stop))
        return spans

    @functools.cached_property
    def _template_writes_eos(self) -> bool:
        turns = (("user", "a"), ("assistant", "b"))
        probe = [{"role": role, "content": content} for role, content in turns]
        ids = self.encode(self.render(probe))
        start = len(self.encode(self.render(probe[:1], True)))
        return any(i in self.eos_ids for i in ids[start:])

    def _check_prefix(self, part: list[int], whole: list[int], name: str) -> None:
        if whole[: len(part)] == part:
            return
        pairs = zip(part, whole, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(whole))
        window = slice(max(0, at - 8), at + 8)
        raise PrefixError(
            f"the ids of the {name} are not a prefix of the whole: they differ from token "
            f"{at} on\n  {name} alone: {self.decode(part[window], keep_specials=True)!r}"
            f" {part[window]}"
            f"\n  in the whole: {self.decode(whole[window], keep_specials=True)!r}"
            f" {whole[window]}"
        )

    def _check_one_eos(self, ids: list[int]) -> None:
        ends = [i for i in ids if i in self.eos_ids]
        if len(ends) != 1:
            names = [self.decode([i], keep_specials=True) for i in ends]
            raise ValueError(
                f"an assistant turn holds {len(ends)} EOS tokens {names}, expected exactly "
                f"one at its end: {self.decode(ids[-32:], keep_specials=True)!r}"
            )

    def _check_one_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            text = self.decode(ids[:16], keep_specials=True)
            raise ValueError(f"the text starts with two BOS tokens: {text!r}")
        return ids


def load(
    path: str | pathlib.Path, *, now: datetime.datetime | None = None
) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      path: 'bytes' (256 bytes and three specials, no file), a Hugging Face
        directory with tokenizer.json, or a .gguf file.
      now: the date that templates read; the time of loading by default. A run that must
        give the same ids on another day under a template that prints the date sets it.

    Raises:
      FileNotFoundError: no such file or directory, or no tokenizer.json in it.
      ValueError: the file lacks something (EOS, merges) or uses an unknown pre-tokenizer.
    """
    now = now or datetime.datetime.now()
    if str(path) == "bytes":
        return _load_bytes(now)
    path = pathlib.Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path, now)
    if not (path / "tokenizer.json").is_file():
        near = sorted(
            p.name for p in (path if path.is_dir() else path.parent).glob("*")
        )
        raise FileNotFoundError(
            f"no tokenizer at {path}: expected 'bytes', a directory with tokenizer.json, "
            f"or a .gguf file; found {near[:20]}"
        )
    return _load_hf(path, now)


def _load_bytes(now: datetime.datetime) -> Tokenizer:
    specials = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    names = dict(zip((256, 257, 258), specials.values(), strict=True))

    def decode(ids: list[int], keep_specials: bool) -> str:
        out = bytearray()
        for i in ids:
            if i < 256:
                out.append(i)
            elif keep_specials:
                out += names.get(i, f"<{i}>").encode()
        return out.decode("utf-8", errors="replace")

    return Tokenizer(
        vocab_size=259, eos_ids=frozenset({257}), eos_id=257, bos_id=256, pad_id=258,
        add_bos=False, chat_template=None, specials=specials, now=now,
        _encode=lambda text: list(text.encode()), _decode=decode, _vocab_hash="bytes",
    )  # fmt: skip


def _load_hf(path: pathlib.Path, now: datetime.datetime) -> Tokenizer:
    import tokenizers

    def read(name: str) -> dict[str, Any]:
        file = path / name
        return json.loads(file.read_text()) if file.is_file() else {}

    core = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    config = read("special_tokens_map.json") | read("tokenizer_config.json")
    specials = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value:
            specials[name] = value
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates in one file
        template = {t["name"]: t["template"] for t in template}.get("default")
    file = path / "chat_template.jinja"
    template = file.read_text() if file.is_file() else template
    ends = (read("generation_config.json") or read("config.json")).get("eos_token_id")
    return _wrap(
        core, specials, template, now,
        eos_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
        add_bos=config.get("add_bos_token"), where=path,
    )  # fmt: skip


def _load_gguf(path: pathlib.Path, now: datetime.datetime) -> Tokenizer:
    """Rebuilds a byte-level BPE tokenizer from the metadata of a .gguf file."""
    ggml, template = gguf_vocab.read(path)
    return from_ggml(ggml, template, now=now, where=path)


def from_ggml(
    ggml: dict[str, Any],
    chat_template: str | None,
    *,
    now: datetime.datetime,
    where: str | pathlib.Path = "gguf",
) -> Tokenizer:
    """Builds a tokenizer from the `tokenizer.ggml.*` fields of a .gguf file.

    Args:
      ggml: model, pre, tokens, merges, token_type (1 normal, 3 control, 4 user-defined),
        eos_token_id and, where known, bos_, eot_, eom_, padding_token_id, add_bos_token.
      chat_template: jinja2 source or None.
      now: as for `load`.
      where: named in errors.

    Raises:
      ValueError: a vocabulary that is not byte-level BPE, or an unknown pre-tokenizer.
    """
    core = gguf_vocab.rebuild(ggml, where)
    tokens = ggml["tokens"]
    names = (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"))
    ids = {name: ggml.get(f"{kind}_token_id") for kind, name in names}
    ends = [ggml.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom")]
    add_bos = ggml.get("add_bos_token")
    return _wrap(
        core,
        {name: tokens[i] for name, i in ids.items() if i is not None},
        chat_template,
        now,
        eos_ids=[i for i in ends if i is not None],
        add_bos=ggml["pre"] == "llama-bpe" if add_bos is None else add_bos,
        where=where,
    )


def _wrap(core, specials, template, now, *, eos_ids, add_bos, where) -> Tokenizer:
    """A Tokenizer from a `tokenizers.Tokenizer`; `specials` holds tokens by name."""
    core.no_padding()
    core.no_truncation()
    ids = {name: core.token_to_id(token) for name, token in specials.items()}
    unknown = {n: specials[n] for n, i in ids.items() if i is None}
    if unknown:
        raise ValueError(f"{where}: special tokens {unknown} are not in the vocabulary")
    eos_id = ids.get("eos_token", eos_ids[0] if eos_ids else None)
    if eos_id is None:
        raise ValueError(
            f"{where}: no EOS token; name 'eos_token' in tokenizer_config.json"
        )
    bos_id = ids.get("bos_token")
    if add_bos is None:  # then as the post-processor does
        add_bos = bos_id is not None and core.encode("a").ids[:1] == [bos_id]
    return Tokenizer(
        vocab_size=max(core.get_vocab(with_added_tokens=True).values()) + 1,
        eos_ids=frozenset({eos_id, *eos_ids}),
        eos_id=eos_id,
        bos_id=bos_id,
        pad_id=ids.get("pad_token", eos_id),
        add_bos=bool(add_bos) and bos_id is not None,
        chat_template=template,
        specials=specials,
        now=now,
        _encode=lambda text: core.encode(text, add_special_tokens=False).ids,
        _decode=lambda ids, keep: core.decode(ids, skip_special_tokens=not keep),
        _vocab_hash=hashlib.sha256(core.to_str().encode()).hexdigest(),
        path=str(where),
        _definition=core.to_str,
    )


def _messages(turns: str | Sequence[Message], role: str) -> list[Message]:
    return [{"role": role, "content": turns}] if isinstance(turns, str) else list(turns)


def _raw(response: str | Sequence[Message]) -> tuple[str, str] | None:
    """(text, prefill) of a response that needs no template; None of one that does."""
    if isinstance(response, str):
        return response, ""
    if len(response) == 1 and "prefill" in response[0]:
        return response[0]["content"], response[0]["prefill"]
    return None
