"""From a config to a function that responds to a batch of prompts, on the host."""

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from alignax import plugin, rewards
from alignax.batch import LM, Batch
from alignax.inputs.tokenizer import Tokenizer
from alignax.respond import output
from alignax.sampling import automaton, drafts, generation_settings, prefill
from alignax.sampling.speculate import speculate
from alignax.training import parallel
from alignax.training.build import Run

WHOLE = ("group", "stops", "prefill")  # of responses, not of how a token is drawn


def bind(config) -> plugin.Bound | None:
    """The decoder of a config; None samples from the model itself."""
    spec = config.decoder.to_dict()
    name = config.decoder.name if spec.pop("name", "") else ""
    if not name and spec:
        raise ValueError(f"config.decoder has no name, but {sorted(spec)}")
    return plugin.load("decoders", name, spec) if name else None


def checker(config, text: Tokenizer) -> Callable[[list[int]], Any]:
    """What raises ValueError for the ids of a prompt that the decoder cannot read.

    A decoder has it as `check(text, ids, **some of its hyper-parameters)`, or not at all.
    """
    decoder = bind(config)
    check = decoder and getattr(inspect.getmodule(decoder.function), "check", None)
    if not decoder or not check:
        return lambda ids: None
    own = {k: v for k, v in decoder.hyper.items() if k in inspect.signature(check).parameters}  # fmt: skip
    return functools.partial(check, text, **own)


def settings(config, text: Tokenizer, size: int) -> dict[str, Any]:
    """What the config asks of `decode.generate`; what is off is left out.

    Args:
      config: its section `generate`.
      text: of strings.
      size: of the model's vocabulary.
    """
    generate = config.generate
    off = dict(
        group=1, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        frequency_penalty=0.0, presence_penalty=0.0, logit_bias=(), min_new=0, stops=(),
        prefill="", forced="", candidates=16,
    )  # fmt: skip
    asked: dict[str, Any] = dict(
        group=generate.group, top_k=generate.top_k, top_p=generate.top_p,
        min_p=generate.min_p, repetition_penalty=generate.repetition_penalty,
        frequency_penalty=generate.frequency_penalty,
        presence_penalty=generate.presence_penalty, logit_bias=generate.logit_bias,
        min_new=generate.min_new, stops=generate.stops, prefill=generate.prefill,
        forced=generate.forced, candidates=generate.candidates,
    )  # fmt: skip
    used = {k: v for k, v in asked.items() if v != off[k]}
    if "logit_bias" in used:
        used["logit_bias"] = {int(i): float(nats) for i, nats in used["logit_bias"]}
    if "stops" in used:
        if not all(isinstance(s, str) and s for s in used["stops"]):
            raise ValueError(f"generate.stops is {used['stops']!r}, expected texts")
        used["stops"] = automaton.stop_strings(used["stops"], pieces(text, size))
    for name in {"prefill", "forced"} & {*used}:
        used[name] = np.array([text.encode(used[name])], np.int32)  # one for all rows
    return {"max_new": generate.max_new, "temperature": generate.temperature, **used}


def pieces(text: Tokenizer, size: int) -> list[bytes]:
    """What each of `size` ids adds to the text; b'' for specials and unknown ids.

    An id that is no whole character by itself has a byte that no text has: a stop string
    across such ids is not seen in the loop, only in the finished text.
    """
    anchor = text.encode("a")  # some decoders drop the blank in front of a text
    before = text.decode(anchor)

    def piece(i: int) -> bytes:
        said = text.decode([*anchor, i]).removeprefix(before)
        return said.encode().replace("\ufffd".encode(), b"\xff")

    known = [piece(i) for i in range(min(size, text.vocab_size))]
    return known + [b""] * (size - len(known))


