"""Continuous batching: a row that ended is replaced, until every prompt has its responses.

  prompts, the longest first -> prefill of a few -> free rows of the running batch
  decoding steps until enough rows ended -> their responses -> the next prompts

*Exact*, as `decode.generate`, and a response does not depend on what runs beside it, bit for
bit: the programs that compute it follow from the arguments of the call, and its random
numbers from (key, its seed, its place in the group).

Source: Yu et al. 2022 (Orca), https://www.usenix.org/conference/osdi22/presentation/yu
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from jaxtyping import Array

from alignax.batch import LM
from alignax.models import fallback, sharding, transformer
from alignax.sampling import (
    decode,
    generation_settings,
    guides,
    response_state,
    weights,
)
from alignax.sampling.decode import Generated, State
from alignax.sampling.guides import Guide
from alignax.sampling.prefill import WHOLE, Reader, traced
from alignax.sampling.response_state import Rules

SMALLEST = 64  # tokens: prompts are not padded to less
TOGETHER = {"cpu": 128}  # tokens of a prefill of several prompts; elsewhere 1024
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
    guide: Any  # init (where there is a prefill), update, keep


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static arguments of the compiled programs."""

    group: int
    greedy: bool
    kind: str | None  # of the guide
    candidates: int
    rows: int  # N
    mesh: Mesh | None


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
    skip: Collection[int] = (),
    chunk: int = 1,
    group: int = 1,
    temperature: Any = 1.0,
    own: Callable[[list[int]], dict[str, Any]] = lambda places: {},
    reader: Reader = WHOLE,
    shared: int = 0,
    guide: Guide | None = None,
    candidates: int = 16,
    mesh: Mesh | None = None,
    halt: Callable[[], bool] = lambda: False,
    name: Callable[[int], str] = "prompt {}".format,
    **settings: Any,
) -> Iterator[tuple[list[int], Generated]]:
    """The responses of `decode.generate` to any number of prompts, as they are finished.

    The longest prompts are first. A prompt is padded to the next of 64, 128, 256, 384, 512,
    768, ... tokens. Rows that differ by more than a factor of 4 in length do not run
    together, unless they are fewer than `rows`.

    Args:
      lm: the model; its layers are copied once, unless `transformer.unstack` was applied.
      prompts: ids, at least one each; with `shared`, more than that.
      key: `jax.random.key`.
      rows: responses that are sampled at the same time, at least `group`.
      max_new: most tokens of a response, EOS included.
      longest: most tokens of a row: of a prompt, its prefill and its response.
      skip: indices of prompts that have their responses; the others are as without it.
      chunk: prompts of a yielded batch.
      group: G.
      temperature: one for all prompts.
      own: (indices of prompts) -> arguments of `decode.generate` that each has for itself:
        `seeds` (by default the indices), `prefill`, `limits`, `guide_prompts`, ...
      reader: of `decode.generate`.
      shared: tokens of the prefix that the reader has read, if it has one.
      guide: of kind vector or scalar.
      candidates: of `decode.generate`.
      mesh: of the model; rows are spread over it if they divide.
      halt: called every few steps; True ends the call with the prompts that are finished.
      name: what an error calls a prompt.
      **settings: all others of `decode.generate`, for all prompts.

    Yields:
      (indices, Generated on the host) for `chunk` prompts that are finished; for fewer where
      no more will be: then the last ones are copies of the first. T may differ. stats has
      'steps', which the call has taken so far, and 'ended'.

    Raises:
      ValueError: as `decode.generate`; fewer rows than a group has.
    """
    if rows < group or min(chunk, group) < 1:
        raise ValueError(
            f"rows={rows}, group={group}, chunk={chunk}; expected rows >= group, all at "
            "least 1"
        )
    decode.check_guide(guide, candidates)
    if {*range(len(prompts))} <= {*skip}:
        return
    reader.check_lm(lm)
    settings |= {
        k: jax.tree.map(jnp.asarray, settings[k])  # once, for all programs
        for k in ("stops", "grammar")
        if settings.get(k) is not None
    }
    made = None if guide is None else guides.traced(guide)
    lm, made = unstacked(weights.for_decoding((lm, made)))
    own_guide = guide  # with the layers that are apart
    if guide is not None:
        init, update, keep = made
        own_guide = guide._replace(init=init, update=update, keep=keep)
    job = Job(lm, key, traced(reader), None)
    first = own([0])
    greedy = (
        np.ndim(temperature) == 0 and temperature == 0 and "temperature" not in first
    )
    static = Settings(
        group, bool(greedy), None if guide is None else guide.kind,
        min(candidates, lm.config.vocab_size), rows, mesh,
    )  # fmt: skip
    request = functools.partial(
        _request, lm, prompts, own_guide, own,
        dict(max_new=max_new, group=group, reader=reader, temperature=temperature,
             limits=max_new, **settings),
    )  # fmt: skip
    more = max_new + (first["prefill"].shape[1] if "prefill" in first else 0)
    widths = []
    for prompt in prompts:
        width = min(shared + padded(len(prompt) - shared), longest - more)
        widths.append(max(len(prompt), width))
    steps = 0
    for places in together(np.array(widths) + more, -(-rows // group)):
        slots = max(widths[i] for i in places) + more
        mine = [i for i in places if i not in skip]
        run = _Run(static, job, slots, request, mine, widths, shared, steps)
        yield from run.batches(chunk, halt, name)
        if run.halted:
            return
        steps = run.steps


def _request(
    lm: LM, prompts: Sequence[Sequence[int]], guide: Guide | None,
    own: Callable[[list[int]], dict[str, Any]], settings: dict[str, Any],
    places: list[int], width: int,
) -> tuple[generation_settings.Request, Any]:  # fmt: skip
    """Prompts of one width with their settings, and the guide's init, update and keep."""
    many, size = len(places), lm.config.vocab_size
    tokens = np.zeros((many, width), np.int32)
    for row, i in zip(tokens, places, strict=True):
        row[: len(prompts[i])] = prompts[i]
    sizes = np.array([len(prompts[i]) for i in places], np.int32)
    asked = {**settings, "seeds": np.array(places), **own(places)}
    where = asked.pop("guide_prompts", None), asked.pop("guide_lengths", None)
    there = generation_settings.on_prompts(guide, *where, many, size)
    request = generation_settings.parse(tokens, sizes, size, **asked)
    return request, None if there is None else guides.traced(there)


def together(sizes: np.ndarray, least: int) -> list[list[int]]:
    """Which rows run together: indices of sizes within a factor of 4, the largest first.

    Args:
      sizes: [M] tokens of the rows.
      least: where there are fewer, smaller ones run with them.
    """
    found: list[list[int]] = []
    for i in np.argsort(-sizes, kind="stable").tolist():
        small = found and 4 * sizes[i] < sizes[found[-1][0]]
        if not found or (small and len(found[-1]) >= least):
            found.append([])
        found[-1].append(i)
    if len(found) > 1 and len(found[-1]) < least:
        last = found.pop()
        found[-1] += last
    return found


def unstacked(lms: Any) -> Any:
    """Every LM of a tree with its layers apart; once, for many programs."""

    def one(lm):
        if not isinstance(lm, LM) or isinstance(lm.params["blocks"], tuple):
            return lm
        return LM(lm.config, {**lm.params, "blocks": _layers(lm)})

    return jax.tree.map(one, lms, is_leaf=lambda x: isinstance(x, LM))


@jax.jit
def _layers(lm: LM) -> Any:
    return transformer.unstack(lm).params["blocks"]


def padded(size: int) -> int:
    """The width that a prompt is padded to: SMALLEST times 1, 2, 4, 6, 8, 12, 16, ..."""
    whole = max(SMALLEST, _power(size))
    less = whole // 4 * 3
    return less if whole > 4 * SMALLEST and size <= less else whole


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (int(size) - 1).bit_length()


class _Run:
    """The prompts that run together."""

    def __init__(
        self, static: Settings, job: Job, slots: int, request: Callable[..., Any],
        places: list[int], widths: list[int], shared: int, steps: int,
    ):  # fmt: skip
        self.static, self.job, self.slots = static, job, slots
        self.request, self.shared = request, shared
        self.queue = collections.deque((i, widths[i]) for i in places)
        self.owners: list[Item | None] = [None] * static.rows
        self.live: Live | None = None
        self.rules: Rules | None = None  # what all rows share
        self.guide: Any = None  # its update and keep
        self.found: dict[int, dict[int, Any]] = {}  # prompt -> place -> its response
        self.halted, self.steps = False, steps

    def batches(
        self, chunk: int, halt: Callable[[], bool], name: Callable[[int], str]
    ) -> Iterator[tuple[list[int], Generated]]:
        """The finished prompts, `chunk` at a time."""
        done: list[int] = []
        while not self.halted and (self.queue or any(self.owners)):
            while self.queue and self.needed() <= self.owners.count(None):
                self.admit()
            done += self.decode(name)
            self.halted = halt()
            while len(done) >= chunk:
                yield done[:chunk], self.take(done[:chunk], chunk)
                done = done[chunk:]
        if done:
            yield done, self.take(done, chunk)

    def at_once(self, width: int) -> int:
        """Prompts of one prefill, of this width."""
        tokens = TOGETHER.get(fallback.platform(), 1024)
        free = self.static.rows // 4 // self.static.group
        return max(1, min(tokens // (width - self.shared), free))

    def prompts(self) -> list[int]:
        """The next prompts of one width, as many as a prefill has."""
        width = self.queue[0][1]
        same = itertools.takewhile(lambda x: x[1] == width, self.queue)
        return [prompt for prompt, _ in itertools.islice(same, self.at_once(width))]

    def needed(self) -> int:
        """Free rows for which a prefill is made; all of them where nothing is left."""
        if not self.queue:
            return self.static.rows
        return len(self.prompts()) * self.static.group

    def admit(self) -> None:
        """A prefill of the next prompts, whose responses get free rows."""
        places = self.prompts()
        width, group = self.queue[0][1], self.static.group
        for _ in places:
            self.queue.popleft()
        free = (slot for slot, owner in enumerate(self.owners) if owner is None)
        to = [next(free) for _ in range(len(places) * group)]
        for at, slot in enumerate(to):
            self.owners[slot] = Item(places[at // group], at % group)
        # of one shape, whatever is left: copies fill it up, and are written nowhere
        fill = self.at_once(width) - len(places)
        to += [self.static.rows] * fill * group
        request, guide = self.request([*places, *places[:1] * fill], width)
        job = self.job._replace(guide=guide)
        self.guide = None if guide is None else (Partial(_read), *guide[1:])
        if self.live is None:
            self.live = empty(self.static, job, request, self.slots)
        self.rules = response_state.apart(request.rules)[0]
        self.live = _admit(
            self.live, job, request, np.array(to, np.int32), static=self.static
        )

    def decode(self, name: Callable[[int], str]) -> list[int]:
        """Steps until enough rows ended; the prompts that are finished then."""
        assert self.live is not None and self.rules is not None
        enough = self.needed()
        self.live, step = _decode(
            self.live, self.job._replace(guide=self.guide), self.rules, STEPS, enough,
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
                    f"{name(item.prompt)} has no token to draw: the grammar or the logit "
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
        out = decode.result(
            x["tokens"], x["start"], x["ends"], x["ended"], x["raw"],
            x["sampled_logps"], self.static.group, {"steps": self.steps},
        )  # fmt: skip
        return jax.device_get(out)


def _read(*args: Any) -> Any:
    """In place of a guide's init, where rows go on: its arrays would be arguments."""
    raise AssertionError(args)


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
    """The rows spread over the mesh, and the heads of caches over its models."""
    mesh = static.mesh
    if mesh is None or static.rows % sharding.num_shards(mesh):
        return live
    rows, models = sharding.BATCH[0], mesh.shape["model"]

    def place(x: Array) -> Array:
        heads = "model" if x.ndim == 4 and x.shape[1] % models == 0 else None
        spec = P(rows, heads) if x.ndim > 1 else P(rows)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, live)
