"""One rollout: responses drawn, scored, shaped into advantages and selected.

  prompts -> generate(policy) -> rewards/* -> feedback -> shaping/*, in order -> advantages

A rollout is `batches` steps' worth of prompts with a group of responses each. It is drawn
and scored one step's worth at a time, so that no LM ever reads more at once. Everything
random is a function of the seed and of the place in the order of prompts.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from alignax import masked
from alignax.batch import LM, Batch, Example, Params
from alignax.inputs.annotate import annotate
from alignax.inputs.detokenize import texts
from alignax.inputs.prompts import PromptBatch, prompt_batches, subset
from alignax.plugin import Bound
from alignax.reward_functions import calls
from alignax.rollouts.sampler import STREAM, Baseline, Drawn, Sampler
from alignax.rollouts.selection import at, beside, differing, joined, select, slots
from alignax.sampling import weights

# What a loss needs that estimates something of the distribution that was sampled.
OF_SAMPLES = ("old_logps", "sampler_logps", "advantages")


class Settings(NamedTuple):
    """The numbers of a run's rollouts.

    Attributes:
      batch_size: B, prompts of an optimiser step over all hosts, and drawn at once.
      length: tokens of a row; a prompt keeps its last `length - max_new`.
      seed: of the order and of the samples. A response depends on the seed, the place of
        its prompt in the order, B and the parameters, not on `batches` or the mesh.
      group: G, responses per prompt.
      batches: optimiser steps that one pass over a rollout makes.
      epochs: passes over a rollout, each in another order.
      keep: 'all' of a group, its 'best', or 'best_worst': a pair for a preference loss;
        a group without a difference is then not valid.
      dynamic_sampling: draw on until all groups of a rollout have a difference in their
        rewards (Yu et al. 2025); the length penalty is no difference.
      max_draws: most prompts drawn, in multiples of a rollout's. What is then missing is
        filled with groups without a difference, which are not valid.
      anchor_samples: responses per prompt of the anchor, of which the best is taken.
      host: (process index, process count).
      show: prompts per shown rollout whose responses are given as text.
      show_every: a rollout is shown when so many steps have begun since the one before.
      grid: (shards over all hosts, micro-batches) that the batches of the step are
        packed for, in one of sixteen shapes; None leaves one row per response.
    """

    batch_size: int
    length: int
    seed: int
    group: int = 4
    batches: int = 1
    epochs: int = 1
    keep: str = "all"
    dynamic_sampling: bool = False
    max_draws: int = 8
    anchor_samples: int = 2
    show: int = 0
    show_every: int = 1
    host: tuple[int, int] = (0, 1)
    grid: tuple[int, int] | None = None

    @property
    def prompts(self) -> int:
        """Prompts of a rollout."""
        return self.batch_size * self.batches

    @property
    def steps(self) -> int:
        """Optimiser steps on a rollout."""
        return self.batches * self.epochs


class Setup(NamedTuple):
    """What all rollouts of a run are made with; nothing of it changes during the run."""

    settings: Settings
    examples: Sequence[Example]
    pick: Callable[[int], list[int]]  # place in the order -> indices of B examples
    sampler: Sampler
    policy: Callable[[Params], LM]
    score: Callable[..., Any]  # `logprob.score` of host batches, at `temperature`
    temperature: float  # see `scoring_temperature`
    shaping: Sequence[Bound]  # compiled, in order
    columns: tuple[str, ...]  # '<name>_logps' that frozen LMs fill
    critic: bool  # whether 'old_values' are needed
    on_policy: bool  # old_logps are the policy's own, as the kernel scores it
    fresh: bool  # see the function of this name
    scored: bool  # the policy scores its responses: something reads that
    sampled: bool  # whether the sampler's own log-probabilities are kept
    behaviour: LM | None  # the frozen behaviour policy, None where it is the policy
    anchor: Callable[[Params | None], LM] | None
    reference: Callable[[], tuple[Baseline, np.ndarray]] | None  # rewards, all sorted


class Rollout(NamedTuple):
    """A rollout that is ready to be cut into batches of the training step."""

    batch: Batch
    ids: list[str]  # of its prompts
    places: int  # batches of B prompts that were drawn for it
    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # rows of text: see `shown`
    tokens: int  # that were sampled for it
    running: dict[str, list[float]]  # by shaping: what it keeps for the next one


class Sampled(NamedTuple):
    """Responses to the prompts of a rollout, before they are scored by LMs."""

    examples: Sequence[Example]
    drawn: Drawn
    places: int  # batches of B prompts that were drawn
    counts: dict[str, int]  # of dynamic sampling, and of prompts that were cut


class Scored(NamedTuple):
    """Responses with the columns that LMs fill, and what is only reported of them."""

    batch: Batch
    # [B, G, T] nats between sampler and kernel; G + 1 with an anchor; None: not computed
    gap: np.ndarray | None
    greedy: np.ndarray | None  # [B, 1] rewards of greedy responses


def fresh(settings: Settings, *, on_policy: bool, anchor: bool) -> bool:
    """Whether a step's responses are always of the very parameters that it changes.

    Then importance ratios are 1 by construction, and no old_logps are kept: `ratios`
    takes the policy's own. It holds for a whole run: one pass over a rollout of one
    batch, the policy's own samples, none of an anchor.
    """
    return settings.steps == 1 and on_policy and not anchor


def scoring_temperature(
    temperature: float, needs: Sequence[str], *, judged: bool
) -> float:
    """The temperature at which the step and its rollouts score responses.

    Ratios, policy gradients and a KL to a teacher are of the distribution that was sampled:
    that at the temperature of the rollouts. Losses of pairs and of imitation train the
    model itself, whoever wrote the responses: 1.

    Args:
      temperature: of the rollouts.
      needs: of the loss.
      judged: whether there is a reward. What learns from responses without one (a
        distillation) has the distribution that was sampled as its object.
    """
    return temperature if of_samples(needs, judged=judged) else 1.0


def of_samples(needs: Sequence[str], *, judged: bool) -> bool:
    """Whether a loss with these needs estimates something of what was sampled."""
    return bool({*OF_SAMPLES} & {*needs}) or not judged


@weights.kept()
def roll(
    setup: Setup, params: Params, average: Params | None, *, number: int, drawn: int,
    since: float | None, show: bool = False,
    running: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> Rollout:  # fmt: skip
    """Makes a rollout.

    Args:
      setup: of the run.
      params: of the policy.
      average: that of the parameters, None where the run keeps none.
      number: of this rollout in the run.
      drawn: batches of B prompts that were drawn before.
      since: time.monotonic() when the rollout before was ready, None for the first.
      show: whether it has samples.
      running: what the shapings kept from the rollout before; {} at the start of a run.

    Raises:
      ValueError: what the reward does wrong; dynamic sampling that
        finds no difference at all; a shaping that gives a number that is not finite.
    """
    jax.block_until_ready(params)  # pending updates do not count as sampling
    clock = {"sampling": 0.0, "judging": 0.0, "scoring": 0.0}
    if since is not None:
        clock["updating"] = time.monotonic() - since
    lm = setup.policy(params)
    anchor = None if setup.anchor is None else setup.anchor(average)
    some, responses, places, counts = sample(setup, lm, drawn, clock)
    size, batches, group = (
        setup.settings.batch_size, setup.settings.batches, setup.settings.group,
    )  # fmt: skip
    parts = []
    for i in range(batches):
        part = slice(i * size, (i + 1) * size)
        key = _key(setup, STREAM + 2, number * batches + i)
        mine = at(part, responses)
        parts.append(score_part(setup, lm, anchor, some[part], mine, key, clock))
    whole: Scored = joined(parts)
    batch = slots(whole.batch, slice(group))
    compared = baselines(setup, some, whole.greedy, running)
    batch, after = shape_all(setup.shaping, batch, compared, responses.members)
    judged = setup.sampler.reward is not None
    numbers = {**summary(batch, responses, judged), **counts, **clock}
    for shape in setup.shaping:  # what it worked with
        numbers |= labelled(shape, running.get(shape.name, shape.running.values()))
    if whole.gap is not None:
        numbers |= gap_metrics(whole.gap[:, :group], batch)
    if anchor is not None:
        assert whole.gap is not None
        last = anchor_slot(whole.batch, batch, group)
        numbers |= anchor_metrics(whole.gap[:, group:], last)
        batch = beside(batch, last)
    metrics = {f"rollout/{k}": float(v) for k, v in numbers.items()}
    rows = shown(setup, some, batch, responses, number) if show else []
    kept: Batch = jax.tree.map(np.asarray, select(batch, setup.settings.keep))
    if setup.fresh:
        kept = kept._replace(old_logps=None)
    tokens = int(np.asarray(responses.batch.mask).sum())
    return Rollout(kept, [e.id for e in some], places, metrics, rows, tokens, after)


def sample(setup: Setup, lm: LM, first: int, clock: dict[str, float]) -> Sampled:
    """Draws the responses of a rollout, from place `first` in the order of prompts on."""
    settings, examples = setup.settings, setup.examples
    shorter = []

    def answer(i: int) -> Drawn:
        prompts = _prompts(setup, subset(examples, setup.pick(first + i)))
        shorter.append(prompts.cut)
        key = _key(setup, STREAM, first + i)
        return setup.sampler.draw(
            setup.behaviour or lm, prompts, key, settings.group, clock=clock
        )

    counts: dict[str, int] = {}
    if settings.dynamic_sampling:
        most = settings.batches * settings.max_draws
        rows, drawn, counts = differing(answer, settings.prompts, most)
    else:
        drawn = joined([answer(i) for i in range(settings.batches)])
        rows = np.arange(settings.prompts)
    places = counts.get("prompts", settings.prompts) // settings.batch_size
    met = [j for i in range(places) for j in setup.pick(first + i)]
    if setup.sampler.tokenizer.reading.truncate_prompts != "drop":
        counts["cut_prompts"] = sum(shorter)
    some = subset(examples, [met[row] for row in rows])
    return Sampled(some, drawn, places, counts)


def score_part(
    setup: Setup, lm: LM, anchor: LM | None, some: Sequence[Example], drawn: Drawn,
    key: Any, clock: dict[str, float],
) -> Scored:  # fmt: skip
    """What LMs add to the responses to B prompts before these are shaped.

    Args:
      setup: of the run.
      lm: the policy.
      anchor: the LM whose best response is one more slot, or None.
      some: the B examples.
      drawn: the responses to them.
      key: for the greedy baseline and the anchor.
      clock: its 'sampling' and 'scoring', in seconds, are added to.
    """
    greedy, batch, best = None, drawn.batch, None
    if any(s.baseline == "greedy" for s in setup.shaping):
        whole = setup.sampler._replace(truncated="keep")  # a baseline is never dropped
        prompts = _prompts(setup, some)
        answer = whole.draw(lm, prompts, key, 1, greedy=True, clock=clock)
        greedy = np.asarray(answer.batch.feedback)
        known = drawn.batch.valid & np.asarray(
            answer.batch.valid
        )  # no baseline, no advantage
        drawn = drawn._replace(batch=drawn.batch._replace(valid=known))
        batch = drawn.batch
    if anchor is not None:
        best, own_logps = anchor_best(setup, anchor, some, key, clock)
        count = batch.valid.any(1, keepdims=True)  # an unfilled place is empty
        batch = beside(batch, best._replace(valid=best.valid & count))
    start = time.monotonic()
    batch, logps = fill(setup, lm, drawn.batch, batch)
    clock["scoring"] += time.monotonic() - start
    gap = None if logps is None else np.abs(logps - sampled_logps(setup, drawn))
    if best is not None:
        assert gap is not None  # what has an anchor is scored
        again = np.asarray(setup.score(anchor, own_logps).logps)
        gap = np.concatenate([gap, np.abs(again - own_logps.old_logps)], 1)
    return Scored(jax.tree.map(np.asarray, batch), gap, greedy)


def anchor_best(
    setup: Setup, anchor: LM, some: Sequence[Example], key: Any, clock: dict[str, float]
) -> tuple[Batch, Batch]:
    """The best of the anchor's responses to B prompts, by the reward of the run.

    Returns:
      They, [B, 1, T], with old_logps of the sampling distribution; and once more with
      old_logps as the kernel scores them, as the sampler computed them.
    """
    drawn = setup.sampler.draw(
        anchor, _prompts(setup, some), key, setup.settings.anchor_samples, clock=clock
    )
    as_scored = drawn.batch._replace(old_logps=sampled_logps(setup, drawn))
    return select(drawn.batch, "best"), select(as_scored, "best")


def sampled_logps(setup: Setup, drawn: Drawn) -> Any:
    """The sampler's log-probabilities of the distribution that the kernel scores."""
    raw = setup.temperature == 1 and setup.sampler.grammar is None
    return drawn.raw_logps if raw else drawn.batch.old_logps


