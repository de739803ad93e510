"""From a config to batches of the policy's own responses.

The sections `rollout` and `shaping` become the arguments of
`rollouts.source.rollout_source`.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from alignax import plugin, rewards, shaping
from alignax.batch import LM, Params
from alignax.inputs import reference_cache, source
from alignax.inputs.prompts import subset
from alignax.models import sharding
from alignax.reward_functions.digest import DIGESTS
from alignax.rollouts import recorded, rollout, sampler, selection, turns
from alignax.rollouts import source as rollouts_source
from alignax.runs import checkpoint, workdirs
from alignax.sampling import grammars, stops
from alignax.sampling.automaton import Automaton
from alignax.text.tokenizer import Tokenizer
from alignax.training import parallel
from alignax.training.plugins import Plugins, has_rollouts

log = logging.getLogger(__name__)

# What a file of reference rewards holds, and whose folder it is in: for messages.
REWARDS: Any = {"what": "rewards", "setting": "config.rollout.cache"}


def rollouts(
    config, examples, text, plugins: Plugins, lms: dict[str, LM], assemble: Callable,
    mesh: Mesh, workdir: str,
) -> source.Source:  # fmt: skip
    """The source of a run that learns from the policy's own responses.

    Args:
      config: checked by `checks.check`.
      examples: whose prompts are answered.
      text: the tokenizer.
      plugins: of the config.
      lms: frozen LMs by name.
      assemble: (trained parameters, frozen LMs) -> the policy.
      mesh: devices.
      workdir: of the run; rewards of the reference are kept there.
    """
    loss, steps = plugins.loss, plugins.shaping
    behaviour, shown = config.rollout.policy, config.rollout.anchor  # names

    def anchor(average: Params | None) -> LM:
        return lms[shown] if shown in lms else assemble(average, lms)

    grid = sharding.grid(config.layout, config.accumulate, mesh)
    score = parallel.scorer(mesh, packed=grid is not None)
    judged = sampler.Sampler(
        parallel.generator(text, mesh, tables(config, text)), plugins.reward, lms, text,
        score=score, grammar=grammar(config, loss.needs, text), **sampling(config),
    )  # fmt: skip
    if config.rollout.reply:
        reply = plugin.function(config.rollout.reply, "rollout.reply")
        asked = turns.Conversation(reply, config.rollout.turns)
        judged = judged._replace(conversation=asked)
    if from_file(config):
        found = recorded.read(
            config.rollout.source, eos_ids=text.eos_ids, vocab_size=text.vocab_size
        )
        recorded.check(found, [examples[i].id for i in range(len(examples))])
        words = f"{judged.rules} responses={found.digest}".strip()
        judged = judged._replace(recorded=found, rules=words)
    baseline = None
    if any(s.baseline in shaping.OF_REFERENCE for s in steps):
        baseline = reference_rewards(config, examples, judged, workdir)
    return rollouts_source.rollout_source(
        examples, judged, policy=lambda params: assemble(params, lms), score=score,
        shaping=steps, needs=loss.needs, baseline=baseline,
        behaviour=lms[behaviour] if behaviour else None,
        anchor=anchor if shown else None, grid=grid,
        host=(jax.process_index(), jax.process_count()), **settings(config),
    )  # fmt: skip


def temperature(config, needs: Sequence[str]) -> float:
    """The temperature at which the step of a loss with these needs scores.

    See `rollout.scoring_temperature`.
    """
    if not has_rollouts(config):
        return 1.0
    return rollout.scoring_temperature(
        config.rollout.temperature, needs, judged=bool(config.rollout.reward)
    )


def grammar(config, needs: Sequence[str], text: Tokenizer) -> Automaton | None:
    """The grammar under which the step of a loss with these needs scores; None without.

    As the temperature, it is a part of the distribution that was sampled.
    """
    asked = has_rollouts(config) and config.rollout.grammar
    found = tables(config, text) if asked and of_samples(config, needs) else None
    return None if found is None else found(text.vocab_size)["grammar"]


def of_samples(config, needs: Sequence[str]) -> bool:
    """Whether a loss with these needs estimates something of what was sampled."""
    return rollout.of_samples(needs, judged=bool(config.rollout.reward))


def own_samples(config, needs: Sequence[str]) -> bool:
    """Whether the policy is sampled, and scored at the temperature of the samples."""
    same = config.rollout.temperature == temperature(config, needs)
    return same and not config.rollout.policy and not from_file(config)


def from_file(config) -> bool:
    """Whether the responses of a config are another sampler's, in a file."""
    return config.rollout.source not in ("", "policy")


def sampling(config) -> dict[str, Any]:
    """The keywords of `Sampler` that a config decides."""
    return dict(
        max_new=config.rollout.max_new, temperature=config.rollout.temperature,
        truncated=config.rollout.truncated, punishment=config.rollout.punishment,
        overlong_buffer=config.rollout.overlong_buffer,
        overlong_penalty=config.rollout.overlong_penalty,
        reward_seconds=config.rollout.reward_seconds,
        invalid_rewards=config.rollout.invalid_rewards, rules=rules(config),
    )  # fmt: skip


