"""Rollouts as a source of batches: the place in a run, and how it is saved and restored.

`epochs` passes over a rollout of `batches` steps' worth of prompts make optimiser steps.
The place in the order of prompts and the rollout in use are the state, so that a run
resumes in the middle of a rollout bit for bit. Every host holds the whole rollout and
gives its own rows.
"""

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from alignax import rewards
from alignax.batch import LM, OF_BEHAVIOUR, Batch, Example, Params
from alignax.inputs import layout, serialisation
from alignax.inputs.prompts import column_names
from alignax.inputs.rows import carried_columns
from alignax.inputs.source import Source
from alignax.plugin import Bound
from alignax.reward_functions.digest import DIGESTS
from alignax.rollouts.rollout import (
    Settings,
    Setup,
    compiled,
    fresh,
    roll,
    scoring_temperature,
)
from alignax.rollouts.sampler import Baseline, Sampler
from alignax.rollouts.selection import at, order
from alignax.shaping import OF_REFERENCE

log = logging.getLogger(__name__)
KEEP = ("all", "best", "best_worst")
COUNTS = ("group", "batches", "epochs", "max_draws", "anchor_samples")  # at least 1
EMPTY = 10  # rollouts without a valid response, in a row, that end a run
NO_DIFFERENCE = (
    "; or no group has a difference in its rewards (rollout.dynamic_sampling, "
    "rollout.max_draws)"
)
ROWS = 2  # stream of numpy's generator under the seed of a run


class Place(NamedTuple):
    """Where a run is in its rollouts."""

    buffer: Batch | None = None  # the rollout in use
    ids: list[str] | None = None  # of its prompts
    number: int = -1  # of this rollout
    used: int = 0  # how many of its batches are used up
    drawn: int = 0  # batches of B prompts drawn so far
    ready: float | None = None  # time.monotonic() when it was made; not saved
    tokens: int = 0  # sampled since the start of the run
    empty: int = 0  # rollouts without a valid response, in a row up to this one
    running: Mapping[str, list[float]] = MappingProxyType({})  # what shapings keep


def rollout_source(
    examples: Sequence[Example],
    sampler: Sampler,
    *,
    policy: Callable[[Params], LM],
    score: Callable[..., Any],
    shaping: Sequence[Bound],
    needs: Sequence[str] = (),
    behaviour: LM | None = None,
    baseline: Callable[[], Baseline] | None = None,
    anchor: Callable[[Params | None], LM] | None = None,
    **settings: Any,
) -> Source:
    """Batches of fresh responses, shaped into advantages.

    Args:
      examples: only their prompts and columns are used; each epoch over them is shuffled.
      sampler: how responses are drawn and scored.
      policy: trained parameters -> the policy.
      score: `logprob.score` of host batches (see `parallel.scorer`).
      shaping: from `plugin.load('shaping', ...)`, in order.
      needs: of the loss; the columns of frozen LMs are filled once per rollout.
      behaviour: a frozen LM that is the behaviour policy, instead of the policy.
      baseline: () -> rewards of reference samples, where a shaping needs them; called
        once, by the first rollout.
      anchor: average of the parameters, or None -> an LM whose best of `anchor_samples`
        responses, by the same reward, is one more slot after the G, valid where one of
        these is. Its advantages are 0, its old_logps the anchor's; shapings do not
        read it.
      **settings: the fields of `rollout.Settings`, of which `batch_size`, `length` and
        `seed` have no default.

    Returns:
      A Source, whose `next` takes (params, step, average). Its report has 'metrics' of a
      rollout at the step that made it, which the log shows under 'train/': 'rollout/'
        reward: mean over valid responses; reward_std: within groups; reward_min,
          reward_max; reward/<label>: of each member of an ensemble.
        ties: share of groups without a difference.
        ended: share of responses that are not truncated; valid: of those that count;
          failed_rewards: of those whose reward failed.
        empty: 1 for a rollout without a valid response, whose steps learn nothing.
        tokens: per response, mean and quantiles (tokens_p10, _p50, _p90).
        total_tokens: of the responses that were kept, since the start of the run.
        entropy: of the sampling distribution, nats per token, estimated from the samples.
        kl: nats per response, where the reference is read.
        explained_variance: of the returns by the critic, where there is one.
        logp_gap, logp_gap_max: between sampler and kernel, nats per token, under the
          behaviour policy. Where the policy does not score its responses (see `prepare`)
          the step itself reports logp_gap, as a mean over prompts, and no maximum.
        SHAPING/NAME: what a shaping kept from the rollouts before (see shaping.RUNNING).
        anchor_reward: of the slot that `anchor` brings; anchor_logp_gap,
          anchor_logp_gap_max: as above.
        prompts, ties_dropped, surplus, unfilled: under dynamic sampling, how many were
          drawn; thrown away without and (drawn with the last ones needed) with a
          difference; and missing.
        sampling, judging (the reward), scoring (log-probabilities): seconds.
        updating: seconds from the rollout before until this one could begin: its steps,
          and the evaluations and checkpoints between them. Not in a run's first.

    Raises:
      ValueError: a setting out of its range; no prompts; a shaping whose baseline is
        not given, or is not of what it compares; hosts that do not divide B. Later,
        from `next`: as `rollout.roll`.
    """
    setup = prepare(
        examples, sampler, Settings(**settings), policy=policy, score=score,
        shaping=shaping, needs=needs, behaviour=behaviour, baseline=baseline,
        anchor=anchor,
    )  # fmt: skip
    own = identity(setup)
    now: dict[str, Any] = {
        "place": Place(), "ids": [], "metrics": {}, "samples": [], "warned": False,
    }  # fmt: skip

    def next_batch(params: Any = None, step: int = 0, average: Any = None) -> Batch:
        now["metrics"], now["samples"] = {}, []
        if spent(now["place"], setup.settings):  # an error in here changes nothing
            show = is_shown(step, setup.settings)
            now["place"], now["metrics"], now["samples"] = refill(
                now["place"], setup, params, average, show
            )
            now["warned"] = now["warned"] or warn_of_constant(now["metrics"])
        batch, now["ids"], metrics = step_batch(now["place"], setup.settings)
        now["metrics"] = {**now["metrics"], **metrics}
        now["place"] = now["place"]._replace(used=now["place"].used + 1)
        return batch

    def state() -> dict[str, Any]:
        return saved_place(now["place"], setup.settings, own)

    def restore(saved: dict[str, Any]) -> None:
        known = [identity(setup, age) for age in range(len(DIGESTS))]
        if saved.get("data") not in known:
            raise ValueError(
                "the saved rollout belongs to other prompts, another code of the reward or "
                f"other rollout settings: saved {saved.get('data')}, here {own}"
            )
        now["place"] = restored_place(now["place"], saved)

    def report() -> dict[str, Any]:
        return {
            "read": len(examples), "ids": now["ids"], "metrics": now["metrics"],
            "samples": now["samples"],
        }  # fmt: skip

    return Source(next_batch, state, restore, report)


