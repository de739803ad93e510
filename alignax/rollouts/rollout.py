"""Batches that the policy makes itself: sample, score, shape, cut into steps.

  prompts -> generate(policy) -> rewards/* -> feedback -> shaping/*, in order -> advantages

A rollout is `batches` steps' worth of prompts with a group of responses each; `epochs`
passes over it make optimiser steps. It is drawn and scored a step's worth at a time: no
LM ever sees more of it at once. Everything random is a function of the seed and of
the place in the order of prompts; that place and the rollout in use are the state, so that
a run resumes in the middle of it bit for bit. Every host holds the whole rollout and gives
its own rows.
"""

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.batch import LM, Batch, Example, Params
from alignax.inputs import layout, serialisation
from alignax.inputs.annotate import annotate
from alignax.inputs.prompts import column_names, prompt_batches
from alignax.inputs.source import Source
from alignax.plugin import Bound
from alignax.rollouts.sampler import STREAM, Baseline, Drawn, Sampler
from alignax.shaping import OF_REFERENCE

KEEP = ("all", "best", "best_worst")
PROMPTS, ROWS = 1, 2  # streams of numpy's generator under one seed


def rollout_source(
    examples: Sequence[Example],
    sampler: Sampler,
    *,
    policy: Callable[[Params], LM],
    score: Callable[..., Any],
    shaping: Sequence[Bound],
    batch_size: int,
    length: int,
    seed: int,
    group: int = 4,
    batches: int = 1,
    epochs: int = 1,
    keep: str = "all",
    needs: Sequence[str] = (),
    behaviour: LM | None = None,
    baseline: Callable[[], Baseline] | None = None,
    dynamic_sampling: bool = False,
    max_draws: int = 8,
    anchor: Callable[[Params | None], LM] | None = None,
    anchor_samples: int = 2,
    host: tuple[int, int] = (0, 1),
    grid: tuple[int, int] | None = None,
) -> Source:
    """Batches of fresh responses, shaped into advantages.

    Args:
      examples: only prompts and columns are read; each epoch over them is shuffled.
      sampler: how responses are drawn and judged.
      policy: from what is trained to the whole policy.
      score: `logprob.score` of host batches (see `parallel.scorer`).
      shaping: from `plugin.load('shaping', ...)`, in order.
      batch_size: B, prompts an optimiser step over all hosts, and drawn at once.
      length: tokens a row may have; a prompt keeps its last `length - max_new`.
      seed: of the order and of the samples. A response depends on the seed, the place of
        its prompt in the order, B and the parameters, not on `batches` or the mesh.
      group: G, responses a prompt.
      batches: optimiser steps that one pass over a rollout makes.
      epochs: passes over a rollout, each in another order.
      keep: 'all' of a group, its 'best', or 'best_worst': a pair for a preference loss;
        a group without a difference is then not valid.
      needs: what the loss declares; the reference's columns are filled once a rollout.
      behaviour: a frozen LM to sample instead of the policy.
      baseline: gives rewards of reference samples, where a shaping asks for them; called
        once, by the first rollout.
      dynamic_sampling: draw on until all groups of a rollout have a difference in their
        rewards (Yu et al. 2025); the length penalty is no difference.
      max_draws: most prompts drawn, times those of a rollout. What is then missing is
        filled with groups without a difference, which are not valid.
      anchor: from the policy's average, where the run has one, to an LM whose best of
        `anchor_samples` responses, by the same reward, is one more slot after the G,
        valid where one of these is. Its advantages are 0, its old_logps the anchor's; no
        shaping sees it.
      anchor_samples: see `anchor`.
      host: (process index, process count).
      grid: (shards over all hosts, micro-batches) that the batches of the step are
        laid out for, in one of eight shapes; None leaves one row per response.

    Returns:
      A Source, whose `next` takes (params, step, average). Its report has 'metrics' of a
      rollout at the step that made it, which the log shows under 'train/': 'rollout/'
        reward: mean over valid responses; reward_std: within groups.
        ties: share of groups without a difference.
        ended: share of responses that are not truncated; valid: of those that count.
        tokens: a response.
        kl: nats a response, where the reference is read.
        logp_gap, logp_gap_max: sampler against kernel, nats a token, of whoever sampled.
        anchor_reward: of the slot that `anchor` brings; anchor_logp_gap,
          anchor_logp_gap_max: as above.
        prompts, ties_dropped, surplus, unfilled: under dynamic sampling, how many were
          drawn; thrown away without and (drawn with the last ones needed) with a
          difference; and missing.
        sampling, scoring: seconds.
        updating: seconds from the rollout before until this one could begin: its steps,
          and the evaluations and checkpoints between them. Not in a run's first.

    Raises:
      ValueError: a setting out of its range; no prompts; a shaping whose baseline is
        not given, or is not of what it compares; hosts that do not divide B. Later,
        from `next`: what the reward does wrong; dynamic sampling that finds no difference
        at all.
    """
    counts = {"group": group, "batches": batches, "epochs": epochs}
    counts |= {"max_draws": max_draws, "anchor_samples": anchor_samples}
    own = sampler.temperature == 1 and behaviour is None  # the policy's law is sampled
    _check(
        sampler, shaping, needs, counts, own=own, keep=keep, dynamic=dynamic_sampling,
        reference=baseline is not None, anchor=anchor is not None,
    )  # fmt: skip
    if batch_size % host[1]:
        raise ValueError(
            f"batch_size {batch_size} does not divide over {host[1]} hosts"
        )
    room = length - sampler.max_new
    if room < 1:
        raise ValueError(f"length {length} leaves no room before {sampler.max_new} new")
    many = batch_size * batches
    shape_needs = {n for s in shaping for n in s.needs}
    critic = "old_values" in {*needs, *shape_needs}
    # What another than a fixed LM fills (a moving average) is filled in the step.
    frozen = tuple(
        n
        for n in sorted({*needs, *shape_needs})
        if n.endswith("_logps") and n != "old_logps"
        and (n in shape_needs or n.removesuffix("_logps") in sampler.lms)
    )  # fmt: skip
    pick = order(len(examples), batch_size, seed)
    column_names(examples)
    prompts = functools.partial(
        prompt_batches, tokenizer=sampler.tokenizer, batch_size=batch_size, length=room,
        buckets=(room,),  # one T for all: a constant reduction is by that constant
    )  # fmt: skip
    reference = functools.cache(baseline or dict)
    compiled = [
        s._replace(function=_compiled(s.function, tuple(s.hyper.items())), hyper={})
        for s in shaping
    ]

    @functools.cache
    def pool() -> np.ndarray:
        return np.sort(np.concatenate([*reference().values()]))[None]

    def identify(earlier: bool = False) -> str:
        data = hashlib.sha256(contents(examples).encode())
        settings = (
            batch_size, seed, length, keep, sorted(counts.items()), dynamic_sampling,
            anchor is not None, sorted(sampler.identity(earlier=earlier).items()),
        )  # fmt: skip
        data.update(repr(settings).encode())
        return data.hexdigest()[:16]

    identity = identify()
    stream = functools.partial(jax.random.fold_in, jax.random.key(seed))
    # The rollout in use, its number, how many of its batches are used up, and how many
    # batches of prompts were drawn so far.
    now: dict[str, Any] = {"buffer": None, "number": -1, "used": 0, "drawn": 0}
    report: dict[str, Any] = {"read": len(examples), "ids": [], "metrics": {}}
    since: list[float] = []  # when the rollout before was ready

    def sample(lm: LM, clock: dict[str, float]):
        """(examples, responses to them, places drawn, counts) of a rollout."""

        def answer(i: int) -> Drawn:
            place = now["drawn"] + i
            (p,) = prompts([examples[j] for j in pick(place)])
            mine = jax.random.fold_in(stream(STREAM), place)
            return sampler.draw(behaviour or lm, p, mine, group, clock=clock)

        if dynamic_sampling:
            rows, drawn, tally = differing(answer, many, batches * max_draws)
        else:
            drawn, tally = joined([answer(i) for i in range(batches)]), {}
            rows = np.arange(many)
        places = tally.get("prompts", many) // batch_size
        met = [j for i in range(places) for j in pick(now["drawn"] + i)]
        return [examples[met[row]] for row in rows], drawn, places, tally

    def read(lm: LM, teacher: LM | None, some, drawn: Drawn, key, clock) -> Read:
        """What is read of the responses to B prompts before they are shaped."""
        greedy, batch, said = None, drawn.batch, None
        if any(s.baseline == "greedy" for s in shaping):
            whole = sampler._replace(truncated="keep")  # no baseline is no answer
            (p,) = prompts(some)
            answer = whole.draw(lm, p, key, 1, greedy=True, clock=clock)
            greedy = np.asarray(answer.batch.feedback)
        if teacher is not None:
            (p,) = prompts(some)
            theirs = sampler.draw(teacher, p, key, anchor_samples, clock=clock)
            best = select(theirs.batch, "best")
            raw: Any = theirs.raw_logps
            said = select(theirs.batch._replace(old_logps=raw), "best")
            count = batch.valid.any(1, keepdims=True)  # an unfilled place is empty
            batch = beside(batch, best._replace(valid=best.valid & count))
        start = time.monotonic()
        if behaviour is None or critic:
            scores = score(lm, batch, needs=("state_values",) if critic else ())
        heard = scores if behaviour is None else score(behaviour, drawn.batch)
        logps: Any = np.asarray(heard.logps)[:, :group]
        if own:  # as the step reads it: fresh responses have a ratio of 1
            law: Any = np.concatenate(
                [logps, np.asarray(batch.old_logps)[:, group:]], 1
            )
            batch = batch._replace(old_logps=law)
        if critic:
            values: Any = np.asarray(scores.state_values)
            columns = {**(batch.extra or {}), "old_values": values}
            batch = batch._replace(extra=columns)
        batch = annotate(batch, sampler.lms, needs=frozen, score=score)
        clock["scoring"] += time.monotonic() - start
        gap = np.abs(logps - drawn.raw_logps)
        if said is not None:
            again = np.abs(np.asarray(score(teacher, said).logps) - said.old_logps)
            gap = np.concatenate([gap, again], 1)
        return Read(jax.tree.map(np.asarray, batch), gap, greedy)

    def rolled(params: Params, average: Params | None):
        """A rollout: (what is kept of it, ids, places drawn, metrics)."""
        jax.block_until_ready(params)  # what is still being updated is no sampling
        clock = {"sampling": 0.0, "scoring": 0.0}
        if since:
            clock["updating"] = time.monotonic() - since.pop()
        lm, teacher = policy(params), None if anchor is None else anchor(average)
        some, drawn, places, tally = sample(lm, clock)
        parts = []
        for i in range(batches):
            part = slice(i * batch_size, (i + 1) * batch_size)
            step = (now["number"] + 1) * batches + i
            mine = jax.random.fold_in(stream(STREAM + 2), step)
            parts.append(read(lm, teacher, some[part], at(part, drawn), mine, clock))
        whole = joined(parts)
        given: dict[str, Any] = {"": None, "group": None, "greedy": whole.greedy}
        if baseline is not None:
            given["reference"] = np.stack([reference()[e.id] for e in some])
            given["pool"] = pool()
        batch = slots(whole.batch, slice(group))
        for s in compiled:
            batch = shaped(s, batch, given[s.baseline])
        numbers = {**summary(batch, drawn.truncated), **tally, **clock}
        gap = whole.gap[:, :group][batch.mask & batch.valid[..., None]]
        numbers |= {"logp_gap": gap.mean(), "logp_gap_max": gap.max()}
        if teacher is not None:
            last = slots(whole.batch, slice(group, None))
            if batch.advantages is not None:
                none: Any = np.zeros_like(batch.advantages[:, :1])
                last = last._replace(advantages=none)
            batch = beside(batch, last)
            if last.valid.any():
                numbers["anchor_reward"] = last.feedback[last.valid].mean()
                gap = whole.gap[:, group:][last.mask & last.valid[..., None]]
                numbers["anchor_logp_gap"] = gap.mean()
                numbers["anchor_logp_gap_max"] = gap.max()
        metrics = {f"rollout/{k}": float(v) for k, v in numbers.items()}
        kept = jax.tree.map(np.asarray, select(batch, keep))
        return kept, [e.id for e in some], places, metrics

    def next_batch(params: Any = None, step: int = 0, average: Any = None) -> Batch:
        del step
        report["metrics"] = {}
        if now["buffer"] is None or now["used"] == batches * epochs:
            # what raises here changes nothing
            fresh, ids, places, report["metrics"] = rolled(params, average)
            now.update(buffer=fresh, ids=ids, number=now["number"] + 1, used=0)
            now["drawn"] += places
            since[:] = [time.monotonic()]
        epoch, part = divmod(now["used"], batches)
        rng = np.random.default_rng([ROWS, seed, now["number"], epoch])
        rows = rng.permutation(many) if epochs * batches > 1 else np.arange(many)
        rows = rows[part * batch_size : (part + 1) * batch_size]
        now["used"] += 1
        report["ids"] = [now["ids"][i] for i in rows]
        if grid is not None:
            whole = at(rows, now["buffer"])
            batch, useful = layout.lay(
                whole, shards=grid[0], accumulate=grid[1], host=host
            )
            report["metrics"] = {**report["metrics"], "useful_tokens": useful}
            return batch
        share = batch_size // host[1]
        return at(rows[host[0] * share : (host[0] + 1) * share], now["buffer"])

    def state() -> dict[str, Any]:
        used_up = now["buffer"] is None or now["used"] == batches * epochs
        kept = (
            {}
            if used_up
            else {"buffer": serialisation.dumps(now["buffer"]), "ids": now["ids"]}
        )
        place = {k: now[k] for k in ("number", "used", "drawn")}
        return {**place, "data": identity, **kept}

    def restore(saved: dict[str, Any]) -> None:
        if saved.get("data") not in (identity, identify(earlier=True)):
            raise ValueError(
                "the saved rollout belongs to other prompts or other rollout settings: "
                f"saved {saved.get('data')}, here {identity}"
            )
        now.update({k: saved[k] for k in ("number", "used", "drawn")})
        now["ids"] = saved.get("ids")
        now["buffer"] = (
            serialisation.loads(saved["buffer"]) if "buffer" in saved else None
        )

    return Source(next_batch, state, restore, lambda: dict(report))


