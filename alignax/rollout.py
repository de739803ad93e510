"""Batches that the policy makes itself: sample, score, shape, cut into steps.

  prompts -> generate(policy) -> rewards/* -> feedback -> shaping/*, in order -> advantages

A rollout is `batches` steps' worth of prompts with a group of responses each; `epochs`
passes over it make optimiser steps. Everything random is a function of the seed and of
the rollout's number; the rollout in use is part of the state, so that a run resumes in
the middle of it bit for bit. Every host holds the whole rollout and gives its own rows.
"""

import base64
import functools
import hashlib
import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax import rewards
from alignax.batch import LM, Batch, Example, Params
from alignax.plugin import Bound
from alignax.source import PromptBatch, Source, annotate, prompt_batches, texts
from alignax.tokenizer import Tokenizer

TRUNCATED = ("keep", "drop", "punish")
KEEP = ("all", "best", "best_worst")
STREAM = 2**30  # of random keys: evaluations count from 0 under the same seed
Baseline = dict[str, np.ndarray]  # an example's id -> rewards of other responses to it


class Sampler(NamedTuple):
    """How responses are drawn and judged: the same for the policy and the reference.

    Attributes:
      generate: decode.generate with the end-of-sequence ids bound; host arrays come back.
      reward: from `rewards.load`.
      lms: frozen LMs that a reward may read.
      tokenizer: of prompts and responses.
      max_new: most tokens of a response.
      temperature: of the sampled law; advantages are of that law.
      truncated: what becomes of a response that max_new ended. 'keep': nothing; 'drop':
        it is not valid; 'punish': its feedback is `punishment`.
      punishment: see `truncated`.
    """

    generate: Callable[..., Any]
    reward: Bound
    lms: Mapping[str, LM]
    tokenizer: Tokenizer
    max_new: int
    temperature: float = 1.0
    truncated: str = "keep"
    punishment: float = 0.0

    def draw(self, lm: LM, prompts: PromptBatch, key, group: int, greedy: bool = False):
        """(a host batch with feedback, sampler's log-probs, truncated, seconds of both)."""
        start = time.monotonic()
        out = jax.device_get(
            self.generate(
                lm, prompts.tokens, prompts.lengths, key, max_new=self.max_new,
                group=group, temperature=0.0 if greedy else self.temperature,
            )
        )  # fmt: skip
        middle = time.monotonic()
        batch = out.batch._replace(
            valid=out.batch.valid & prompts.valid[:, None],
            extra=prompts.columns or None,
        )
        if self.truncated == "drop":
            batch = batch._replace(valid=batch.valid & ~out.truncated)
        feedback = rewards.call(
            self.reward, batch, texts(batch, self.tokenizer), self.lms
        )
        if self.truncated == "punish":
            ended = ~(batch.valid & out.truncated)
            feedback = np.where(ended, feedback, np.float32(self.punishment))
        seconds = (middle - start, time.monotonic() - middle)
        return batch._replace(feedback=feedback), out.raw_logps, out.truncated, seconds

    def identity(self) -> dict[str, Any]:
        """What the numbers of a reference rollout depend on, part by part."""
        reward = f"{self.reward.name} {sorted(self.reward.hyper.items())}"
        return {
            "reward": reward, "tokenizer": self.tokenizer.fingerprint,
            "max_new": self.max_new, "temperature": self.temperature,
            "truncated": f"{self.truncated} {self.punishment}",
        }  # fmt: skip


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
    baseline: Baseline | None = None,
    host: tuple[int, int] = (0, 1),
) -> Source:
    """Batches of fresh responses, shaped into advantages.

    Args:
      examples: only prompts and columns are read; each epoch over them is shuffled.
      sampler: how responses are drawn and judged.
      policy: from what is trained to the whole policy.
      score: `logprob.score` of host batches (see `build.scorer`).
      shaping: from `plugin.load('shaping', ...)`, in order.
      batch_size: B, prompts an optimiser step over all hosts.
      length: tokens a row may have; a prompt keeps its last `length - max_new`.
      seed: of the order and of the samples.
      group: G, responses a prompt.
      batches: optimiser steps that one pass over a rollout makes.
      epochs: passes over a rollout, each in another order.
      keep: 'all' of a group, its 'best', or 'best_worst': a pair for a preference loss;
        a group without a difference is then not valid.
      needs: what the loss declares; the reference's columns are filled once a rollout.
      behaviour: a frozen LM to sample instead of the policy.
      baseline: rewards of reference samples, where a shaping asks for them.
      host: (process index, process count).

    Returns:
      A Source. Its report has 'metrics' of a rollout at the step that made it:
      'rollout/reward', 'rollout/reward_std' (within groups), 'rollout/ties' (share of
      groups without a difference), 'rollout/ended', 'rollout/tokens' (a response),
      'rollout/kl' (nats, where the reference is read), 'rollout/logp_gap' and
      'rollout/logp_gap_max' (sampler against kernel, nats a token), and seconds
      'rollout/sampling', 'rollout/scoring'.

    Raises:
      ValueError: a setting out of its range; no prompts; a shaping whose baseline is
        not given. Later, from `next`: what the reward does wrong.
    """
    if keep not in KEEP:
        raise ValueError(f"rollout.keep is {keep!r}, expected one of {KEEP}")
    if sampler.truncated not in TRUNCATED:
        raise ValueError(
            f"rollout.truncated is {sampler.truncated!r}, expected one of {TRUNCATED}"
        )
    for name, value in (("group", group), ("batches", batches), ("epochs", epochs)):
        if value < 1:
            raise ValueError(f"rollout.{name} is {value}, expected at least 1")
    if keep == "best_worst" and group < 2:
        raise ValueError("rollout.keep='best_worst' needs rollout.group >= 2")
    if sampler.temperature <= 0:
        raise ValueError(
            f"rollout.temperature is {sampler.temperature}: a greedy response says "
            "nothing about its alternatives"
        )
    room = length - sampler.max_new
    if room < 1:
        raise ValueError(f"length {length} leaves no room before {sampler.max_new} new")
    for s in shaping:
        if s.baseline == "reference" and baseline is None:
            raise ValueError(f"{s.name} needs rewards of reference samples")
        if s.baseline == "group" and group < 2:
            raise ValueError(
                f"{s.name} compares the responses of a group: rollout.group >= 2"
            )
    many = batch_size * batches
    shape_needs = {n for s in shaping for n in s.needs}
    of_samples = "ref_logps" in shape_needs or {"ref_logps", "old_logps"} <= {*needs}
    if of_samples and (sampler.temperature != 1 or behaviour is not None):
        raise ValueError(
            "a KL to the reference is estimated from samples of the policy itself: "
            "rollout.temperature=1 and no rollout.policy"
        )
    critic = "old_values" in {*needs, *shape_needs}
    # What another than a fixed LM fills (a moving average) is filled in the step.
    frozen = tuple(
        n
        for n in sorted({*needs, *shape_needs})
        if n.endswith("_logps") and n != "old_logps"
        and (n in shape_needs or n.removesuffix("_logps") in sampler.lms)
    )  # fmt: skip
    pick = order(len(examples), many, seed)
    prompts = functools.partial(
        prompt_batches, tokenizer=sampler.tokenizer, batch_size=many, length=room,
        buckets=(room,),  # one T for all: a constant reduction is by that constant
    )  # fmt: skip
    data = hashlib.sha256(contents(examples).encode())
    settings = (
        many,
        epochs,
        group,
        seed,
        length,
        keep,
        sorted(sampler.identity().items()),
    )
    data.update(repr(settings).encode())
    identity = data.hexdigest()[:16]
    key = jax.random.fold_in(jax.random.key(seed), STREAM)
    # The rollout in use, its number, and how many of its batches are used up.
    now: dict[str, Any] = {"buffer": None, "number": -1, "used": 0}
    report: dict[str, Any] = {"read": len(examples), "ids": [], "metrics": {}}

    def roll(params: Params, number: int) -> Batch:
        some = [examples[i] for i in pick(number)]
        (p,) = prompts(some)
        lm = policy(params)
        mine = jax.random.fold_in(key, number)
        batch, raw, truncated, seconds = sampler.draw(behaviour or lm, p, mine, group)
        start = time.monotonic()
        scores = score(lm, batch, needs=("state_values",) if critic else ())
        if sampler.temperature == 1 and behaviour is None:
            # the same law, as the step reads it: fresh responses have a ratio of 1
            batch = batch._replace(old_logps=np.asarray(scores.logps))
        if critic:
            values = {"old_values": np.asarray(scores.state_values)}
            batch = batch._replace(extra={**(batch.extra or {}), **values})
        batch = annotate(batch, sampler.lms, needs=frozen, score=score)
        greedy = None
        if any(s.baseline == "greedy" for s in shaping):
            whole = sampler._replace(truncated="keep")  # no baseline is no answer
            greedy = whole.draw(lm, p, mine, 1, greedy=True)[0].feedback
        given: dict[str, Any] = {"": None, "group": None, "greedy": greedy}
        if baseline is not None:
            given["reference"] = np.stack([baseline[e.id] for e in some])
        for s in shaping:
            batch = shaped(s, batch, given[s.baseline])
        seconds = (seconds[0], seconds[1] + time.monotonic() - start)
        gap = np.abs(np.asarray(scores.logps) - raw)[
            batch.mask & batch.valid[..., None]
        ]
        report["metrics"] = {
            f"rollout/{k}": float(v)
            for k, v in {
                **summary(batch, truncated),
                **({} if behaviour else {"logp_gap": gap.mean(), "logp_gap_max": gap.max()}),
                "sampling": seconds[0], "scoring": seconds[1],
            }.items()
        }  # fmt: skip
        now["ids"] = p.ids
        return jax.tree.map(np.asarray, select(batch, keep))

    def next_batch(params: Any = None, step: int = 0) -> Batch:
        del step
        report["metrics"] = {}
        if now["buffer"] is None or now["used"] == batches * epochs:
            fresh = roll(params, now["number"] + 1)  # what raises here changes nothing
            now.update(buffer=fresh, number=now["number"] + 1, used=0)
        epoch, part = divmod(now["used"], batches)
        rng = np.random.default_rng([seed, now["number"], epoch])
        rows = rng.permutation(many) if epochs * batches > 1 else np.arange(many)
        rows = rows[part * batch_size : (part + 1) * batch_size]
        now["used"] += 1
        report["ids"] = [now["ids"][i] for i in rows]
        share = batch_size // host[1]
        rows = rows[host[0] * share : (host[0] + 1) * share]
        return jax.tree.map(lambda x: x[rows], now["buffer"])

    def state() -> dict[str, Any]:
        used_up = now["buffer"] is None or now["used"] == batches * epochs
        kept = {} if used_up else {"buffer": pack(now["buffer"]), "ids": now["ids"]}
        return {"number": now["number"], "used": now["used"], "data": identity, **kept}

    def restore(saved: dict[str, Any]) -> None:
        if saved.get("data") != identity:
            raise ValueError(
                "the saved rollout belongs to other prompts or other rollout settings: "
                f"saved {saved.get('data')}, here {identity}"
            )
        now.update(number=saved["number"], used=saved["used"], ids=saved.get("ids"))
        now["buffer"] = unpack(saved["buffer"]) if "buffer" in saved else None

    return Source(next_batch, state, restore, lambda: dict(report))