def prepare(
    examples: Sequence[Example], sampler: Sampler, settings: Settings, *,
    policy: Callable[[Params], LM], score: Callable[..., Any],
    shaping: Sequence[Bound], needs: Sequence[str], behaviour: LM | None,
    baseline: Callable[[], Baseline] | None,
    anchor: Callable[[Params | None], LM] | None,
) -> Setup:  # fmt: skip
    """Checks the arguments of `rollout_source` and derives what rollouts are made with.

    The policy scores its own responses unless all of its responses are fresh and neither
    a shaping nor a critic reads the scores: one forward pass less.
    """
    temperature = scoring_temperature(
        sampler.temperature, needs, judged=sampler.reward is not None
    )
    if temperature != 1:
        score = functools.partial(score, temperature=temperature)
    if sampler.grammar is not None:
        score = functools.partial(score, grammar=sampler.grammar.flag)
    own = sampler.temperature == temperature and behaviour is None
    # Beside importance weights, old_logps are the policy's own, whoever sampled.
    on_policy = own and (sampler.recorded is None or "sampler_logps" in needs)
    check(
        sampler, settings, shaping, needs,
        on_policy=own and sampler.recorded is None,
        reference=baseline is not None, anchor=anchor is not None,
    )  # fmt: skip
    pick = order(len(examples), settings.batch_size, settings.seed)
    column_names(examples)
    shape_needs = {n for s in shaping for n in s.needs}
    # The columns of an LM that moves (an average of the policy) are filled in the step.
    columns = tuple(
        n
        for n in sorted({*needs, *shape_needs})
        if n.endswith("_logps") and n not in OF_BEHAVIOUR
        and (n in shape_needs or n.removesuffix("_logps") in sampler.lms)
    )  # fmt: skip
    critic = "old_values" in {*needs, *shape_needs}
    new = fresh(settings, on_policy=on_policy, anchor=anchor is not None)
    unread = new and not critic and "old_logps" not in shape_needs
    return Setup(
        settings, examples, pick, sampler, policy, score, temperature,
        compiled(shaping), columns, critic=critic, on_policy=on_policy, fresh=new,
        scored=critic or (behaviour is None and not unread),
        sampled=new or "sampler_logps" in needs, behaviour=behaviour, anchor=anchor,
        reference=None if baseline is None else _once(baseline),
    )  # fmt: skip


def spent(place: Place, settings: Settings) -> bool:
    """Whether the next batch needs another rollout."""
    return place.buffer is None or place.used == settings.steps


