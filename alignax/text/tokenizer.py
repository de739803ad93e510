"""Text to token ids and back: bytes, a Hugging Face directory, or a .gguf file.

A conversation is rendered by its chat template to one string, and that string is tokenised
without added specials. What a template leaves open is defined here:

  prompt     to generate from: as the template renders it; to train on: what it has in
             common with the ids of the whole dialogue (see `dialogues`)
  BOS        at most one; added only to raw text, never to what a template wrote
  EOS        a set of ids; exactly one ends every assistant turn, and it is scored.
             Where the template writes none it is inserted
  scored     assistant turns up to and including their first end token; never what a
             generation prompt writes, never what a template writes after the end
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

from alignax.batch import Example, Message
from alignax.models import json_object, sizes
from alignax.models.json_object import one_line
from alignax.text import chat_template as chat_templates
from alignax.text import gguf_vocab, tracked_text, turns
from alignax.text.dialogues import Dialogues, Reading
from alignax.text.encoder import PRIVATE, Encoder, FunctionEncoder

log = logging.getLogger(__name__)
DEFAULT = Reading()


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
      eos_ids: every id that ends a turn, also the template's own end of turn.
      eos_id: the id inserted where the text has no EOS of its own; one of `eos_ids`.
      bos_id: id of the beginning-of-sequence token, or None.
      pad_id: id written on padding. May equal EOS: nothing is ever read from it.
      add_bos: whether raw text (no template) starts with BOS.
      chat_template: jinja2 source, or None for raw text.
      specials: special tokens as templates name them, e.g. {'eos_token': '</s>'}.
      now: what a template's `strftime_now` reads; fixed so that the ids are fixed too.
      encoder: text to ids, with their places.
      end_of_turn: the token by which the template ends old turns; None if it writes none.
      reading: how rows are read: template variables, system turns, control tokens in the
        text of users, raw strings.
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
    encoder: Encoder
    _decode: Callable[[list[int], bool], str]
    _vocab_hash: str
    path: str = ""  # of the folder or file that it was read from
    end_of_turn: str | None = None
    reading: Reading = DEFAULT
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
        if how := self.reading.identity():
            parts += (json.dumps(how, sort_keys=True, default=repr),)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def read_as(self, reading: Reading) -> "Tokenizer":
        """The same tokenizer, which reads rows in another way."""
        return self if reading == self.reading else _replace(self, reading=reading)

    def for_data(self, examples: Any) -> "Tokenizer":
        """The same tokenizer, which reads rows as the section of these examples says."""
        own = getattr(examples, "reading", None)
        return self.read_as(self.reading._replace(**own)) if own else self

    def without_template(self) -> "Tokenizer":
        """The same tokenizer for raw text, as of a model that knows no chat template."""
        return _replace(self, chat_template=None)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Specials in the text become their ids; none is ever added."""
        return self.encoder.plain(text)

    def decode(
        self, ids: Iterable[SupportsIndex], *, keep_specials: bool = False
    ) -> str:
        """Text of `ids` (a list or a 1-D array), without specials unless `keep_specials`."""
        return self._decode([int(i) for i in ids], keep_specials)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:  # fmt: skip
        """The conversation as the one string that is tokenised.

        Args:
          messages: the turns.
          add_generation_prompt: whether an assistant turn is opened at the end.
          **variables: what the template gets besides those of `reading`.

        Raises:
          ValueError: the template refuses the messages; its message is included.
        """
        given = {**self.reading.variables, **variables}
        return tracked_text.plain(self._tracked(messages, add_generation_prompt, given))

    @functools.cached_property
    def hidden(self) -> dict[str, int]:
        """Ids of the special tokens, which `decode` leaves out, by their text."""
        own = self.encoder.control.items()
        found = [(t, i) for t, i in own if not self.decode([i])]
        shown = {self.decode([i], keep_specials=True): i for _, i in found}
        return {**dict(found), **shown}

    def prompt(
        self, example: Example | str | Sequence[Message], prefill: str = ""
    ) -> list[int]:
        """Ids to generate from: the prompt, up to where an assistant turn starts.

        A prompt whose last message is an assistant's is continued at the end of its text.

        Args:
          example: only its prompt and its template variables are read.
          prefill: how the response begins; encoded with the prompt, as one text.

        Raises:
          ValueError: the template refuses the messages, or the prompt is empty.
        """
        if not isinstance(example, Example):
            example = Example("", example, [])
        example = example._replace(responses=(), feedback=())
        return self.dialogues.ids(self.dialogues.render(example, prefill)).prompt

    def tokenize(self, example: Example) -> Tokenized:
        """Ids of a prompt and its G responses, and which of them are scored.

        Raises:
          ValueError: a response without an assistant turn, an assistant turn that
            holds an EOS of its own, two BOS at the start, or an empty prompt.
        """
        tokens = self.dialogues.ids(self.dialogues.render(example))
        return Tokenized(tokens.prompt, tokens.responses, tokens.scored)

    @functools.cached_property
    def dialogues(self) -> Dialogues:
        """What renders and encodes examples."""
        return Dialogues(
            self.encoder, self._tracked, self.reading,
            templated=bool(self.chat_template), eos_ids=self.eos_ids, eos_id=self.eos_id,
            bos_id=self.bos_id, add_bos=self.add_bos, end_of_turn=self.end_of_turn,
            followed=chat_templates.is_followed(self.chat_template),
            marked=chat_templates.is_marked(self.chat_template),
            variables=chat_templates.variables(self.chat_template),
        )  # fmt: skip

    def _tracked(
        self, messages: Sequence[Message], open_turn: bool, variables: Mapping[str, Any]
    ) -> str:
        return chat_templates.render(
            self.chat_template, messages, open_turn,
            specials=self.specials, now=self.now, variables=variables,
        )  # fmt: skip

    def _with_end_of_turn(self) -> "Tokenizer":
        """With the template's own end of turn, which becomes an EOS where it has to."""

        def render(messages: Sequence[Message], open_turn: bool) -> str:
            return self._tracked(messages, open_turn, {})

        control = self.encoder.control
        ends = [self.encoder.name_of(i) for i in sorted(self.eos_ids)]
        end, last = turns.end_of_turn(render, ends, control)
        text = dataclasses.replace(self, end_of_turn=end)
        if last is None or control[last] in self.eos_ids:
            return text
        log.warning(
            "%s: the chat template ends turns with %r, which is not among the EOS tokens %s: "
            "it is used as one", self.path or "the tokenizer", last, ends,
        )  # fmt: skip
        return dataclasses.replace(text, eos_ids=self.eos_ids | {control[last]})


