"""The public surface: `import alignax as ax` offers these functions; see each docstring.

They are thin: strings become ids, and one call of the library does the work. Nothing else
of the package is promised to outsiders.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from alignax import logprob
from alignax.batch import LM, Example, Message, from_groups
from alignax.models import save as model_files
from alignax.models import sharding, transformer
from alignax.models.stored import expanded
from alignax.respond import output, responder, starts
from alignax.runs import model_paths
from alignax.sampling import decode, drafts, generation_settings, grammars
from alignax.sampling import speculate as speculation
from alignax.sampling import stops as stop_places
from alignax.sampling.decode import Generated
from alignax.text import tokenizer as tokenizers
from alignax.text import tokenizer_files
from alignax.text.tokenizer import Tokenizer
from alignax.training import defaults, loading, loop, parallel
from alignax.training.step import TrainState

Ids = Sequence[int] | np.ndarray | Array  # of tokens, one axis
Text = str | Message | Sequence[Message] | Ids  # a string, messages, or token ids
BUCKET = 64  # tokens: rows are padded to a multiple of it, so that few shapes compile


class Model(NamedTuple):
    """A language model and its tokenizer."""

    lm: LM
    tokenizer: Tokenizer


class Scored(NamedTuple):
    """N responses as `score` reads them; a row is a prompt and its response.

    Attributes:
      logps: nats, of each scored token given all tokens before it; exactly 0 elsewhere,
        so that `logps.sum(-1)` is log p(response | prompt).
      mask: True on scored tokens: those of the assistant, their EOS included.
      tokens: the text of each token of a row, special tokens included; N lists.
      ids: the tokens; 0 behind the end of a row.
      log_ratios: logps less those of the reference, nats; None without one.
    """

    logps: Float[np.ndarray, "N T"]
    mask: Bool[np.ndarray, "N T"]
    tokens: list[list[str]]
    ids: Int[np.ndarray, "N T"]
    log_ratios: Float[np.ndarray, "N T"] | None = None


class Responses(NamedTuple):
    """Responses to B prompts, G to each.

    Attributes:
      texts: B lists of G, the prefill in front, cut in front of a stop string.
      finish: why each ended: 'eos', 'stop' or 'length'.
      logps: nats, of each whole response under the unmodified model.
      generated: ids, masks and log-probabilities of each token, and what it took.
    """

    texts: list[list[str]]
    finish: list[list[str]]
    logps: Float[np.ndarray, "B G"]
    generated: Generated


def load(path: str, *, dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """Reads a model and its tokenizer.

    Args:
      path: a Hugging Face folder, a .gguf file, a folder of PEFT adapters, or the folder
        of a run (its 'best', too). Adapters are merged into their base.
      dtype: 'float32' or 'bfloat16', of the parameters and of the computation. A run
        keeps its own.

      mesh: from `alignax.models.sharding.make_mesh`, over which the parameters are spread
        while they are read.

    Returns:
      Model; without a mesh the parameters are on the first device of this process (or on
      `jax.config.jax_default_device`).

    Raises:
      FileNotFoundError: no model, or no tokenizer, at the path.
      ValueError: a file that is damaged, or of an unknown architecture.

    Example:
      model = ax.load("SmolLM2-135M-Instruct")
      print(model.lm.config.num_layers, model.tokenizer.vocab_size)
    """
    found = _resolve(path)
    lm = loading.load_lm(found, dtype=dtype, mesh=mesh)  # it says what is not there
    if mesh is not None:
        params = sharding.placed(lm.params, mesh)
        return Model(lm._replace(params=params), _tokenizer(found))
    settings: Any = jax.config  # its attributes are not known to every stub
    device = settings.jax_default_device or jax.local_devices()[0]
    return Model(
        lm._replace(params=jax.device_put(lm.params, device)), _tokenizer(found)
    )


def save(model: Model, path: str, *, overwrite: bool = False) -> None:
    """Writes a Hugging Face folder: weights, config, tokenizer and generation_config.

    transformers loads it, and so does `load`. The folder appears complete or not at all.

    Args:
      model: its parameters are written in their dtype, float32 or bfloat16. The tokenizer
        files of a Hugging Face folder are copied as they stand there.
      path: the folder to make.
      overwrite: replace a model folder that stands there.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
      ValueError: no Hugging Face architecture has the config of the model.

    Example:
      model = ax.load("SmolLM2-135M-Instruct")
      ax.save(model, "copy")
      again = ax.load("copy")
    """
    files = tokenizer_files.files(model.tokenizer)
    model_files.save(model.lm, path, files=files, overwrite=overwrite)


def tokenizer(path: str) -> Tokenizer:
    """Reads a tokenizer alone: of everything that `load` reads, or 'bytes'.

    Raises:
      FileNotFoundError: no tokenizer at the path.

    Example:
      text = ax.tokenizer("SmolLM2-135M-Instruct")
      print(text.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True))
      print(text.encode("Hello"))
    """
    if path == "bytes":
        return tokenizers.load(path)
    return _tokenizer(_resolve(path))


def score(
    model: Model,
    prompts: Text | Sequence[Text],
    responses: Text | Sequence[Text],
    *,
    ref: Model | None = None,
    template: Mapping[str, Any] | None = None,
) -> Scored:
    """Log-probabilities of responses, token by token, as every loss of the package reads them.

    Args:
      model: what scores.
      prompts: N prompts, or one: strings (one user turn), messages, or token ids.
      responses: as many, each to the prompt of its place. Strings are assistant turns and
        end in EOS; of messages the assistant's are scored. All rows are one batch: split
        a long list yourself.
      ref: a reference whose tokenizer gives the same ids, for log-ratios.
      template: what the chat template of both gets besides the messages: 'tools',
        'documents', 'enable_thinking', ...

    Returns:
      Scored, with T the longest row.

    Raises:
      ValueError: not as many responses as prompts; a row that is longer than the context
        of the model or of the reference; an id beyond a vocabulary; a conversation that
        the chat template refuses; a reference whose tokenizer gives other ids.

    Example:
      model = ax.load("SmolLM2-135M-Instruct")
      scored = ax.score(model, ["2 + 2 =", "2 + 2 ="], ["4", "5"])
      print(scored.logps.sum(-1), scored.tokens[0])
    """
    prompts, responses = _several(prompts), _several(responses)
    if len(prompts) != len(responses):
        raise ValueError(
            f"{len(prompts)} prompts and {len(responses)} responses; expected as many"
        )
    rows = [
        _row(model.tokenizer, *pair, template)
        for pair in zip(prompts, responses, strict=True)
    ]
    sizes = [len(prompt) + len(response) for prompt, response, _ in rows]
    for lm in (model.lm, *([ref.lm] if ref is not None else [])):
        _check_length(lm, sizes)
        _check_ids(lm, [[*prompt, *response] for prompt, response, _ in rows])
    width = -(-max(sizes) // BUCKET) * BUCKET
    batch = from_groups(
        [prompt for prompt, _, _ in rows], [[response] for _, response, _ in rows],
        length=width, scored=[[scored] for _, _, scored in rows],
    )  # fmt: skip
    longest = slice(max(sizes))
    logps = np.asarray(_score(model.lm, batch).logps)[:, 0, longest]
    ratios = None
    if ref is not None:
        _check_same_ids(rows, ref.tokenizer, prompts, responses, template)
        ratios = logps - np.asarray(_score(ref.lm, batch).logps)[:, 0, longest]
    tokens = [
        [model.tokenizer.decode([i], keep_specials=True) for i in row[:size]]
        for row, size in zip(batch.tokens[:, 0], sizes, strict=True)
    ]
    mask, ids = batch.mask[:, 0, longest], batch.tokens[:, 0, longest]
    return Scored(logps, np.asarray(mask), tokens, np.asarray(ids), ratios)


def generate(
    model: Model,
    prompts: Text | Sequence[Text],
    *,
    max_new: int = 256,
    group: int = 1,
    temperature: float = 1.0,
    stops: str | int | Sequence[str | int] = (),
    prefill: str = "",
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Responses:
    """Samples responses to prompts.

    Args:
      model: what samples; it ends a response with any of its EOS ids.
      prompts: B prompts, or one: strings (one user turn), messages, or token ids. All of
        them are one batch: split a long list yourself.
      max_new: most tokens of a response.
      group: G, responses per prompt.
      temperature: 0 is greedy.
      stops: strings in front of which a response is cut, also special tokens by their
        text ('<|eot_id|>'); or ids.
      prefill: how every response begins: given, not sampled. It is encoded with the
        prompt as one text. (Messages that end in an assistant turn are continued at the
        end of its text, too.)
      seed: of the samples.
      template: what the chat template gets besides the messages: 'tools', 'documents',
        'enable_thinking', ...
      **settings: all others of `sampling.decode.generate`: top_k, top_p, min_p,
        repetition_penalty, logit_bias, guide, ...; grammar may be 'regex:PATTERN' or
        'json_schema:FILE' too, see `sampling.grammars`.

    Returns:
      Responses.

    Raises:
      ValueError: a prompt that leaves no room for max_new tokens in the context or that
        the chat template refuses, an id beyond the vocabulary, or a setting out of its
        range.

    Example:
      model = ax.load("SmolLM2-135M-Instruct")
      out = ax.generate(model, ["Name a colour."], max_new=16, group=2, temperature=0.7)
      print(out.texts[0], out.logps[0])
    """

    def sample(tokens: Array, lengths: Array, **asked: Any) -> Generated:
        key = jax.random.key(seed)
        return decode.generate(_decoded(model), tokens, lengths, key, **asked)

    asked = dict(settings, max_new=max_new, group=group, temperature=temperature)
    return _respond(model, prompts, sample, stops, prefill, template, asked)


def speculate(
    model: Model,
    draft: Model | LM | str,
    prompts: Text | Sequence[Text],
    *,
    max_new: int = 256,
    group: int = 1,
    temperature: float = 1.0,
    stops: str | int | Sequence[str | int] = (),
    prefill: str = "",
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Responses:
    """Samples from the distribution of `generate`, with fewer calls of the model.

    A draft proposes a block of tokens, and one call of the model verifies it.

    Args:
      model: the target, whose distribution is sampled.
      draft: a smaller model of the same tokenizer; 'ngram', which repeats what followed
        the last tokens before; or 'layers:K', the first K layers of the model.
      prompts, max_new, group, temperature, stops, prefill, seed, template: as for
        `generate`.
      **settings: all others of `sampling.speculate.speculate`: draft_length, rule, guide,
        mode, top_k, ...

    Returns:
      Responses; `generated.stats['tokens_per_target_call']` says what the draft saved.

    Raises:
      ValueError: as for `generate`; a draft with another tokenizer.

    Example:
      model = ax.load("SmolLM2-135M-Instruct")
      out = ax.speculate(model, "ngram", "Repeat: one two three.", max_new=16)
      print(out.texts[0][0], out.generated.stats["tokens_per_target_call"])
    """
    proposes: LM | drafts.Draft
    if isinstance(draft, str):
        kind, _, count = draft.partition(":")
        layers = model.lm.config.num_layers
        if draft != "ngram" and not (
            kind == "layers" and count.isdigit() and 0 < int(count) <= layers
        ):
            raise ValueError(
                f"draft is {draft!r}, expected a Model, 'ngram', or 'layers:K' with K from "
                f"1 to {layers}"
            )
        proposes = responder.drafter(draft, {"target": _decoded(model)})
    else:
        if isinstance(draft, Model):
            _check_same_tokens(model, draft)
        proposes = draft.lm if isinstance(draft, Model) else draft

    def sample(tokens: Array, lengths: Array, **asked: Any) -> Generated:
        key = jax.random.key(seed)
        lm = _decoded(model)
        return speculation.speculate(lm, proposes, tokens, lengths, key, **asked)

    asked = dict(settings, max_new=max_new, group=group, temperature=temperature)
    return _respond(model, prompts, sample, stops, prefill, template, asked)


def config(**changes: Any) -> ConfigDict:
    """The config of a run: the defaults, with some keys changed.

    Args:
      **changes: keys of the config; a section takes a dict, whose other keys stay. See
        `alignax/training/defaults.py` for every key.

    Raises:
      KeyError: a key that no run has; the nearest is named.
      TypeError: a value of another type than the default's.

    Example:
      c = ax.config(num_steps=3, loss={"name": "dpo", "beta": 0.1}, lms={"ref": "init"})
      c.optim.lr = 5e-7
      print(c.batch_size, c.loss.beta)
    """
    c = defaults.get_config()
    c.update(changes)
    return c


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Runs a config: checks it, trains, evaluates, and saves into a folder.

    Called again on the same folder it goes on where it stopped; afterwards `load` reads
    the folder.

    Args:
      config: from `config`, or from a file in configs/.
      workdir: folder of the run: checkpoints, metrics, samples, curves.

    Returns:
      TrainState, as it was saved last.

    Raises:
      ValueError: a config that cannot run; the key and what it may be are named.
      FloatingPointError: the loss is not a number.

    Example:
      data = {"name": "synthetic", "split": "train", "kind": "pairs", "size": 16}
      c = ax.config(num_steps=2, batch_size=4, length=96, data=data)
      c.update(loss={"name": "dpo"}, lms={"ref": "init"})
      c.model.path = "SmolLM2-135M-Instruct"
      ax.train(c, "runs/mine")
      model = ax.load("runs/mine")
    """
    return loop.train(config, str(workdir))