def fill(
    setup: Setup, lm: LM, sampled: Batch, batch: Batch
) -> tuple[Batch, Float[np.ndarray, "B G T"] | None]:
    """Fills old_logps, old_values, sampler_logps and the columns of frozen LMs.

    Args:
      setup: of the run.
      lm: the policy.
      sampled: the responses of the behaviour policy.
      batch: they, perhaps with the anchor's behind them.

    Returns:
      The batch, and the kernel's log-probabilities of `sampled` under the LM that
      sampled them, nats per token; None where nothing but a metric would read them (the
      step itself compares its own with the sampler's then).
    """
    group, logps = setup.settings.group, None
    if setup.sampled:
        own: Any = {"sampler_logps": np.asarray(batch.old_logps)}
        batch = batch._replace(extra={**(batch.extra or {}), **own})
    if setup.scored:
        scores = setup.score(lm, batch, needs=("state_values",) if setup.critic else ())
        logps = np.asarray(scores.logps)[:, :group]
    if setup.behaviour is not None:
        logps = np.asarray(setup.score(setup.behaviour, sampled).logps)[:, :group]
    if setup.on_policy and logps is not None:  # the kernel's, as the step reads it
        old: Any = np.concatenate([logps, np.asarray(batch.old_logps)[:, group:]], 1)
        batch = batch._replace(old_logps=old)
    if setup.critic:
        values: Any = np.asarray(scores.state_values)
        batch = batch._replace(extra={**(batch.extra or {}), "old_values": values})
    columns = setup.columns
    return annotate(batch, setup.sampler.lms, needs=columns, score=setup.score), logps