class Read(NamedTuple):
    """Responses with the columns that LMs fill, and what is not kept of them."""

    batch: Batch
    gap: np.ndarray  # [B, G, T] nats between sampler and kernel; G + 1 with an anchor
    greedy: np.ndarray | None  # [B, 1] rewards of greedy responses


def _check(
    sampler: Sampler, shaping: Sequence[Bound], needs: Sequence[str],
    counts: dict[str, int], *, own: bool, keep: str, dynamic: bool, reference: bool,
    anchor: bool,
) -> None:  # fmt: skip
    """Raises ValueError for settings out of their range or against each other."""
    sampler.check()
    if keep not in KEEP:
        raise ValueError(f"rollout.keep is {keep!r}, expected one of {KEEP}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"rollout.{name} is {value}, expected at least 1")
    if counts["group"] < 2:
        comparing = [s.name for s in shaping if s.baseline == "group"]
        comparing += ["rollout.keep='best_worst'"] * (keep == "best_worst")
        comparing += ["rollout.dynamic_sampling"] * dynamic
        if comparing:
            raise ValueError(
                f"{comparing[0]} compares the responses of a group: rollout.group >= 2"
            )
    for s in shaping:
        if s.baseline in OF_REFERENCE and not reference:
            raise ValueError(f"{s.name} needs rewards of reference samples")
        earlier = [other.name for other in shaping if other.stage == "reward"]
        if s.baseline == "greedy" and earlier:
            raise ValueError(
                f"{s.name} compares with the raw reward of the greedy response, but "
                f"{earlier[0]} makes another one of all others; take another baseline, "
                "as shaping.rloo"
            )
    shape_needs = {n for s in shaping for n in s.needs}
    of_samples = "ref_logps" in shape_needs or {"ref_logps", "old_logps"} <= {*needs}
    if of_samples and not own:
        raise ValueError(
            "a KL to the reference is estimated from samples of the policy itself: "
            "rollout.temperature=1 and no rollout.policy"
        )
    if "old_logps" in needs and sampler.temperature != 1:
        raise ValueError(
            f"the loss clips ratios to the law that was sampled: to that at a temperature "
            f"of {sampler.temperature} they are not 1 even at first; rollout.temperature=1"
        )
    if anchor and (keep != "all" or "old_values" in {*needs, *shape_needs}):
        raise ValueError(
            "rollout.anchor is a slot beside a whole group, and no critic's: "
            "rollout.keep='all', and neither a loss nor a shaping with a critic"
        )


def differing(answer: Callable[[int], Drawn], many: int, most: int):
    """Dynamic sampling: draws until enough groups have a difference in their rewards.

    Source: Yu et al. 2025, https://arxiv.org/abs/2503.14476

    Args:
      answer: the responses to the i-th B prompts from here on.
      many: groups wanted.
      most: times that `answer` may be asked.

    Returns:
      (which of the groups drawn these are, they, counts): the first with a difference,
      in order; where they are too few, some without one, of which nothing is valid.

    Raises:
      ValueError: no group has one.
    """
    chunks: list[Drawn] = []
    found = total = 0
    while found < many and len(chunks) < most:
        chunks.append(answer(len(chunks)))
        found += int(chunks[-1].differs.sum())
        total += len(chunks[-1].differs)
    if not found:
        raise ValueError(
            f"dynamic sampling: none of {total} groups has a difference in its rewards "
            "(rollout.max_draws bounds how many are drawn)"
        )
    drawn = joined(chunks)
    rows = np.argsort(~drawn.differs, kind="stable")[:many]
    drawn = at(rows, drawn)
    batch = drawn.batch
    valid = batch.valid & drawn.differs[:, None]
    unfilled = int((~drawn.differs).sum())
    tally = {
        "prompts": total, "ties_dropped": total - found - unfilled,
        "surplus": found + unfilled - many, "unfilled": unfilled,
    }  # fmt: skip
    return rows, drawn._replace(batch=batch._replace(valid=valid)), tally


def at(rows: Any, tree: Any) -> Any:
    """Some rows of every array."""
    return jax.tree.map(lambda x: x[rows], tree)


def joined(trees: Sequence[Any]) -> Any:
    """The rows of all."""
    return jax.tree.map(lambda *x: np.concatenate(x), *trees)


def slots(batch: Batch, which: slice) -> Batch:
    """Some responses of every group."""
    return jax.tree.map(lambda x: x[:, which] if x.ndim > 1 else x, batch)


def beside(batch: Batch, more: Batch) -> Batch:
    """The responses of both; what a prompt has once stays as it is."""

    def both(a, b):
        return np.concatenate([a, b], 1) if a.ndim > 1 else a

    return jax.tree.map(both, batch, more)


def contents(examples: Sequence[Example]) -> str:
    """What a rollout reads of its prompts, for digests."""
    return repr([(e.id, e.prompt, sorted(e.columns.items())) for e in examples])


def order(size: int, many: int, seed: int) -> Callable[[int], list[int]]:
    """Which prompts a place has: a fresh permutation each time they were all used."""
    if not size:
        raise ValueError("no prompts: the data set is empty")

    @functools.lru_cache(maxsize=4)
    def epoch(number: int) -> np.ndarray:
        return np.random.default_rng([PROMPTS, seed, number]).permutation(size)

    def pick(number: int) -> list[int]:
        places = range(number * many, (number + 1) * many)
        return [int(epoch(at // size)[at % size]) for at in places]

    return pick


def visited(examples: Sequence[Example], many: int, seed: int, places: int):
    """The examples that the first places have, each once."""
    pick = order(len(examples), many, seed)
    met = {i for number in range(places) for i in pick(number)}
    return [examples[i] for i in sorted(met)]


@functools.lru_cache(maxsize=64)
def _compiled(shape: Callable, hyper: tuple) -> Callable:
    """One program for all the rollouts of a process: a sweep compiles it once."""
    return jax.jit(functools.partial(shape, **dict(hyper)))


def shaped(shaping: Bound, batch: Batch, baseline: np.ndarray | None) -> Batch:
    """The batch after one shaping."""
    other = None if baseline is None else jnp.asarray(baseline)
    out: Any = np.asarray(shaping(jax.tree.map(jnp.asarray, batch), other))
    if not np.isfinite(out).all():
        raise ValueError(f"{shaping.name} gave a number that is not finite")
    extra = batch.extra
    if shaping.returns:
        assert extra is not None
        extra = {**extra, "returns": out + np.asarray(extra["old_values"])}
    return batch._replace(advantages=out, extra=extra)


def select(batch: Batch, keep: str) -> Batch:
    """All of a group, its best, or its best and worst: chosen and rejected.

    A group whose best and worst earned the same has nothing to choose between: as a pair
    it is not valid. Ties of the best are broken by the first slot.
    """
    if keep == "all":
        return batch
    valid, feedback = np.asarray(batch.valid), np.asarray(batch.feedback)
    best = np.where(valid, feedback, -np.inf).argmax(1)
    worst = np.where(valid, feedback, np.inf).argmin(1)
    slots = np.stack([best] if keep == "best" else [best, worst], 1)
    b, g = valid.shape

    def take(x):
        if np.ndim(x) < 2 or np.shape(x)[:2] != (b, g):
            return x
        index = slots.reshape(*slots.shape, *[1] * (np.ndim(x) - 2))
        return np.take_along_axis(np.asarray(x), index, 1)

    out = jax.tree.map(take, batch)
    if keep == "best_worst":
        gap = np.asarray(out.feedback)[:, :1] > np.asarray(out.feedback)[:, 1:]
        out = out._replace(valid=out.valid & gap)
    return out


def summary(batch: Batch, truncated: np.ndarray) -> dict[str, float]:
    """Means over the valid responses of a rollout."""
    valid, feedback = np.asarray(batch.valid), np.asarray(batch.feedback)
    rows = [f[v] for f, v in zip(feedback, valid, strict=True) if v.any()]
    if not rows:
        raise ValueError("no valid response in a whole rollout: all were truncated")
    out = {
        "reward": feedback[valid].mean(),
        "reward_std": np.mean([r.std() for r in rows]),
        "ties": np.mean([r.min() == r.max() for r in rows]),
        "ended": 1 - truncated.mean(),
        "tokens": np.asarray(batch.mask)[valid].sum(-1).mean(),
        "valid": valid.mean(),
    }
    if batch.ref_logps is not None:
        ratio = np.asarray(batch.old_logps) - np.asarray(batch.ref_logps)
        out["kl"] = ratio[valid].sum(-1).mean()
    return {k: float(v) for k, v in out.items()}