def build(
    config, run: Run, lm: LM, reward: plugin.Bound | None, shared: Sequence[int] = ()
) -> Callable[..., Any]:
    """(tokens [B, P], lengths, places in the file) -> Generated, on the host.

    A decoder finds the model that answers among the LMs, as 'target'. What all prompts
    begin with, `shared`, is read once, where the engine reads the prompts: not by guides
    and drafts, nor by a search that takes no `reader`.
    """
    decoder, text, generate = bind(config), run.tokenizer, config.generate
    key, eos_ids = jax.random.key(config.seed), sorted(run.tokenizer.eos_ids)
    asked = settings(config, text, lm.config.vocab_size)
    search = decoder if decoder and decoder.role == "search" else None
    lms = {**run.lms, "target": lm}
    takes = {*inspect.signature(search.function).parameters} if search else {"reader"}
    if shared and "reader" in takes:
        run.say(f"the first {len(shared)} tokens of all prompts are read once")
        asked["reader"] = prefill.after(lm, shared)
    if decoder is not None and search is None:
        asked["guide"] = decoder(lms)
    function: Callable[..., Any] = parallel.generator(text, run.mesh)
    if search is not None:
        handed: dict[str, Any] = {"tokenizer": text, "judge": None, "eos_ids": eos_ids}
        if reward is not None:
            handed["judge"] = judge(reward, run, generate)
        handed = {k: v for k, v in handed.items() if k in takes}
        if "sampling" in takes:  # what it draws by is for the engine to check
            own = {k: asked.pop(k) for k in {*asked} - {*takes, *WHOLE}}
            handed["sampling"] = {**(search.hyper["sampling"] or {}), **own} or None
        takes |= {"prefill", "stops"}  # behind the prompt; cut from the finished text
        wrong = sorted({*asked} - takes) + ["draft"] * bool(generate.draft)
        if wrong:
            raise ValueError(f"decoder {search.name} takes no generate.{wrong[0]}")
        if twice := sorted({*asked} & {*search.hyper} - {*plugin.SEARCH, "group"}):
            raise ValueError(
                f"generate.{twice[0]} and decoder.{twice[0]} are both set: decoder "
                f"{search.name} has its own, set decoder.{twice[0]} alone"
            )
    elif generate.draft:
        draft = drafter(generate.draft, lms)
        asked |= {
            "draft_length": generate.draft_length, "rule": generate.rule,
            "mode": generate.mode, "guided_draft": generate.guided_draft,
        }  # fmt: skip
    if (search or generate.draft) and jax.process_count() > 1:
        raise ValueError("searches and drafts run in one process, here are several")

    def make(tokens, lengths, places):
        mine = dict(asked)
        for name in {"prefill", "forced"} & {*mine}:
            mine[name] = np.repeat(mine[name], len(tokens), 0)
        if search is None:  # a response is the same in any batch
            mine["seeds"] = np.array(places)
            if not generate.draft:
                return function(lm, tokens, lengths, key, **mine)
            return speculate(lm, draft, tokens, lengths, key, eos_ids=eos_ids, **mine)
        own = jax.random.fold_in(key, min(places))
        mine.pop("stops", None)
        if "prefill" in mine:
            tokens, lengths = generation_settings.prefilled(
                tokens, lengths, mine.pop("prefill"), None
            )
        return search(lm, lms, tokens, lengths, own, **mine, **handed)

    return lambda *batch: jax.device_get(make(*batch))


def check_draft(name: str, lms: Collection[str]) -> None:
    """Raises ValueError for a draft that is neither an LM nor one that needs none."""
    kind, _, count = name.partition(":")
    if name not in (*lms, "ngram") and not (kind == "layers" and count.isdigit()):
        raise ValueError(
            f"generate.draft={name!r} is not among config.lms, {sorted(lms)}, nor 'ngram' "
            "or 'layers:K'"
        )


def drafter(name: str, lms: dict[str, LM]) -> LM | drafts.Draft:
    """Who drafts: an LM by its name, 'ngram', or 'layers:K' of the target itself."""
    check_draft(name, lms)
    if name in lms:
        return lms[name]
    if name == "ngram":
        return drafts.ngram(lms["target"].config.vocab_size)
    return drafts.some_layers(lms["target"], range(int(name.partition(":")[2])))


def judge(
    reward: plugin.Bound, run: Run, generate: Any
) -> Callable[[Batch], np.ndarray]:
    """A reward as a search reads it: of (partial) responses in ids.

    Their text is the one that is written: behind the prefill, cut at the stops.

    Args:
      reward: from `rewards.load`.
      run: whose models and devices it reads with.
      generate: the section of the config.
    """
    score = parallel.scorer(run.mesh)

    def scores(batch: Batch) -> np.ndarray:
        batch = jax.device_get(batch)
        cut = np.zeros(batch.mask.shape[:2], bool)
        said = output.answers(batch, cut, run.tokenizer, generate)
        texts = [[a.text for a in group] for group in said]
        return rewards.call(
            reward, batch, texts, run.lms, tokenizer=run.tokenizer, score=score
        )

    return scores