def baselines(
    setup: Setup, some: Sequence[Example], greedy: np.ndarray | None,
    running: Mapping[str, Sequence[float]],
) -> list[np.ndarray | None]:  # fmt: skip
    """What each shaping compares with, as its `baseline` names it; None for the group.

    `running` has by shaping what it kept from the rollout before, {} at the start.
    """
    given: dict[str, Any] = {"": None, "group": None, "greedy": greedy}
    if setup.reference is not None:
        rewards, pool = setup.reference()
        given["reference"] = np.stack([rewards[e.id] for e in some])
        given["pool"] = pool
    return [
        np.array([[*running.get(s.name, s.running.values())]], np.float32)
        if s.baseline == "running"
        else given[s.baseline]
        for s in setup.shaping
    ]


def compiled(shaping: Sequence[Bound]) -> list[Bound]:
    """The shapings, jitted with their hyper-parameters bound."""

    def one(s: Bound) -> Bound:
        hyper = tuple(s.hyper.items())
        update = None if s.update is None else _compiled(s.update, hyper)
        return s._replace(
            function=_compiled(s.function, hyper), update=update, hyper={}
        )

    return [one(s) for s in shaping]


@functools.lru_cache(maxsize=64)
def _compiled(shape: Callable, hyper: tuple) -> Callable:
    """One program for all the rollouts of a process: a sweep compiles it once."""
    return jax.jit(functools.partial(shape, **dict(hyper)))


