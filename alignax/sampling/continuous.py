"""Continuous batching: a row that ended is replaced, until every prompt has its responses.

  prompts, the longest first -> prefill of a few -> free rows of the running batch
  decoding steps until enough rows ended -> their responses -> the next prompts

*Exact*, as `decode.generate`, and a response does not depend on what else is in the batch:
the programs that compute it follow from the length of its own prompt and the arguments of
the call, and its random numbers from (key, its seed, its place in the group).

Source: Yu et al. 2022 (Orca), https://www.usenix.org/conference/osdi22/presentation/yu
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling import decode, generation_settings, guides, response_state
from alignax.sampling.decode import Generated, State
from alignax.sampling.guides import Guide
from alignax.sampling.prefill import WHOLE, Reader, traced
from alignax.sampling.response_state import Rules

SMALLEST = 64  # tokens: prompts are not padded to less
TOGETHER = 128  # tokens of a prefill: of shorter prompts there are several in one
STEPS = 32  # between two calls of `halt`


class Live(NamedTuple):
    """The running batch; the first axis of every leaf is N, rows that may be replaced."""

    state: State  # its `step` is 0 for every row
    rules: Rules  # what each row has for itself
    starts: Array  # [N] tokens of the prompt
    seed: Array  # [N]
    place: Array  # [N] in the group


class Job(NamedTuple):
    """What is the same for all prompts of a call."""

    lm: LM  # unstacked
    key: Array
    reader: tuple[Callable, Callable]
    guide: Any  # init, update, keep


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static arguments of the compiled programs."""

    group: int
    greedy: bool
    kind: str | None  # of the guide
    candidates: int
    rows: int  # N
    rows_on: NamedSharding | None


class Item(NamedTuple):
    """A response that is waited for."""

    prompt: int
    place: int  # in the group


