"""Responses to a file of prompts: `config.prompts` -> WORKDIR/responses.jsonl.

  prompts -> ids, never cut -> continuous batching                (sampling/continuous.py)
             or, for searches, drafts and several processes, batches of similar length
          -> one line per prompt, appended after each batch               (output.py)

What a response is depends on the prompts and the config alone. So a run that was killed can
be resumed, and ends with the same file as a run that was not.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Int

from alignax import plugin, rewards
from alignax.batch import Example, Message
from alignax.models import sharding
from alignax.records import messages
from alignax.reports.progress import progress
from alignax.respond import output, responder, row_settings
from alignax.respond import starts as beginnings
from alignax.respond.starts import Start
from alignax.reward_functions import time_limit
from alignax.runs import checkpoint, lease, workdirs
from alignax.runs.model_paths import ModelPath
from alignax.sampling import generation_settings, grammars, weights
from alignax.sampling.prefill import common
from alignax.text.tokenizer import Tokenizer
from alignax.training import build, checks, defaults, loading, parallel
from alignax.training.plugins import has_rollouts

NAME = workdirs.RESPONSES
# A prefix that all prompts share is prefilled once if it has at least this number of tokens
# and at least half of the longest prompt. For a shorter prefix, the attention tiles that a
# prefill behind a cache cannot skip cost more than is saved.
SHARED = 32


class Prompts(NamedTuple):
    """The prompts as ids, in batches."""

    examples: Sequence[Example]
    starts: list[Start]  # their ids, and those that their responses begin with
    batches: list[list[int]]  # indices into `examples`, the longest prompts first
    shared: int  # tokens of the shared prefix to prefill once; 0 if it is too short
    own: Mapping[str, np.ndarray] = MappingProxyType({})  # see `row_settings`, [M]

    @property
    def ids(self) -> list[list[int]]:
        return [s.prompt for s in self.starts]


def respond(config, workdir: str, stop: Callable[[], bool] = lambda: False) -> bool:
    """Answers the prompts that have no response in the workdir yet.

    A line has `id`, `prompt`, `responses` (G texts: with the prefill, without the stop
    string), and for each of them `logps` (nats, under the policy at temperature 1),
    `law_logps` (nats, under the distribution that was sampled; null for a search that has
    none), `tokens`, `finish` ('eos', 'stop' or 'length') and, with a reward, `scores`. With
    config.generate.token_logps it also has `token_ids`, `token_logps` and `token_law_logps`,
    a list for each response.
    `data.jsonl` reads the lines as groups. Until the run ends, the lines are in the order
    in which prompts are finished; then they are sorted into the order of the prompts.

    Args:
      config: with `prompts`, and with `generate` and `decoder` for how to respond.
      workdir: the same command on the same folder resumes the run.
      stop: called after every batch, or every few steps; True stops the run with the
        responses that are finished.

    Returns:
      Whether every prompt is answered.

    Raises:
      ValueError, OSError: an error of the config or of a file; a prompt that is empty or
        too long; a workdir with responses of another config, other prompts or other
        weights.
    """
    if "://" in workdir:
        raise ValueError(
            f"workdir {workdir} is remote: responses are appended to a file"
        )
    workdirs.check_owner(workdir, config, defaults.get_config())
    model = loading.model_path(config)
    now = check(config, model)
    with lease.Lease(workdir) as owner:
        return _owned(config, workdir, model, now, stop, owner)


def _owned(
    config, workdir: str, model: ModelPath | None, now: Prompts, stop: Callable[[], bool],
    owner: lease.Lease,
) -> bool:  # fmt: skip
    folder = checkpoint.absolute(workdir)
    try:
        run = build.build(config, workdir, model)
        owner.settle()
        with time_limit.by_default(config.rollout.reward_seconds):
            return _respond(config, run, now, stop, owner)
    except lease.Taken:
        raise
    except BaseException:
        if not (folder / NAME).exists():  # the folder stays free for others
            with contextlib.suppress(OSError):
                (folder / NAME).with_suffix(".json").unlink(missing_ok=True)
            workdirs.release(workdir)
        raise


def check(config, model: ModelPath | None = None) -> Prompts:
    """Checks the config and reads the prompts, before weights are read.

    Raises:
      ValueError, OSError: see `respond`.
    """
    for key in ("num_steps", "num_epochs"):
        if config[key]:
            raise ValueError(
                f"{key} is {config[key]}, but a config with prompts does not train: set "
                f"{key}=0, and model.path to the trained run"
            )
    if config.evals or has_rollouts(config):
        raise ValueError(
            "a config with prompts takes neither evals nor rollouts: use another run"
        )
    checks.check_sections(config)
    decoder = responder.bind(config)
    row_settings.check(config, decoder)
    if config.generate.guide_prompt and (decoder is None or decoder.role == "search"):
        raise ValueError(
            "config.generate.guide_prompt is what a guide reads: config.decoder.name is "
            f"{config.decoder.name!r}, expected a decoder with a `guide`"
        )
    if "target" in config.lms:
        raise ValueError(
            "lms.target: that name is reserved for the model that responds"
        )
    spec = config.generate.reward.to_dict()
    reward = rewards.load(spec) if spec else None
    if config.generate.grammar:
        grammars.load(config.generate.grammar, "generate.grammar")
    if config.generate.draft:
        responder.check_draft(config.generate.draft, [*config.lms])
    examples = plugin.load_examples(config.prompts)
    if reward is not None:
        rewards.check(reward, examples)
    if skipped := getattr(examples, "report", {}).get("malformed"):
        raise ValueError(f"{len(skipped)} prompts are malformed; first {skipped[0]}")
    text = loading.load_tokenizer(config, loading.tokenizer_path(config, model))
    text = text.for_data(examples)
    prompts = tokenized(
        examples, text, batch_size=config.batch_size, check=responder.checker(config, text),
        room=config.length - config.generate.max_new, prefill=config.generate.prefill,
        forced=config.generate.forced, guide=config.generate.guide_prompt,
    )  # fmt: skip
    own = row_settings.read(
        config, examples, [len(s.forced) for s in prompts.starts],
        functools.partial(_place, examples),
    )  # fmt: skip
    return prompts._replace(own=own)


def tokenized(
    examples: Sequence[Example],
    text: Tokenizer,
    *,
    batch_size: int,
    room: int,
    check: Callable[[list[int]], Any] = lambda ids: None,
    prefill: str = "",
    forced: str = "",
    guide: str = "",
) -> Prompts:
    """Prompts as ids, none of them cut.

    Args:
      examples: their prompts and template variables are read.
      text: the tokenizer.
      batch_size: prompts of a batch.
      room: most tokens of a prompt with the prefill.
      check: called with the ids of each prompt and its prefill; raises ValueError.
      prefill: how all responses begin.
      forced: how they go on; scored.
      guide: what a guide reads instead, see `starts.guide_prompt`; '' is the prompt.

    Raises:
      ValueError: prompts that are empty, that the template refuses or that do not pass
        `check`; two with one id; or some of more than `room` tokens. Says how many, and
        which is the first.
    """
    starts, seen, wrong = [], set(), []
    for i, e in enumerate(examples):
        try:
            if e.id in seen:
                raise ValueError(f"two prompts have the id {e.id!r}")
            seen.add(e.id)
            if _is_blank(e.prompt):
                raise ValueError("the prompt is empty")
            starts.append(beginnings.start(text, e, prefill, forced))
            if guide:
                other = beginnings.guide_prompt(text, e, guide, prefill)
                starts[-1] = starts[-1]._replace(guide=other)
            check(starts[-1].prompt + starts[-1].prefill)
        except ValueError as error:
            wrong.append(f"{_place(examples, i)}: {error}")
    if wrong:
        count = f"{len(wrong)} of {len(examples)} prompts cannot be used; first "
        raise ValueError((count if len(wrong) > 1 else "") + wrong[0])
    if not starts:
        raise ValueError("config.prompts has no prompt")
    sizes = np.array([len(s.prompt) + len(s.prefill) for s in starts])
    _check_room(examples, "prompts", sizes, room)
    _check_room(
        examples, "guide prompts", np.array([len(s.guide) for s in starts]), room
    )
    ids = [s.prompt for s in starts]
    # the longest first: if memory runs out, then in the first batch
    order = np.argsort(-sizes, kind="stable")
    many = min(batch_size, len(ids))
    batches = [order[i : i + many].tolist() for i in range(0, len(ids), many)]
    same = common(ids) if len(ids) > 1 else 0
    worth = same >= SHARED and 2 * same >= sizes.max()
    return Prompts(examples, starts, batches, same if worth else 0)


def _check_room(
    examples: Sequence[Example], what: str, sizes: Int[np.ndarray, " M"], room: int
) -> None:
    """Raises ValueError where some of the prompts have more than `room` tokens."""
    if not (sizes > room).any():
        return
    which = [_place(examples, int(i)) for i in np.flatnonzero(sizes > room)]
    raise ValueError(
        f"{len(which)} of {len(sizes)} {what} have more than the {room} tokens that "
        "config.length leaves before generate.max_new, with the prefill; the longest has "
        f"{sizes.max()}; first {which[0]}"
    )


def _is_blank(prompt: str | Sequence[Message]) -> bool:
    """Whether a prompt says nothing: all of it is blank text."""
    if isinstance(prompt, str):
        return not prompt.strip()
    texts = [messages.text({"content": None, **m}) for m in prompt]
    return not messages.further(prompt) and not any(t.strip() for t in texts)


def _place(examples: Sequence[Example], index: int) -> str:
    """Where an example comes from, as far as its data set says."""
    found = getattr(examples, "place", None)
    return found(index) if found else examples[index].id


@weights.kept()
def _respond(
    config, run: build.Run, now: Prompts, stop: Callable[[], bool], owner: lease.Lease
) -> bool:
    path = epath.Path(run.workdir) / NAME
    lm = run.assemble(sharding.placed(run.policy.params, run.mesh), run.lms)
    spec = config.generate.reward.to_dict()
    reward = rewards.load(spec) if spec else None
    first = now.starts[0]
    make = responder.build(
        config, run, lm, reward, now.starts, first.prompt[: now.shared], now.examples,
        now.own,
    )  # fmt: skip
    score = parallel.scorer(run.mesh)
    settings = dict(now.own)
    if guided := [s.guide for s in now.starts if s.guide]:
        settings["guide_prompt"] = np.concatenate(guided)
    mine, grammar = jax.process_index() == 0, config.generate.grammar
    done = output.begin(
        path, now.examples, {"policy": lm, **run.lms}, run.tokenizer,
        reward=rewards.identity(reward) if reward else "", write=mine,
        grammar=grammar and grammars.load(grammar, "generate.grammar").identity,
        settings=settings,
    )  # fmt: skip
    total, tokens, start = len(now.starts), 0, time.monotonic()
    run.say(
        f"prompts: {total}, {len(done)} answered already, {min(map(len, now.ids))} to "
        f"{max(map(len, now.ids))} tokens; the first, as the model gets it:\n"
        f"{run.tokenizer.decode(first.prompt + first.prefill, keep_specials=True)!r}"
    )
    lines: list[dict[str, Any]] = []
    stats: dict[str, list[float]] = {}
    # `finish` says more than the first; steps of one run are no mean over batches
    skipped = ("ended", *(("steps",) if make.stream is not None else ()))
    with progress(total, start=len(done), name=run.name) as show:
        for places, out in drawn(now, make, done, stop):
            check_numbers(out, [_place(now.examples, i) for i in places])
            for name, value in out.stats.items():
                if np.ndim(value) == 0 and name not in skipped:
                    stats.setdefault(name, []).append(float(value))
            found = list(rows(config, run, now, places, out, reward, score))
            tokens += sum(sum(row["tokens"]) for row in found)
            found = [row for row in found if row["id"] not in done]
            owner.check()
            if mine:
                output.append(path, found)
            lines += found
            done |= {row["id"] for row in found}
            rate = tokens / (time.monotonic() - start)
            show(len(done), {"train/tokens_per_second": rate})
            if make.stream is None and len(done) < total and stop():
                return False
    if len(done) < total:
        return False
    if mine:  # also the lines of a killed run, in the order of its batches
        output.arrange(path, [e.id for e in now.examples])
    if lines:
        run.say(output.summary(lines, stats, time.monotonic() - start))
    run.say(f"{total} prompts are answered in {path}")
    return True


def drawn(
    now: Prompts, make: responder.Responder, done: set[str], stop: Callable[[], bool]
) -> Iterator[tuple[list[int], Any]]:
    """(prompts, Generated) of those without a response; `done` may grow meanwhile."""
    if make.stream is not None:
        every = [i for places in now.batches for i in places]
        known = {i for i in every if now.examples[i].id in done}
        place = functools.partial(_place, now.examples)
        yield from make.stream(skip=known, halt=stop, name=place)
        return
    for places in now.batches:
        if not all(now.examples[i].id in done for i in places):
            yield places, make.batch(*padded(now, places))


def check_numbers(out: Any, places: Sequence[str]) -> None:
    """Raises ValueError for responses that were drawn from no distribution."""
    if out.raw_logps is not None:
        wrong = np.isnan(out.raw_logps) & np.asarray(out.batch.mask)
        if found := [p for p, row in zip(places, wrong, strict=False) if row.any()]:
            raise ValueError(
                f"the model's log-probabilities of the response to {found[0]} are NaN: "
                "there is no distribution to respond from"
            )


def padded(
    now: Prompts, places: Sequence[int]
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, " B"], list[int]]:
    """A batch, filled with copies of its first prompt, so that its shape is not new."""
    fill = len(now.batches[0]) - len(places)
    places = [*places, *[places[0]] * fill]
    tokens, lengths = generation_settings.ragged(
        [now.ids[i] for i in places], shared=now.shared
    )
    return tokens, lengths, places


def rows(
    config, run: build.Run, now: Prompts, places: Sequence[int], out: Any,
    reward: plugin.Bound | None, score: Callable[..., Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The lines of a batch."""
    text, batch = run.tokenizer, out.batch
    # also for the copies that fill the batch: no new shape
    rules = responder.rules(config.generate)
    filled = [*places, *[places[0]] * (len(batch.tokens) - len(places))]
    least = now.own["min_new"][filled].tolist() if "min_new" in now.own else None
    answers = output.answers(batch, out.truncated, text, rules, least)
    scores = None
    if reward is not None:
        texts = [[a.text for a in group] for group in answers]
        judged = batch._replace(extra={"row": np.array(filled, np.int32)})
        scores = rewards.call(
            reward, judged, texts, run.lms, tokenizer=text, score=score,
            examples=now.examples, prefill=rules.prefill,
        ).tolist()  # fmt: skip

    def each(x, b: int) -> list[np.ndarray]:
        """What belongs to the tokens of the text, of every response to a prompt."""
        return [x[b, g][batch.mask[b, g]][: a.tokens] for g, a in enumerate(answers[b])]

    def sums(logps, b: int) -> list[float | None]:
        if logps is None:
            return [None] * len(answers[b])
        found = [float(np.sum(k, dtype=np.float64)) for k in each(logps, b)]
        return [x if math.isfinite(x) else None for x in found]

    def by_token(b: int) -> dict[str, Any]:
        if not config.generate.token_logps:
            return {}
        found = {"token_ids": [x.tolist() for x in each(batch.tokens, b)]}
        for name, logps in (("logps", out.raw_logps), ("law_logps", batch.old_logps)):
            none = [None] * len(answers[b])
            found[f"token_{name}"] = none if logps is None else [
                [float(v) if math.isfinite(v) else None for v in x] for x in each(logps, b)
            ]  # fmt: skip
        return found

    for b, place in enumerate(places):
        example = now.examples[place]
        prompt = example.prompt
        yield {
            "id": example.id,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "responses": [a.text for a in answers[b]],
            "logps": sums(out.raw_logps, b),
            "law_logps": sums(batch.old_logps, b),
            "tokens": [a.tokens for a in answers[b]],
            "finish": [a.finish for a in answers[b]],
            **by_token(b),
        } | ({} if scores is None else {"scores": scores[b]})