def shape_all(
    shaping: Sequence[Bound], batch: Batch, compared: Sequence[np.ndarray | None],
    members: Mapping[str, np.ndarray],
) -> tuple[Batch, dict[str, list[float]]]:  # fmt: skip
    """The batch after all shapings, and by shaping the numbers that it keeps.

    Args:
      shaping: in order.
      batch: the responses of a rollout.
      compared: what each shaping compares with.
      members: rewards of the members of an ensemble by label, each [B, G].
    """
    if any("members" in s.needs for s in shaping):
        more: Any = {f"reward/{k}": v for k, v in members.items()}
        batch = batch._replace(extra={**(batch.extra or {}), **more})
    kept = {}
    for s, baseline in zip(shaping, compared, strict=True):
        batch, numbers = shaped(s, batch, baseline)
        if numbers:
            kept[s.name] = numbers
    if batch.extra is not None:  # rewards of members are for the shapings alone
        left = {k: v for k, v in batch.extra.items() if not k.startswith("reward/")}
        batch = batch._replace(extra=left or None)
    return batch, kept


def labelled(shaping: Bound, numbers: Iterable[float]) -> dict[str, float]:
    """Metrics of the numbers that a shaping keeps."""
    name = shaping.name.rpartition(".")[2]
    return {f"{name}/{k}": v for k, v in zip(shaping.running, numbers, strict=True)}