def generate(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    key: Array,
    *,
    rows: int,
    max_new: int,
    longest: int,
    chunk: int = 1,
    group: int = 1,
    temperature: Any = 1.0,
    own: Callable[[list[int]], dict[str, Any]] = lambda places: {},
    reader: Reader = WHOLE,
    shared: int = 0,
    guide: Guide | None = None,
    candidates: int = 16,
    rows_on: NamedSharding | None = None,
    halt: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Iterator[tuple[list[int], Generated]]:
    """The responses of `decode.generate` to any number of prompts, as they are finished.

    Prompts of similar lengths run together, the longest first. A prompt is padded to the
    next of 64, 128, 256, 384, 512, 768, ... tokens; this, `rows` and `longest` are all that
    its programs depend on.

    Args:
      lm: the model; its layers are copied once, unless `transformer.unstack` was applied.
      prompts: ids, at least one each; with `shared`, more than that.
      key: `jax.random.key`.
      rows: responses that are sampled at the same time, at least `group`.
      max_new: most tokens of a response, EOS included.
      longest: most tokens of a row: of a prompt, its prefill and its response.
      chunk: prompts of a yielded batch.
      group: G.
      temperature: one for all prompts.
      own: (indices of prompts) -> arguments of `decode.generate` that each has for itself:
        `seeds` (by default the indices), `prefill`, `forced`, `limits`, ...
      reader: of `decode.generate`.
      shared: tokens of the prefix that the reader has read, if it has one.
      guide: of kind vector or scalar.
      candidates: of `decode.generate`.
      rows_on: where the rows of the running batch lie; None leaves it to the devices of
        the model.
      halt: called every few steps; True ends the call with the prompts that are finished.
      **settings: all others of `decode.generate`, for all prompts.

    Yields:
      (indices, Generated on the host) for `chunk` prompts that are finished, at the end of
      a length class for fewer: then the last ones are copies of the first. T differs.

    Raises:
      ValueError: as `decode.generate`; fewer rows than a group has.
    """
    if rows < group or min(chunk, group) < 1:
        raise ValueError(
            f"rows={rows}, group={group}, chunk={chunk}; expected rows >= group, all at "
            "least 1"
        )
    if not prompts:
        return
    reader.check_lm(lm)
    lm, made = unstacked((lm, None if guide is None else guides.traced(guide)))
    job = Job(lm, key, traced(reader), made)
    first = own([0])
    greedy = (
        np.ndim(temperature) == 0 and temperature == 0 and "temperature" not in first
    )
    static = Settings(
        group, bool(greedy), None if guide is None else guide.kind,
        min(candidates, lm.config.vocab_size), rows, rows_on,
    )  # fmt: skip

    def request(places: list[int], width: int) -> generation_settings.Request:
        tokens = np.zeros((len(places), width), np.int32)
        for row, i in zip(tokens, places, strict=True):
            row[: len(prompts[i])] = prompts[i]
        sizes = np.array([len(prompts[i]) for i in places], np.int32)
        each: dict[str, Any] = {
            "limits": np.full(len(places), max_new), "seeds": np.array(places),
            "temperature": temperature, **settings, **own(places),
        }  # fmt: skip
        return generation_settings.parse(
            tokens, sizes, lm.config.vocab_size, max_new=max_new, group=group,
            reader=reader, **each,
        )  # fmt: skip

    more = max_new + (first["prefill"].shape[1] if "prefill" in first else 0)
    classes: dict[int, list[int]] = {}  # by the width that a prompt is padded to
    for i, prompt in enumerate(prompts):
        size = len(prompt)
        width = min(shared + padded(size - shared), longest - more)
        classes.setdefault(max(size, width), []).append(i)
    slots = {w: max(w + more, min(_power(w + more), longest)) for w in classes}
    for width in sorted({*slots.values()}, reverse=True):
        mine = {
            w: classes[w] for w in sorted(classes, reverse=True) if slots[w] == width
        }
        run = _Run(static, job, width, request, mine, halt)
        yield from run.batches(chunk)
        if run.halted:
            return


@jax.jit
def unstacked(lms: Any) -> Any:
    """Every LM of a tree with its layers apart; once, for many programs."""
    return transformer.unstack(lms)


def padded(size: int) -> int:
    """The width that a prompt is padded to: SMALLEST times 1, 2, 4, 6, 8, 12, 16, ..."""
    whole = max(SMALLEST, _power(size))
    less = whole // 4 * 3
    return less if whole > 4 * SMALLEST and size <= less else whole


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


class _Run:
    """The prompts whose rows have one number of slots."""

    def __init__(
        self, static: Settings, job: Job, slots: int, request: Callable[..., Any],
        classes: dict[int, list[int]], halt: Callable[[], bool],
    ):  # fmt: skip
        self.static, self.job, self.slots = static, job, slots
        self.request, self.halt, self.halted = request, halt, False
        self.queue = [
            (width, [Item(i, g) for i in places for g in range(static.group)])
            for width, places in classes.items()
        ]
        self.owners: list[Item | None] = [None] * static.rows
        self.live: Live | None = None
        self.rules: Rules | None = (
            None  # of all rows, but for what they have themselves
        )
        self.found: dict[int, dict[int, Any]] = {}  # prompt -> place -> its response
        self.steps = 0

    def batches(self, chunk: int) -> Iterator[tuple[list[int], Generated]]:
        """The finished prompts, `chunk` at a time."""
        done: list[int] = []
        while not self.halted and (self.queue or any(self.owners)):
            while self.queue and self.needed() <= self.owners.count(None):
                self.admit()
            done += self.decode()
            self.halted = self.halt()
            while len(done) >= chunk:
                yield done[:chunk], self.take(done[:chunk], chunk)
                done = done[chunk:]
        if done:
            yield done, self.take(done, chunk)

    def together(self, width: int) -> int:
        """Prompts of one prefill."""
        group, rows = self.static.group, self.static.rows
        return max(1, min(TOGETHER // width, rows // group))

    def needed(self) -> int:
        """Free rows for which a prefill is made; more than N if there is nothing to do."""
        if not self.queue:
            return self.static.rows + 1
        width, items = self.queue[0]
        most = self.together(width) * self.static.group
        return min(len(items), most, max(1, self.static.rows // 4))

    def admit(self) -> None:
        """A prefill of the next prompts, whose responses get the free rows."""
        width, items = self.queue[0]
        group, n = self.static.group, self.static.rows
        free = [slot for slot, owner in enumerate(self.owners) if owner is None]
        places: list[int] = []
        slots: dict[Item, int] = {}
        for item, slot in zip(items, free, strict=False):
            if item.prompt not in places:
                if len(places) == self.together(width):
                    break
                places.append(item.prompt)
            slots[item] = slot
        for item, slot in slots.items():
            self.owners[slot] = item
        del items[: len(slots)]
        if not items:
            self.queue.pop(0)
        fill = self.together(width) - len(places)
        request = self.request([*places, *[places[0]] * fill], width)
        to = np.full((len(places) + fill, group), n, np.int32)  # N: nowhere
        for item, slot in slots.items():
            to[places.index(item.prompt), item.place] = slot
        if self.live is None:
            self.live = empty(self.static, self.job, request, self.slots)
        self.rules = response_state.apart(request.rules)[0]
        self.live = _admit(
            self.live, self.job, request, to.reshape(-1), static=self.static
        )

    def decode(self) -> list[int]:
        """Steps until enough rows ended; the prompts that are finished then."""
        n = self.static.rows
        assert self.live is not None and self.rules is not None
        enough = min(self.needed(), n)
        self.live, step = _decode(
            self.live, self.job, self.rules, STEPS, enough,
            static=self.static,
        )  # fmt: skip
        s = self.live.state
        names = ("tokens", "ends", "ended", "raw", "sampled_logps", "done", "failed")
        found = jax.device_get({k: getattr(s, k) for k in names} | {"step": step})
        starts = np.asarray(self.live.starts)
        self.steps += int(found.pop("step"))
        finished = []
        for slot, item in enumerate(self.owners):
            if item is None or not found["done"][slot]:
                continue
            if found["failed"] is not None and found["failed"][slot]:
                raise ValueError(
                    f"prompt {item.prompt} has no token to draw: the grammar or the logit "
                    "bias masks all of them, or the guide gave NaN"
                )
            row = {k: np.array(found[k][slot]) for k in names[:5]}
            mine = self.found.setdefault(item.prompt, {})
            mine[item.place] = row | {"start": starts[slot]}
            self.owners[slot] = None
            if len(mine) == self.static.group:
                finished.append(item.prompt)
        return finished

    def take(self, places: list[int], chunk: int) -> Generated:
        """The responses to these prompts, filled up with copies of the first."""
        rows = [self.found[i][g] for i in places for g in range(self.static.group)]
        rows += rows[: self.static.group] * (chunk - len(places))
        for i in places:
            del self.found[i]
        x = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
        steps, self.steps = self.steps, 0
        out = decode.result(
            x["tokens"], x["start"], x["ends"], x["ended"], x["raw"],
            x["sampled_logps"], self.static.group, {"steps": steps},
        )  # fmt: skip
        return jax.device_get(out)


def _rows(job: Job, request: Any, slots: int, static: Settings) -> Live:
    """The rows of a few prompts after their prefill."""
    rows, state = decode.begin(
        job.lm, request, job.key, job.guide, job.reader[0], slots, static.group,
        static.kind,
    )  # fmt: skip
    seed = jnp.repeat(request.seeds, static.group)
    place = jnp.arange(len(seed), dtype=jnp.int32) % static.group
    return Live(
        state._replace(step=jnp.zeros(len(seed), jnp.int32)), response_state.apart(rows.rules)[1], rows.lengths,
        seed, place,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("static", "slots"))
def empty(static: Settings, job: Job, request: Any, slots: int) -> Live:
    """A running batch of which every row is free."""
    shapes = jax.eval_shape(lambda: _rows(job, request, slots, static))
    live = jax.tree.map(
        lambda x: jnp.zeros((static.rows, *x.shape[1:]), x.dtype), shapes
    )
    live = live._replace(state=live.state._replace(done=jnp.ones(static.rows, bool)))
    return _placed(live, static)


@functools.partial(jax.jit, static_argnames="static", donate_argnames="live")
def _admit(live: Live, job: Job, request: Any, to: Any, *, static: Settings) -> Live:
    """The rows of a few prompts, written to the rows `to` [R G]; N is nowhere."""
    new = _rows(job, request, live.state.tokens.shape[1], static)
    live = jax.tree.map(lambda a, b: a.at[to].set(b, mode="drop"), live, new)
    return _placed(live, static)


@functools.partial(jax.jit, static_argnames="static", donate_argnames="live")
def _decode(
    live: Live, job: Job, rules: Rules, steps: Any, enough: Any, *, static: Settings
) -> tuple[Live, Array]:
    """Steps until `enough` rows are done, at most `steps`: (the batch, steps taken)."""
    keys = decode.keys_of(job.key, live.seed, live.place)
    rules = decode.for_draws(response_state.joined(rules, live.rules), static.greedy)
    setup = decode.Setup(
        job.lm, job.reader[1], job.guide, static.kind, static.candidates, static.greedy,
        rules, keys, jnp.arange(static.rows),
    )  # fmt: skip
    s = jax.lax.while_loop(
        lambda s: (s.step < steps) & (s.done.sum() < enough),
        functools.partial(decode.step, setup),
        live.state._replace(step=jnp.int32(0)),
    )
    state = s._replace(step=live.state.step)
    return _placed(live._replace(state=state), static), s.step


def _placed(live: Live, static: Settings) -> Live:
    if static.rows_on is None:
        return live
    return jax.lax.with_sharding_constraint(live, static.rows_on)