_score = jax.jit(logprob.score)


def _resolve(path: str) -> model_paths.ModelPath:
    found = model_paths.resolve(str(path))
    if found.kind == "hf" and not expanded(path).exists():
        raise FileNotFoundError(
            f"no model at {path}: expected a folder or a .gguf file; names on a hub are not "
            "downloaded, save the model into a folder first"
        )
    return found


def _tokenizer(found: model_paths.ModelPath) -> Tokenizer:
    """The tokenizer of a path; that of a run sees the date of the run."""
    date = (found.config or {}).get("date")
    now = datetime.datetime.fromisoformat(date) if date else None
    return tokenizers.load(found.tokenizer or found.path, now=now)


def _several(texts: Any) -> list[Text]:
    """A list of texts, also of one."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, Mapping):  # one message
        return [[dict(texts)]]
    texts = np.asarray(texts).tolist() if hasattr(texts, "dtype") else list(texts)
    texts = [np.asarray(t).tolist() if hasattr(t, "dtype") else t for t in texts]
    if texts and isinstance(texts[0], Mapping | int | np.integer):
        return [texts]
    if not texts:
        raise ValueError("no prompt or no response: the list is empty")
    return texts


def _is_ids(text: Any) -> bool:
    words = isinstance(text, str) or (len(text) and isinstance(text[0], Mapping))
    return not words


def _row(
    text: Tokenizer, prompt: Text, response: Text, template: Mapping[str, Any] | None
):
    """(ids of the prompt, ids of the response, which of these are scored)."""
    if _is_ids(prompt) != _is_ids(response):
        raise ValueError("a prompt and its response are both ids, or both text")
    if _is_ids(prompt):
        return list(prompt), list(response), [True] * len(response)
    example: Any = Example("", prompt, (response,), template=template or {})  # type: ignore[arg-type]
    ids, responses, scored = text.tokenize(example)
    return ids, responses[0], scored[0]


def _start(
    text: Tokenizer, prompt: Any, prefill: str, template: Mapping[str, Any] | None
) -> starts.Start:
    """A prompt and its prefill as ids."""
    if not _is_ids(prompt):
        prompt = Example("", prompt, (), template=template or {})
    return starts.start(text, prompt, prefill)


def _check_same_ids(rows, text: Tokenizer, prompts, responses, template) -> None:
    """Raises ValueError where the tokenizer of a reference gives other ids."""
    for i, row in enumerate(rows):
        if _row(text, prompts[i], responses[i], template) != row:
            raise ValueError(
                f"row {i}: the tokenizer of the reference gives other ids than the model's"
            )


def _decoded(model: Model) -> LM:
    """What samples: the LM without the rows that pad its table beyond the tokenizer."""
    return transformer.limit_ids(model.lm, model.tokenizer.vocab_size)


def _check_same_tokens(model: Model, other: Model) -> None:
    """Raises ValueError for two models whose ids do not mean the same tokens."""
    if found := tokenizer_files.difference(model.tokenizer, other.tokenizer):
        raise ValueError(f"the draft has another tokenizer than the model: {found}")


def _check_length(lm: LM, sizes: Sequence[int], what: str = "tokens") -> None:
    if max(sizes) > lm.config.max_length:
        raise ValueError(
            f"row {int(np.argmax(sizes))} has {max(sizes)} {what}, beyond the context of "
            f"the model, {lm.config.max_length}"
        )


def _check_ids(lm: LM, rows: Sequence[Sequence[int]]) -> None:
    size = lm.config.vocab_size
    for i, row in enumerate(rows):
        if wrong := [token for token in row if not 0 <= token < size]:
            raise ValueError(f"row {i} has the id {wrong[0]}, expected 0..{size - 1}")


def _respond(
    model: Model, prompts: Any, sample: Callable[..., Generated], stops: Any,
    prefill: str, template: Mapping[str, Any] | None, asked: dict[str, Any],
) -> Responses:  # fmt: skip
    """Prompts as ids, a call of the sampler, and its responses as text."""
    text, lm = model.tokenizer, _decoded(model)
    if not isinstance(prefill, str):
        raise ValueError(f"prefill is {prefill!r}, expected a string")
    groups = stop_places.parse(stops, text)
    begun = [_start(text, p, prefill, template) for p in _several(prompts)]
    ids = [[*s.prompt, *s.prefill] for s in begun]
    _check_ids(lm, ids)
    _check_length(lm, [len(i) + asked["max_new"] for i in ids], "tokens with max_new")
    tokens, lengths = generation_settings.ragged([s.prompt for s in begun])
    if groups:
        pieces = stop_places.pieces(text, lm.config.vocab_size)
        asked["stops"] = stop_places.table(groups, pieces)
    asked |= starts.arrays(begun, begun)
    asked.setdefault("eos_ids", parallel.known(text.eos_ids, lm))
    if isinstance(asked.get("grammar"), str):
        pieces = stop_places.pieces(text, lm.config.vocab_size)
        asked["grammar"] = grammars.load(asked["grammar"]).build(
            pieces, asked["eos_ids"]
        )
    out = jax.device_get(sample(jnp.asarray(tokens), jnp.asarray(lengths), **asked))
    rules = output.Rules(stops, prefill, min_new=int(asked.get("min_new") or 0))
    found = output.answers(out.batch, out.truncated, text, rules)
    return Responses(
        [[r.text for r in group] for group in found],
        [[r.finish for r in group] for group in found],
        np.asarray(out.raw_logps).sum(-1), out,
    )  # fmt: skip