def _replace(text: Tokenizer, **changes: Any) -> Tokenizer:
    text = dataclasses.replace(text, **changes)
    return text._with_end_of_turn() if "chat_template" in changes else text


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

    # In a text, these are private characters, which no text should hold.
    control = {chr(PRIVATE + k): i for k, i in enumerate(names)}
    return Tokenizer(
        vocab_size=259, eos_ids=frozenset({257}), eos_id=257, bos_id=256, pad_id=258,
        add_bos=False, chat_template=None, specials=specials, now=now,
        encoder=FunctionEncoder(lambda text: list(text.encode()), control),
        _decode=decode, _vocab_hash="bytes",
    )._with_end_of_turn()  # fmt: skip


def _load_hf(path: pathlib.Path, now: datetime.datetime) -> Tokenizer:
    import tokenizers

    def read(name: str) -> dict[str, Any]:
        file = path / name
        return json_object.read(file) if file.is_file() else {}

    file = path / "tokenizer.json"
    _check_ids(json_object.read(file), file)
    config = read("special_tokens_map.json") | read("tokenizer_config.json")
    specials = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{path}: {name} is {sizes.brief(value)}, expected a text")
        if value:
            specials[name] = value
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates in one file
        named = [t for t in template if isinstance(t, dict)]
        template = {t.get("name"): t.get("template") for t in named}.get("default")
    alone = path / "chat_template.jinja"
    template = alone.read_text(encoding="utf-8") if alone.is_file() else template
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template is {sizes.brief(template)}, expected a text")  # fmt: skip
    ends = [
        _ends(read(name).get("eos_token_id"), path / name)
        for name in ("generation_config.json", "config.json")
    ]
    with _damaged(file):
        core = tokenizers.Tokenizer.from_file(str(file))
        return _wrap(
            core, specials, template, now, eos_ids=[*dict.fromkeys(itertools.chain(*ends))],
            add_bos=config.get("add_bos_token"), where=path,
        )  # fmt: skip