def shaped(
    shaping: Bound, batch: Batch, baseline: np.ndarray | None
) -> tuple[Batch, list[float]]:
    """The batch after one shaping, and the numbers that the shaping keeps."""
    other = None if baseline is None else jnp.asarray(baseline)
    given = jax.tree.map(jnp.asarray, batch)
    out: Any = np.asarray(shaping(given, other))
    if not np.isfinite(out).all():
        raise ValueError(f"{shaping.name} gave a number that is not finite")
    extra = batch.extra
    if shaping.returns:
        assert extra is not None
        extra = {**extra, "returns": out + np.asarray(extra["old_values"])}
    kept = [] if shaping.update is None else np.asarray(shaping.update(given, other))[0]
    return batch._replace(advantages=out, extra=extra), [float(x) for x in kept]


def anchor_slot(whole: Batch, batch: Batch, group: int) -> Batch:
    """The slot behind the group, with advantages of 0 where `batch` has any."""
    last = slots(whole, slice(group, None))
    if batch.advantages is None:
        return last
    none: Any = np.zeros_like(batch.advantages[:, :1])
    return last._replace(advantages=none)


def gap_metrics(
    gap: np.ndarray, batch: Batch, name: str = "logp_gap"
) -> dict[str, float]:
    """Mean and maximum of `gap` over the scored tokens of valid responses, nats."""
    found = gap[batch.mask & batch.valid[..., None]]
    if not found.size:
        return {}
    return {name: float(found.mean()), f"{name}_max": float(found.max())}


def anchor_metrics(gap: np.ndarray, last: Batch) -> dict[str, float]:
    """Reward and gap of the anchor's slot; nothing where none of it is valid."""
    if not last.valid.any():
        return {}
    reward = float(last.feedback[last.valid].mean())
    return {"anchor_reward": reward, **gap_metrics(gap, last, "anchor_logp_gap")}


