"""Builds, from a config, what responds to prompts."""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax import logprob, plugin, rewards
from alignax.batch import LM, Batch, Example
from alignax.models import transformer
from alignax.respond import output, starts
from alignax.respond.starts import Start
from alignax.sampling import (
    continuous,
    drafts,
    generation_settings,
    grammars,
    prefill,
    stops,
)
from alignax.sampling.speculate import speculate
from alignax.text.tokenizer import Tokenizer
from alignax.training import parallel
from alignax.training.build import Run

_EXIT = re.compile(r"layers:(\d+)")
# settings of a whole response; all others decide how a token is sampled
WHOLE = ("group", "stops")


def bind(config) -> plugin.Bound | None:
    """The decoder of a config; None: the model is sampled without one."""
    return (
        plugin.load_section("decoders", config.decoder) if config.decoder.name else None
    )


def checker(config, text: Tokenizer) -> Callable[[list[int]], Any]:
    """A function that raises ValueError for the ids of a prompt that the decoder rejects.

    A decoder may define it, as `check(text, ids, **some of its hyper-parameters)`.
    """
    decoder = bind(config)
    check = decoder and getattr(inspect.getmodule(decoder.function), "check", None)
    if not decoder or not check:
        return lambda ids: None
    own = {k: v for k, v in decoder.hyper.items() if k in inspect.signature(check).parameters}  # fmt: skip
    return functools.partial(check, text, **own)


def settings(config, text: Tokenizer, size: int) -> dict[str, Any]:
    """Keyword arguments of `decode.generate` from a config, without those at their default.

    The beginnings of responses, prefill and forced text, are in `starts`.

    Args:
      config: its section `generate` is read.
      text: the tokenizer of the stops.
      size: of the model's vocabulary.
    """
    generate = config.generate
    off = dict(
        group=1, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        frequency_penalty=0.0, presence_penalty=0.0, logit_bias=(), min_new=0, stops=(),
        candidates=16, grammar="",
    )  # fmt: skip
    asked: dict[str, Any] = dict(
        group=generate.group, top_k=generate.top_k, top_p=generate.top_p,
        min_p=generate.min_p, repetition_penalty=generate.repetition_penalty,
        frequency_penalty=generate.frequency_penalty,
        presence_penalty=generate.presence_penalty, logit_bias=generate.logit_bias,
        min_new=generate.min_new, stops=generate.stops, candidates=generate.candidates,
        grammar=generate.grammar,
    )  # fmt: skip
    used = {k: v for k, v in asked.items() if v != off[k]}
    if "logit_bias" in used:
        used["logit_bias"] = {int(i): float(nats) for i, nats in used["logit_bias"]}
    if "stops" in used:
        groups = stops.parse(used["stops"], text, name="generate.stops")
        used["stops"] = stops.table(groups, stops.pieces(text, size))
    if "grammar" in used:
        ends = [i for i in text.eos_ids if i < size]
        grammar = grammars.load(used["grammar"], "generate.grammar")
        used["grammar"] = grammar.build(stops.pieces(text, size), sorted(ends))
    return {"max_new": generate.max_new, "temperature": generate.temperature, **used}


class Responder(NamedTuple):
    """What responds to prompts; results are on the host.

    Attributes:
      batch: (tokens [B, P], lengths, indices of the prompts) -> Generated.
      stream: (skip, halt, name) -> pairs (indices, Generated) as prompts are finished:
        `continuous.generate` with its other arguments bound; None where a search or a draft
        responds, or several processes, which have to do the same at the same time.
    """

    batch: Callable[..., Any]
    stream: Callable[..., Iterator[tuple[list[int], Any]]] | None