def is_shown(step: int, settings: Settings) -> bool:
    """Whether the rollout that is made before a step is shown as text."""
    if not settings.show:
        return False
    every = settings.show_every
    return step == 0 or step // every > (step - settings.steps) // every


def refill(
    place: Place, setup: Setup, params: Params, average: Params | None, show: bool
) -> tuple[Place, dict[str, float], list[dict[str, Any]]]:
    """The place at the start of the next rollout; metrics and samples of that rollout.

    Raises:
      ValueError: as `rollout.roll`; the EMPTY-th rollout in a row without a valid response.
    """
    made = roll(
        setup, params, average, number=place.number + 1, drawn=place.drawn,
        since=place.ready, show=show, running=place.running,
    )  # fmt: skip
    empty = place.empty + 1 if made.metrics.get("rollout/empty") else 0
    if empty == EMPTY:
        share = made.metrics["rollout/ended"]
        raise ValueError(
            f"{EMPTY} rollouts in a row have no valid response: {share:.0%} of the responses "
            "of the last one ended before rollout.max_new, and the rewards of "
            f"{made.metrics.get('rollout/failed_rewards', 0.0):.0%} failed "
            f"(rollout.truncated={setup.sampler.truncated!r}, rollout.invalid_rewards)"
            + NO_DIFFERENCE
            * setup.settings.dynamic_sampling
        )
    total = place.tokens + made.tokens
    metrics = {**made.metrics, "rollout/total_tokens": float(total)}
    fresh = Place(
        made.batch, made.ids, place.number + 1, 0, place.drawn + made.places,
        time.monotonic(), total, empty, made.running,
    )  # fmt: skip
    return fresh, metrics, made.samples


def warn_of_constant(metrics: dict[str, float]) -> bool:
    """Warns of a reward that is the same for all responses of a rollout."""
    low, high = metrics.get("rollout/reward_min"), metrics.get("rollout/reward_max")
    if low is None or low != high:
        return False
    log.warning(
        "THE REWARD IS THE SAME, %g, for all responses of a whole rollout, so that nothing "
        "is learned from it: does it read what the responses say? (samples.jsonl shows "
        "some with rollout.show > 0)", low,
    )  # fmt: skip
    return True


def step_batch(
    place: Place, settings: Settings
) -> tuple[Batch, list[str], dict[str, float]]:
    """Cuts the next batch out of the rollout in use.

    Returns:
      This host's rows, the ids of all hosts' prompts, and metrics.
    """
    epoch, part = divmod(place.used, settings.batches)
    rng = np.random.default_rng([ROWS, settings.seed, place.number, epoch])
    many, size = settings.prompts, settings.batch_size
    rows = rng.permutation(many) if settings.steps > 1 else np.arange(many)
    rows = rows[part * size : (part + 1) * size]
    assert place.ids is not None
    ids = [place.ids[i] for i in rows]
    index, count = settings.host
    if settings.grid is None:
        share = size // count
        return at(rows[index * share : (index + 1) * share], place.buffer), ids, {}
    shards, accumulate = settings.grid
    batch, useful = layout.lay(
        at(rows, place.buffer), shards=shards, accumulate=accumulate, host=settings.host
    )
    return batch, ids, {"useful_tokens": useful}


def saved_place(place: Place, settings: Settings, own: str) -> dict[str, Any]:
    """The place as a JSON-serialisable dict; a rollout that is used up is left out."""
    saved: dict[str, Any] = {
        "number": place.number, "used": place.used, "drawn": place.drawn, "data": own,
        "tokens": place.tokens, "empty": place.empty,
    }  # fmt: skip
    if place.running:
        saved["running"] = dict(place.running)
    if place.buffer is None or spent(place, settings):
        return saved
    return {**saved, "buffer": serialisation.dumps(place.buffer), "ids": place.ids}


def restored_place(place: Place, saved: dict[str, Any]) -> Place:
    """The place that `saved_place` wrote."""
    return place._replace(
        number=saved["number"],
        used=saved["used"],
        drawn=saved["drawn"],
        ids=saved.get("ids"),
        tokens=saved.get("tokens", 0),
        empty=saved.get("empty", 0),
        running=saved.get("running", {}),
        buffer=serialisation.loads(saved["buffer"]) if "buffer" in saved else None,
    )


def identity(setup: Setup, earlier: int = 0) -> str:
    """Digest of the prompts and of the settings that decide what a rollout is.

    Args:
      setup: of the run.
      earlier: of the reward, see `rewards.identity`.
    """
    s = setup.settings
    counts = sorted((name, getattr(s, name)) for name in COUNTS)
    settings = (
        s.batch_size, s.seed, s.length, s.keep, counts, s.dynamic_sampling,
        setup.anchor is not None,
        sorted(setup.sampler.identity(earlier).items()),
    )  # fmt: skip
    reward = setup.sampler.reward
    read = [] if reward is None else rewards.check(reward, setup.examples)
    data = hashlib.sha256(contents(setup.examples, read).encode())
    data.update(repr(settings).encode())
    return data.hexdigest()[:16]