def rules(config) -> str:
    """Stops, grammar and replies of a config in words; '' without any."""
    asked = {
        "stops": tuple(config.rollout.stops),
        "grammar": config.rollout.grammar
        and grammars.load(config.rollout.grammar, "rollout.grammar").identity,
        "reply": config.rollout.reply,
        "turns": config.rollout.turns * bool(config.rollout.reply),
    }  # fmt: skip
    return " ".join(f"{k}={v!r}" for k, v in asked.items() if v)


def tables(config, text: Tokenizer) -> Callable[[int], dict[str, Automaton]] | None:
    """V -> the stops and the grammar of a config's rollouts over V tokens; None without.

    Raises:
      ValueError: a stop that is none; a grammar that is none, see `grammars.load`.
    """
    if not (config.rollout.stops or config.rollout.grammar):
        return None
    groups = stops.parse(tuple(config.rollout.stops), text, name="rollout.stops")
    grammar = None
    if config.rollout.grammar:
        grammar = grammars.load(config.rollout.grammar, "rollout.grammar")

    @functools.cache
    def of(size: int) -> dict[str, Automaton]:
        pieces, found = stops.pieces(text, size), {}
        if groups:
            found["stops"] = stops.table(groups, pieces)
        if grammar is not None:
            ends = [i for i in text.eos_ids if i < size]
            found["grammar"] = grammar.build(pieces, sorted(ends))
        return found

    return of


def settings(config) -> dict[str, Any]:
    """The fields of `rollout.Settings` that a config decides."""
    return dict(
        batch_size=config.batch_size, length=config.length, seed=config.seed,
        group=config.rollout.group, batches=config.rollout.batches,
        epochs=config.rollout.epochs, keep=config.rollout.keep,
        dynamic_sampling=config.rollout.dynamic_sampling,
        max_draws=config.rollout.max_draws,
        anchor_samples=config.rollout.anchor_samples,
        show=config.rollout.show, show_every=config.rollout.show_every,
    )  # fmt: skip


def weighted(config, needs: Sequence[str]) -> bool:
    """Whether importance weights stand between a file's sampler and the policy."""
    return from_file(config) and "sampler_logps" in needs


def fresh(config, needs: Sequence[str]) -> bool:
    """Whether importance ratios are 1 by construction: see `rollout.fresh`."""
    return rollout.fresh(
        rollout.Settings(**settings(config)),
        on_policy=own_samples(config, needs) or weighted(config, needs),
        anchor=bool(config.rollout.anchor),
    )  # fmt: skip


def reference_rewards(
    config, examples, judged: sampler.Sampler, workdir: str
) -> Callable[[], sampler.Baseline]:
    """What gives rewards of reference samples of every prompt the run may meet.

    They are sampled when they are first needed, and saved: another run with the same
    folder, or this one when it resumes, reads them. Where that met other prompts, as with
    more steps, rewards of those that it did not meet are added.

    Raises:
      ValueError: what is kept there is of something else.
    """
    batches = config.rollout.batches
    places = -(-config.num_steps // (batches * config.rollout.epochs)) * batches
    places *= config.rollout.max_draws if config.rollout.dynamic_sampling else 1
    some = selection.visited(examples, config.batch_size, config.seed, places)
    sizes = {
        "samples": config.rollout.reference_samples, "length": config.length,
        "rows": config.batch_size * config.rollout.group, "seed": config.seed,
    }  # fmt: skip
    ref = judged.lms["ref"]
    assert judged.reward is not None
    read = rewards.check(judged.reward, examples)
    contents = rollouts_source.contents
    prompts = {e.id: contents(subset(some, [i]), read) for i, e in enumerate(some)}
    others = {  # a reward may be one of them
        f"lms.{name}": checkpoint.fingerprint(lm.params)
        for name, lm in judged.lms.items()
        if name not in ("ref", "base")
    }
    key = reference_cache.describe_lm(ref, **sizes, **judged.identity(), **others)
    folder = checkpoint.absolute(config.rollout.cache or workdir)
    path = folder / "reference_rewards.npz"
    table: reference_cache.Table = {}
    if workdirs.everywhere(path.exists(), f"{path} is there"):
        before = [judged.identity(age) for age in range(1, len(DIGESTS))]
        also = {k: {str(b[k]) for b in before} for k in before[0]}
        # earlier versions kept what all prompts of a run are as a part of the key
        of_all = hashlib.sha256(contents(some, read).encode()).hexdigest()[:16]
        also["data"] = {of_all}
        table = reference_cache.load(path, key, **REWARDS, also=also)
    kept = sampler.untable(table, prompts)

    def baseline() -> sampler.Baseline:
        missing = [i for i, e in enumerate(some) if e.id not in kept]
        if not missing:
            return kept
        if kept and config.shaping.get("ctrl", {}).get("calibration") == "global":
            log.warning(
                "shaping.ctrl ranks rewards among those of all prompts of the run, of which "
                "there are %d more now: the steps that follow are not those of a run that "
                "had as many from the start", len(missing),
            )  # fmt: skip
        new = subset(some, missing)
        own = sampler.seeds(prompts[e.id] for e in new)
        drawn = sampler.reference_rewards(new, judged, ref, **sizes, seeds=own)
        if jax.process_index() == 0:
            rows = {**table, **sampler.table(drawn, prompts)}
            reference_cache.save(path, rows, key)
        return {e.id: {**kept, **drawn}[e.id] for e in some}

    return baseline