@contextlib.contextmanager
def _damaged(file: pathlib.Path) -> Iterator[None]:
    """Turns what the tokenizers library raises into a ValueError that names the file.

    Its errors have no type of their own, and those of its panics are no Exception.
    """
    try:
        yield
    except ImportError:  # of the library
        raise
    except BaseException as error:
        other = not isinstance(error, Exception) and type(error).__name__ != "PanicException"  # fmt: skip
        if other or (isinstance(error, ValueError) and str(file.parent) in str(error)):
            raise
        raise ValueError(f"{file} is damaged or no tokenizer: {one_line(error)}") from error  # fmt: skip


def _check_ids(definition: dict[str, Any], file: pathlib.Path) -> None:
    """Raises ValueError for ids that no table of embeddings has room for."""
    model, added = definition.get("model"), definition.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise ValueError(f"{file} has no 'model', or no list of 'added_tokens'")
    found = model.get("vocab")
    ids = {"added_tokens": [t.get("id") for t in added if isinstance(t, dict)]}
    ids["vocab"] = [*found.values()] if isinstance(found, dict) else []
    _, low, high = sizes.RANGES["vocab_size"]
    for name, several in ids.items():
        for one in several:
            sizes.number(f"{file}: an id of {name}", one, low - 1, high - 1, whole=True)


def _ends(found: Any, file: pathlib.Path) -> list[int]:
    """The EOS ids that a file of a model names."""
    ids = [] if found is None else found if isinstance(found, list) else [found]
    sizes.check({"eos_ids": ids}, {"eos_ids": f"{file}: eos_token_id"})
    return ids


def _load_gguf(path: pathlib.Path, now: datetime.datetime) -> Tokenizer:
    """Rebuilds a byte-level BPE tokenizer from the metadata of a .gguf file."""
    ggml, template = gguf_vocab.read(path)
    with _damaged(path):
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
    try:
        chat_templates.check(template, now)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    core.no_padding()
    core.no_truncation()
    ids = {name: core.token_to_id(token) for name, token in specials.items()}
    unknown = {n: specials[n] for n, i in ids.items() if i is None}
    if unknown:
        raise ValueError(
            f"{where}: special tokens {sizes.brief(unknown)} are not in the vocabulary"
        )
    known = [i for i in eos_ids if core.id_to_token(i) is not None]
    if lost := sorted({*eos_ids} - {*known}):
        log.warning("%s: no token has the EOS ids %s, which are left out", where, lost)
    eos_id = ids.get("eos_token", known[0] if known else None)
    if eos_id is None:
        raise ValueError(
            f"{where}: no EOS token; name 'eos_token' in tokenizer_config.json"
        )
    bos_id = ids.get("bos_token")
    if add_bos is None:  # then as the post-processor does
        add_bos = bos_id is not None and core.encode("a").ids[:1] == [bos_id]
    definition = core.to_str()
    encoder = Encoder(core, template, {eos_id, *known}, bos_id)
    return Tokenizer(
        vocab_size=max(core.get_vocab(with_added_tokens=True).values()) + 1,
        eos_ids=frozenset({eos_id, *known}),
        eos_id=eos_id,
        bos_id=bos_id,
        pad_id=ids.get("pad_token", eos_id),
        add_bos=bool(add_bos) and bos_id is not None,
        chat_template=template,
        specials=specials,
        now=now,
        encoder=encoder,
        _decode=lambda ids, keep: core.decode(ids, skip_special_tokens=not keep),
        _vocab_hash=hashlib.sha256(definition.encode()).hexdigest(),
        path=str(where),
        _definition=lambda: definition,
    )._with_end_of_turn()