def contents(examples: Sequence[Example], read: Sequence[str] = ()) -> str:
    """The prompts and columns that rollouts depend on, as text for digests.

    Args:
      examples: of the run.
      read: further columns that the reward reads.
    """
    carried = getattr(examples, "carried", None)
    out: list[tuple] = []
    for i in range(len(examples)):
        e = examples[i]
        known = carried_columns(e, carried)
        asked = sorted({*read} & {*e.columns} - {*known})
        columns = [(k, e.columns[k]) for k in (*known, *asked)]
        own = (dict(e.template),) if e.template else ()
        out.append((e.id, e.prompt, columns, *own))
    return repr(out)


def check(
    sampler: Sampler, settings: Settings, shaping: Sequence[Bound], needs: Sequence[str],
    *, on_policy: bool, reference: bool, anchor: bool,
) -> None:  # fmt: skip
    """Raises ValueError for settings out of their range or against each other.

    Args:
      sampler: how responses are drawn.
      settings: of the rollouts.
      shaping: in order.
      needs: what the loss declares.
      on_policy: whether the policy is sampled, and scored at the same temperature.
      reference: whether rewards of reference samples are given.
      anchor: whether there is one.
    """
    sampler.check()
    if sampler.recorded is not None and (reference or anchor):
        raise ValueError(
            "rollout.source is a file of responses: neither rollout.anchor nor a shaping that "
            "samples the reference"
        )
    _check_numbers(sampler, settings)
    _check_shaping(settings, shaping, reference)
    shape_needs = {n for s in shaping for n in s.needs}
    of_samples = "ref_logps" in shape_needs or {"ref_logps", "old_logps"} <= {*needs}
    if of_samples and not on_policy:
        raise ValueError(
            "a KL to the reference is estimated from samples of the policy itself: no "
            "rollout.policy, and no file as rollout.source"
        )
    if anchor and (settings.keep != "all" or "old_values" in {*needs, *shape_needs}):
        raise ValueError(
            "rollout.anchor is a slot beside a whole group, without a critic: "
            "rollout.keep='all', and neither a loss nor a shaping with a critic"
        )


def _check_numbers(sampler: Sampler, settings: Settings) -> None:
    if settings.keep not in KEEP:
        raise ValueError(f"rollout.keep is {settings.keep!r}, expected one of {KEEP}")
    for name in COUNTS:
        value = getattr(settings, name)
        if value < 1:
            raise ValueError(f"rollout.{name} is {value}, expected at least 1")
    if settings.batch_size % settings.host[1]:
        raise ValueError(
            f"batch_size {settings.batch_size} does not divide over "
            f"{settings.host[1]} hosts"
        )
    if settings.length - sampler.max_new < 1:
        raise ValueError(
            f"length {settings.length} leaves no room before {sampler.max_new} new"
        )


def _check_shaping(
    settings: Settings, shaping: Sequence[Bound], reference: bool
) -> None:
    if settings.group < 2:
        comparing = [s.name for s in shaping if s.baseline == "group"]
        comparing += ["rollout.keep='best_worst'"] * (settings.keep == "best_worst")
        comparing += ["rollout.dynamic_sampling"] * settings.dynamic_sampling
        if comparing:
            raise ValueError(
                f"{comparing[0]} compares the responses of a group: rollout.group >= 2"
            )
    for s in shaping:
        if s.name.rpartition(".")[2] == "pass_at_k" and s.hyper["k"] > settings.group:
            raise ValueError(
                f"shaping.pass_at_k: the best of k={s.hyper['k']} cannot be taken of "
                f"rollout.group={settings.group} responses"
            )
        if s.baseline in OF_REFERENCE and not reference:
            raise ValueError(f"{s.name} needs rewards of reference samples")
        earlier = [other.name for other in shaping if other.stage == "reward"]
        if s.baseline == "greedy" and earlier:
            raise ValueError(
                f"{s.name} compares with the raw reward of the greedy response, but "
                f"{earlier[0]} transforms the rewards of all others; take another baseline, "
                "as shaping.rloo"
            )


def _once(
    baseline: Callable[[], Baseline],
) -> Callable[[], tuple[Baseline, np.ndarray]]:
    """Rewards of reference samples by prompt, and all of them sorted, computed once."""

    @functools.cache
    def reference() -> tuple[Baseline, np.ndarray]:
        rewards = baseline()
        return rewards, np.sort(np.concatenate([*rewards.values()]))[None]

    return reference