def build(
    config, run: Run, lm: LM, reward: plugin.Bound | None, begun: Sequence[Start],
    shared: Sequence[int] = (), examples: Sequence[Example] = (),
    settings_of: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Responder:  # fmt: skip
    """Builds what responds to prompts.

    A decoder gets the model that responds as 'target' among its LMs. The prefix `shared` of
    all prompts is prefilled once by the sampling loop; guides, drafts and searches without
    the argument `reader` read it with every prompt. `begun` says how the responses to each
    prompt begin; forced text is for searches with `AT_ONCE = True` beside them, which draw
    whole responses with the argument `sampling`. A reward may read `examples`, to which
    the indices belong too. `settings_of` is from `row_settings.read`.
    """
    decoder, text, generate = bind(config), run.tokenizer, config.generate
    lm = transformer.limit_ids(lm, text.vocab_size)
    key, eos_ids = jax.random.key(config.seed), parallel.known(text.eos_ids, lm)
    asked = settings(config, text, lm.config.vocab_size)
    search = decoder if decoder and decoder.role == "search" else None
    lms = {
        name: x if x.config.tokenizer else transformer.limit_ids(x, text.vocab_size)
        for name, x in run.lms.items()
    }
    lms["target"] = lm
    if decoder is not None:
        check_tokenizers(decoder, lms)
        lms |= early_exits(texts(decoder.hyper), lm)
    takes = {*inspect.signature(search.function).parameters} if search else {"reader"}
    if shared and "reader" in takes:
        run.say(f"the first {len(shared)} tokens of all prompts are prefilled once")
        asked["reader"] = prefill.after(lm, shared)
    if decoder is not None and search is None:
        asked["guide"] = decoder(lms)
    function: Callable[..., Any] = parallel.generator(text, run.mesh)
    if search is not None:
        handed = _handed(search, asked, takes, generate, text, eos_ids)
    elif generate.draft:
        draft = drafter(generate.draft, lms)
        asked |= {
            "draft_length": generate.draft_length, "rule": generate.rule,
            "mode": generate.mode, "guided_draft": generate.guided_draft,
        }  # fmt: skip
    if (search or generate.draft) and jax.process_count() > 1:
        raise ValueError("searches and drafts need a single process, here are several")

    def each(places: Sequence[int]) -> dict[str, Any]:
        """What each prompt has for itself; a response is the same in any batch."""
        mine = starts.arrays([begun[i] for i in places], begun)
        mine |= {k: v[list(places)] for k, v in settings_of.items()}
        return mine if search else mine | {"seeds": np.array(places)}

    def make(tokens, lengths, places):
        mine = asked | each(places)
        if search is None:
            if not generate.draft:
                return function(lm, tokens, lengths, key, **mine)
            return speculate(lm, draft, tokens, lengths, key, eos_ids=eos_ids, **mine)
        own = jax.random.fold_in(key, min(places))
        if "stops" not in takes:
            mine.pop("stops", None)
        if "forced" in mine:
            forced = {"forced": mine.pop("forced")}
            handed["sampling"] = {**(handed["sampling"] or {}), **forced}
        if "prefill" in mine:
            tokens, lengths = generation_settings.prefilled(
                tokens, lengths, mine.pop("prefill"), mine.pop("prefill_lengths", None)
            )
        if reward is not None and "judge" in takes:
            handed["judge"] = judge(reward, run, rules(generate), examples, places)
        return search(lm, lms, tokens, lengths, own, **mine, **handed)

    stream = None
    if search is None and not generate.draft and jax.process_count() == 1:
        many = min(config.batch_size, len(begun))
        stream = functools.partial(
            continuous.generate, lm, [s.prompt for s in begun], key, own=each,
            rows=many * generate.group, chunk=1 if reward is None else many,
            longest=config.length, shared=len(shared) if "reader" in asked else 0,
            mesh=run.mesh if run.mesh.size > 1 else None, eos_ids=eos_ids, **asked,
        )  # fmt: skip
    return Responder(lambda *batch: jax.device_get(make(*batch)), stream)


def _handed(
    search: plugin.Bound, asked: dict[str, Any], takes: set[str], generate: Any,
    text: Tokenizer, eos_ids: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """What a search gets besides settings; those that its samples have leave `asked`.

    Raises:
      ValueError: a setting that the search does not take, or that is given twice.
    """
    check_special_stops(search, generate, text)
    handed: dict[str, Any] = {"tokenizer": text, "judge": None, "eos_ids": eos_ids}
    handed = {k: v for k, v in handed.items() if k in takes}
    if "sampling" in takes:  # the sampling loop checks these settings
        own = {k: asked.pop(k) for k in {*asked} - {*takes, *WHOLE}}
        handed["sampling"] = {**(search.hyper["sampling"] or {}), **own} or None
    known = takes | {"stops"}  # if not taken, cut from the finished text
    wrong = sorted({*asked} - known)
    whole = getattr(inspect.getmodule(search.function), "AT_ONCE", False)
    refused = ("draft",) if whole else ("draft", "forced")
    wrong += [k for k in refused if generate[k]]
    if wrong:
        raise ValueError(f"decoder {search.name} takes no generate.{wrong[0]}")
    if twice := sorted({*asked} & {*search.hyper} - {*plugin.SEARCH, "group"}):
        raise ValueError(
            f"generate.{twice[0]} and decoder.{twice[0]} are both set: decoder "
            f"{search.name} has this setting itself, set decoder.{twice[0]} alone"
        )
    return handed


def texts(value: Any) -> Iterator[str]:
    """The texts among hyper-parameters, also those of the members of a chain."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        if isinstance(value, Mapping):
            value = [part for key, part in value.items() if key != "name"]
        for part in value:
            yield from texts(part)


def early_exits(names: Iterable[str], lm: LM) -> dict[str, LM]:
    """The LMs 'layers:K' among names: the first K layers of the model itself."""
    found = {n: _EXIT.fullmatch(n) for n in names}
    return {n: drafts.some_layers(lm, range(int(m[1]))) for n, m in found.items() if m}


def check_tokenizers(decoder: plugin.Bound, lms: dict[str, LM]) -> None:
    """Raises ValueError for an LM of another tokenizer that a decoder reads ids with."""
    if decoder.hyper.get("nudge_tokenizer"):  # it exchanges text
        return
    for name in texts(decoder.hyper):
        if name in lms:
            logprob.check_tokenizer(lms[name], name)


def rules(generate: Any) -> output.Rules:
    """What the text of a response is, from the section of a config."""
    return output.Rules(
        generate.stops, generate.prefill, generate.forced, generate.min_new
    )


def check_special_stops(search: plugin.Bound, generate: Any, text: Tokenizer) -> None:
    """Raises ValueError for stops that a search cannot see: it exchanges text alone.

    Such a decoder has `SPECIALS = False` beside it: its responses have no special tokens.
    """
    if getattr(inspect.getmodule(search.function), "SPECIALS", True):
        return
    groups = stops.parse(generate.stops, text, name="generate.stops")
    names = {i: name for name, i in text.hidden.items()}
    if found := sorted({names[i] for g in groups for i in g.marks if i in names}):
        raise ValueError(
            f"decoder {search.name} exchanges text, in which there is no special token: "
            f"leave {found[0]!r} out of generate.stops"
        )


def check_draft(name: str, lms: Collection[str]) -> None:
    """Raises ValueError for a draft that is neither an LM, 'ngram' nor 'layers:K'."""
    if name not in (*lms, "ngram") and not _EXIT.fullmatch(name):
        raise ValueError(
            f"generate.draft={name!r} is not among config.lms, {sorted(lms)}, nor 'ngram' "
            "or 'layers:K'"
        )


def drafter(name: str, lms: dict[str, LM]) -> LM | drafts.Draft:
    """The draft model: an LM by its name, 'ngram', or the target's first K layers."""
    check_draft(name, lms)
    if name in lms:
        return lms[name]
    if name == "ngram":
        return drafts.ngram(lms["target"].config.vocab_size)
    return early_exits([name], lms["target"])[name]


def judge(
    reward: plugin.Bound, run: Run, rules: output.Rules, examples: Sequence[Example],
    places: Sequence[int],
) -> Callable[[Batch], np.ndarray]:  # fmt: skip
    """The reward function of a search: scores (partial) responses given as ids.

    Their text is the text that would be written: with the prefill, cut at a stop string.

    Args:
      reward: from `rewards.load`.
      run: has the models and devices.
      rules: what the text of a response is.
      examples: whose prompts and columns the reward may read.
      places: in `examples`, of the prompts that the search was given.
    """
    score = parallel.scorer(run.mesh)
    rows = np.array(places, np.int32)

    def scores(batch: Any) -> np.ndarray:
        batch = jax.device_get(batch)
        cut = np.zeros(batch.mask.shape[:2], bool)
        answers = output.answers(batch, cut, run.tokenizer, rules)
        texts = [[a.text for a in group] for group in answers]
        own = (batch.extra or {}).get("row")
        if own is None and len(texts) == len(rows):  # it judges all prompts, in order
            own = np.arange(len(rows))
        known = own is not None
        extra: Any = {"row": rows[own]} if known else None
        return rewards.call(
            reward, batch._replace(extra=extra), texts, run.lms, tokenizer=run.tokenizer,
            score=score, examples=examples if known else None, prefill=rules.prefill,
        )  # fmt: skip

    return scores