def contents(examples: Sequence[Example]) -> str:
    """What a rollout reads of its prompts, for digests."""
    return repr([(e.id, e.prompt, sorted(e.columns.items())) for e in examples])


def order(size: int, many: int, seed: int) -> Callable[[int], list[int]]:
    """Which prompts a rollout has: a fresh permutation each time they were all used."""
    if not size:
        raise ValueError("no prompts: the data set is empty")

    @functools.lru_cache(maxsize=4)
    def epoch(number: int) -> np.ndarray:
        return np.random.default_rng([seed, number]).permutation(size)

    def pick(number: int) -> list[int]:
        places = range(number * many, (number + 1) * many)
        return [int(epoch(at // size)[at % size]) for at in places]

    return pick


def visited(examples: Sequence[Example], many: int, seed: int, rollouts: int):
    """The examples that the first rollouts draw from, each once."""
    pick = order(len(examples), many, seed)
    found = sorted({i for number in range(rollouts) for i in pick(number)})
    return [examples[i] for i in found]


def reference_rewards(
    examples: Sequence[Example], sampler: Sampler, ref: LM, *, samples: int, rows: int,
    length: int, seed: int,
) -> Baseline:  # fmt: skip
    """Rewards of K samples of the reference for every prompt.

    Args:
      examples: their prompts; ids are distinct.
      sampler: how responses are drawn and judged.
      ref: the frozen reference.
      samples: K.
      rows: responses to draw at once.
      length: as in `rollout_source`.
      seed: of the samples, which a rollout never draws again.

    Returns:
      {id: [K] rewards}.

    Raises:
      ValueError: no K, two examples with one id, or a reference response without a
        reward because it was truncated and is dropped.
    """
    if samples < 1:
        raise ValueError(f"rollout.reference_samples is {samples}, expected at least 1")
    if len({e.id for e in examples}) < len(examples):
        raise ValueError("two prompts have one id: their rewards would be mixed up")
    key = jax.random.fold_in(jax.random.key(seed), STREAM + 1)
    found: Baseline = {}
    prompts = prompt_batches(
        examples, sampler.tokenizer, batch_size=min(max(1, rows // samples), len(examples)),
        length=length - sampler.max_new,
    )  # fmt: skip
    for i, p in enumerate(prompts):
        batch, *_ = sampler.draw(ref, p, jax.random.fold_in(key, i), samples)
        for name, feedback, valid in zip(
            p.ids, batch.feedback, batch.valid, strict=False
        ):
            if not valid.all():
                raise ValueError(
                    f"{int((~valid).sum())} of {samples} reference responses to {name} "
                    "are truncated: rollout.truncated='drop' leaves no quantiles; take "
                    "'keep' or 'punish'"
                )
            found[name] = np.array(feedback, np.float32)
    return found


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


def pack(batch: Batch) -> str:
    """A host batch as text, for the state of a source."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    named: Any = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    file = io.BytesIO()
    np.savez_compressed(file, **named)
    return base64.b64encode(file.getvalue()).decode()


def unpack(text: str) -> Batch:
    """The batch that `pack` wrote."""
    fields: dict[str, Any] = {}
    for name, value in dict(np.load(io.BytesIO(base64.b64decode(text)))).items():
        field, _, column = name.removeprefix(".").partition("[")
        if column:
            fields.setdefault(field, {})[column.strip("'\"]")] = value
        else:
            fields[field] = value
    return Batch(**fields)


def table(baseline: Baseline) -> dict[bytes, np.ndarray]:
    """Rewards by a digest of the prompt's id, as `refcache` keeps them."""
    return {_digest(name): values for name, values in baseline.items()}


def untable(rows: Mapping[bytes, np.ndarray], names: Iterable[str]) -> Baseline:
    """The inverse of `table` for known ids."""
    return {name: rows[_digest(name)] for name in names}


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