def summary(batch: Batch, drawn: Drawn, judged: bool) -> dict[str, float]:
    """Means over the valid responses of a rollout, and what makes others not valid.

    Where none is valid there is 'empty', and no mean; of rewards where it is `judged`.
    """
    valid, feedback = np.asarray(batch.valid), np.asarray(batch.feedback)
    out = {
        "ended": 1 - drawn.truncated.mean(),
        "valid": valid.mean(),
    }
    if judged:
        out["failed_rewards"] = drawn.failed.mean()
    rows = [f[v] for f, v in zip(feedback, valid, strict=True) if v.any()]
    if not rows:
        return {k: float(v) for k, v in {**out, "empty": 1.0}.items()}
    sizes = np.asarray(batch.mask)[valid].sum(-1)
    scored = np.asarray(batch.mask) & valid[..., None]
    if judged:
        earned = feedback[valid]
        out |= {
            "reward": earned.mean(),
            "reward_std": np.mean([r.std() for r in rows]),
            "reward_min": earned.min(),
            "reward_max": earned.max(),
            "ties": np.mean([r.min() == r.max() for r in rows]),
        }
    out |= {
        "tokens": sizes.mean(),
        "entropy": -np.asarray(drawn.batch.old_logps)[scored].mean(),
    }
    for share in (10, 50, 90):
        out[f"tokens_p{share}"] = np.quantile(sizes, share / 100)
    for label, values in drawn.members.items():
        out[f"reward/{label}"] = values[valid].mean()
    out |= explained(batch)
    if batch.ref_logps is not None:
        ratio = np.asarray(batch.old_logps) - np.asarray(batch.ref_logps)
        out["kl"] = ratio[valid].sum(-1).mean()
    return {k: float(v) for k, v in out.items()}


def shown(
    setup: Setup, some: Sequence[Example], batch: Batch, drawn: Drawn, number: int
) -> list[dict[str, Any]]:
    """The responses to the first prompts of a rollout as rows of text.

    A row has the prompt, the columns of its data, and of every response its text, reward as
    a score (and that of each member), advantage (mean over its tokens, None without), whether it
    was cut off at max_new, and whether it counts.
    """
    many = min(setup.settings.show, len(some))
    first = at(slice(many), drawn)
    several = setup.sampler.conversation is not None
    given = calls.Responses(first.batch, [], {}, setup.sampler.tokenizer)
    words = (
        calls.whole_texts(given)  # with the replies
        if several
        else texts(first.batch, setup.sampler.tokenizer)
    )
    advantages = None
    if batch.advantages is not None:
        some_batch = at(slice(many), batch)
        mean = masked.token_mean(jnp.asarray(some_batch.advantages), some_batch)
        advantages = np.asarray(mean)
    rows = []
    for b in range(many):
        row: dict[str, Any] = {
            "rollout": number, "id": some[b].id, "prompt": some[b].prompt,
            **{f"column {k}": v for k, v in some[b].columns.items()},
            "responses": words[b], "scores": first.batch.feedback[b].tolist(),
        }  # fmt: skip
        for label, values in first.members.items():
            row[f"reward {label}"] = values[b].tolist()
        if advantages is not None:
            row["advantages"] = advantages[b].tolist()
        row |= {
            "truncated": first.truncated[b].tolist(),
            "valid": np.asarray(first.batch.valid)[b].tolist(),
        }
        rows.append(row)
    return rows


def explained(batch: Batch) -> dict[str, float]:
    """How much of the variance of the returns the critic foresaw: 1 - Var(R - V) / Var(R).

    Over the scored tokens of valid responses; {} without a critic and where all returns are
    equal. 0 is a constant value, 1 is perfect, and below 0 the critic does harm.
    """
    extra = batch.extra or {}
    if not {"returns", "old_values"} <= extra.keys():
        return {}
    scored = np.asarray(batch.mask & batch.valid[..., None])
    returns, values = (np.asarray(extra[k])[scored] for k in ("returns", "old_values"))
    total = returns.var()
    if not total:
        return {}
    return {"explained_variance": float(1 - (returns - values).var() / total)}


def _prompts(setup: Setup, some: Sequence[Example]) -> PromptBatch:
    """B prompts, all of one T: a reduction over T is then over a constant number."""
    room = setup.settings.length - setup.sampler.max_new
    (prompts,) = prompt_batches(
        some, setup.sampler.tokenizer, batch_size=setup.settings.batch_size,
        length=room, buckets=(room,),
    )  # fmt: skip
    return prompts


def _key(setup: Setup, stream: int, place: int) -> Any:
    key = jax.random.fold_in(jax.random.key(setup.settings.seed), stream)
    return jax.random.fold_in(key, place)
