"""Responses drawn and scored by the reward, a batch of prompts at a time, on the host.

  prompts -> generate(lm) -> rewards/* -> feedback, less the penalty of overlong responses

The same for the policy, for the reference that it is compared with, and for the anchor.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from alignax import rewards
from alignax.batch import LM, Batch, Example
from alignax.inputs.detokenize import texts
from alignax.inputs.prompts import PromptBatch, prompt_batches
from alignax.plugin import Bound
from alignax.rollouts import recorded as recorded_responses
from alignax.rollouts import turns
from alignax.rollouts.recorded import Recorded
from alignax.sampling import automaton
from alignax.sampling.automaton import Automaton
from alignax.text.tokenizer import Tokenizer

TRUNCATED = ("keep", "drop", "punish")
STREAM = 2**30  # of random keys: evaluations use numbers from 0 on under the same seed
Baseline = dict[str, np.ndarray]  # an example's id -> rewards of other responses to it


class Drawn(NamedTuple):
    """Responses to a batch of prompts, with their rewards."""

    batch: Batch  # with feedback; old_logps is of the sampling distribution
    raw_logps: Float[
        np.ndarray, "B G T"
    ]  # nats, the sampler's, under the unmodified LM
    truncated: Bool[np.ndarray, "B G"]  # True where max_new cut a response off
    differs: Bool[np.ndarray, " B"]  # two valid responses have different rewards
    failed: Bool[np.ndarray, "B G"]  # their reward failed, so that they are not valid
    members: dict[str, Float[np.ndarray, "B G"]]  # rewards that a reward combines


class Sampler(NamedTuple):
    """How responses are drawn and scored: the same for the policy and the reference.

    Attributes:
      generate: decode.generate with the end-of-sequence ids bound; host arrays come back.
      reward: from `rewards.load`; None gives every response a feedback of 0.
      lms: frozen LMs that a reward may read.
      tokenizer: of prompts and responses.
      max_new: most tokens of a response.
      temperature: of the sampling distribution; advantages are for that distribution.
      truncated: what is done with a response that max_new cut off. 'keep': nothing;
        'drop': it is not valid; 'punish': its feedback is `punishment`.
      punishment: see `truncated`.
      overlong_buffer: the last tokens before max_new, over which feedback falls
        linearly by `overlong_penalty` (Yu et al. 2025); 0 for no such penalty.
      overlong_penalty: subtracted from the feedback of a response of max_new tokens.
      score: `logprob.score` of host batches, for rewards that read an LM.
      rules: what else decides which responses there are (stops, a grammar, replies, a
        file of responses), in words; part of the identity.
      recorded: responses of another sampler, which are taken instead of drawn ones.
      conversation: who replies to the policy, for responses of several turns.
      reward_seconds: that one call of a reward that reads no LM may take; 0 for any time.
      invalid_rewards: share of the responses of a draw whose reward may fail: it raises,
        takes too long, or gives no finite number. They are then not valid.
      grammar: what `generate` samples under, where responses are to be scored under it
        too: a batch then has extra['grammar_states'] (see `logprob.score`).
    """

    generate: Callable[..., Any]
    reward: Bound | None
    lms: Mapping[str, LM]
    tokenizer: Tokenizer
    max_new: int
    temperature: float = 1.0
    truncated: str = "keep"
    punishment: float = 0.0
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    score: Callable[..., Any] | None = None
    rules: str = ""
    recorded: Recorded | None = None
    conversation: turns.Conversation | None = None
    reward_seconds: float = 0.0
    invalid_rewards: float = 0.0
    grammar: Automaton | None = None

    def check(self) -> None:
        """Raises ValueError for a setting out of its range."""
        if self.truncated not in TRUNCATED:
            raise ValueError(
                f"rollout.truncated is {self.truncated!r}, expected one of {TRUNCATED}"
            )
        if not 0 <= self.overlong_buffer <= self.max_new:
            raise ValueError(
                f"rollout.overlong_buffer is {self.overlong_buffer}, expected 0 to "
                f"rollout.max_new={self.max_new}"
            )
        if not 0 <= self.invalid_rewards < 1:
            raise ValueError(
                f"rollout.invalid_rewards is {self.invalid_rewards}, expected a share from "
                "0 to less than 1"
            )
        if self.reward_seconds < 0:
            raise ValueError(
                f"rollout.reward_seconds is {self.reward_seconds}, expected at least 0"
            )
        if self.overlong_penalty < 0:
            raise ValueError(
                f"rollout.overlong_penalty is {self.overlong_penalty}, expected at least 0"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"rollout.temperature is {self.temperature}: a greedy response has "
                "no alternatives to compare it with"
            )

    def draw(
        self, lm: LM, prompts: PromptBatch, key, group: int, *, greedy: bool = False,
        clock: dict[str, float] | None = None, seeds: Int[np.ndarray, " B"] | None = None,
    ) -> Drawn:  # fmt: skip
        """Draws and scores a group of responses to every prompt.

        Args:
          lm: that is sampled.
          prompts: responses to a prompt that is not valid are not valid.
          key: of this batch alone.
          group: G.
          greedy: takes the most likely token, instead of a sample at the temperature.
          clock: its 'sampling' and 'judging', in seconds, are added to.
          seeds: a response to prompt b is drawn by (key, seeds[b]), whatever batch it is in.

        Raises:
          ValueError: as `rewards.attempt`.
        """
        start = time.monotonic()
        out = self.respond(lm, prompts, key, group, greedy=greedy, seeds=seeds)
        middle = time.monotonic()
        valid = out.batch.valid & prompts.valid[:, None]
        if self.truncated == "drop":
            valid = valid & ~out.truncated
        batch = out.batch._replace(valid=valid, extra=prompts.extra)
        judged = self.judge(batch, prompts)
        earned, valid = judged.values, valid & ~judged.failed
        extra: dict[str, Any] = dict(prompts.columns or {})
        if self.grammar is not None:
            extra["grammar_states"] = automaton.states(
                self.grammar, np.asarray(batch.tokens), np.asarray(batch.mask)
            )
        batch = batch._replace(valid=valid, extra=extra or None)
        punished = valid & out.truncated & (self.truncated == "punish")
        earned = np.where(punished, np.float32(self.punishment), earned)
        lost = np.float32(self.overlong_penalty) * self.late(batch)
        feedback = np.where(valid & ~punished, earned - lost, earned)
        if clock is not None:
            clock["sampling"] += middle - start
            clock["judging"] += time.monotonic() - middle
        batch = batch._replace(feedback=feedback)
        # the length penalty is no difference between rewards
        return Drawn(
            batch, out.raw_logps, out.truncated, differs(earned, valid), judged.failed,
            judged.members,
        )  # fmt: skip

    def respond(
        self, lm: LM, prompts: PromptBatch, key: Any, group: int, *, greedy: bool,
        seeds: Int[np.ndarray, " B"] | None = None,
    ) -> Any:  # fmt: skip
        """Generated on the host: G responses to every prompt; arguments as for `draw`."""
        if self.recorded is not None and not greedy:
            return recorded_responses.generated(
                self.recorded, prompts, key, group=group, max_new=self.max_new
            )
        temperature = 0.0 if greedy else self.temperature

        def say(
            turn: int, tokens: Any, lengths: Any, group: int, limits: Any = None
        ) -> Any:
            more = {"limits": limits, "seeds": seeds}
            more = {k: v for k, v in more.items() if v is not None}
            own = jax.random.fold_in(key, turn) if turn else key
            out = self.generate(
                lm, tokens, lengths, own, max_new=self.max_new, group=group,
                temperature=temperature, **more,
            )  # fmt: skip
            return jax.device_get(out)

        if self.conversation is not None:
            return turns.converse(
                say, self.conversation, prompts, self.tokenizer, group=group,
                max_new=self.max_new,
            )  # fmt: skip
        return say(0, prompts.tokens, prompts.lengths, group)

    def judge(self, batch: Batch, prompts: PromptBatch) -> rewards.Judged:
        """Rewards of responses; without a reward all are 0, and none failed."""
        if self.reward is None:
            none = np.zeros(np.shape(batch.valid), np.float32)
            return rewards.Judged(none, none > 0, {})
        return rewards.attempt(
            self.reward, batch, texts(batch, self.tokenizer), self.lms,
            tokenizer=self.tokenizer, score=self.score, examples=prompts.examples,
            seconds=self.reward_seconds, tolerated=self.invalid_rewards,
        )  # fmt: skip

    def late(self, batch: Batch) -> Float[np.ndarray, "B G"]:
        """The share of the overlong buffer that a response uses, from 0 to 1."""
        left = self.max_new - np.asarray(batch.mask).sum(-1)  # tokens
        used = (self.overlong_buffer - left) / max(self.overlong_buffer, 1)
        return np.clip(used, 0, 1).astype(np.float32)

    def identity(self, earlier: int = 0) -> dict[str, Any]:
        """What the rewards of responses depend on, part by part.

        Args:
          earlier: of the reward, see `rewards.identity`.
        """
        reward = self.reward
        return {
            "reward": "" if reward is None else rewards.identity(reward, earlier),
            "tokenizer": self.tokenizer.fingerprint,
            "max_new": self.max_new, "temperature": self.temperature,
            "truncated": f"{self.truncated} {self.punishment}",
            "overlong": f"{self.overlong_buffer} {self.overlong_penalty}",
            **({"rules": self.rules} if self.rules else {}),
        }  # fmt: skip


def differs(
    feedback: Float[np.ndarray, "B G"], valid: Bool[np.ndarray, "B G"]
) -> Bool[np.ndarray, " B"]:
    """Whether two valid responses of a group have different rewards."""
    top = np.where(valid, feedback, -np.inf).max(1)
    return top > np.where(valid, feedback, np.inf).min(1)


def reference_rewards(
    examples: Sequence[Example], sampler: Sampler, ref: LM, *, samples: int, rows: int,
    length: int, seed: int, seeds: Sequence[int] | None = None,
) -> Baseline:  # fmt: skip
    """Rewards of K samples of the reference for every prompt.

    Args:
      examples: their prompts; ids are distinct.
      sampler: how responses are drawn and scored.
      ref: the frozen reference.
      samples: K.
      rows: responses to draw at once.
      length: most tokens per row.
      seed: of the samples; their random stream is not that of rollouts.
      seeds: of each example, in [0, 2^31): its samples are drawn by it, whatever other
        examples there are. None draws by the batch.

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
    seed_of = dict(zip((e.id for e in examples), seeds or (), strict=False))
    found: Baseline = {}
    prompts = prompt_batches(
        examples, sampler.tokenizer, batch_size=min(max(1, rows // samples), len(examples)),
        length=length - sampler.max_new,
    )  # fmt: skip
    for i, p in enumerate(prompts):
        own = None
        if seeds is not None:
            own = np.zeros(len(p.tokens), np.int32)
            own[: len(p.ids)] = [seed_of[name] for name in p.ids]
        one = key if seeds is not None else jax.random.fold_in(key, i)
        drawn = sampler.draw(ref, p, one, samples, seeds=own)
        batch = drawn.batch
        for name, feedback, valid, failed in zip(
            p.ids, batch.feedback, batch.valid, drawn.failed, strict=False
        ):
            if failed.any():
                raise ValueError(
                    f"{int(failed.sum())} of {samples} reference responses to {name} have no "
                    "reward, because it failed: that leaves no quantiles"
                )
            if not valid.all():
                raise ValueError(
                    f"{int((~valid).sum())} of {samples} reference responses to {name} "
                    "are truncated: rollout.truncated='drop' leaves no quantiles; take "
                    "'keep' or 'punish'"
                )
            found[name] = np.array(feedback, np.float32)
    return found


def table(baseline: Baseline, contents: Mapping[str, str]) -> dict[bytes, np.ndarray]:
    """Rewards by a digest of a prompt's content, as `reference_cache` keeps them."""
    return {_digest(contents[name]): values for name, values in baseline.items()}


def untable(rows: Mapping[bytes, np.ndarray], contents: Mapping[str, str]) -> Baseline:
    """The rewards of those prompts that a table has.

    Args:
      rows: from `table`; earlier versions wrote digests of ids, beside one of all prompts.
      contents: {id: content} of the prompts, from `source.contents`.
    """
    found: Baseline = {}
    for name, content in contents.items():
        for digest in (_digest(content), _digest(name)):
            if digest in rows:
                found[name] = rows[digest]
    return found


def seeds(contents: Iterable[str]) -> list[int]:
    """A seed for each prompt, from its content."""
    return [int.from_bytes(_digest(text)[:4], "big") >> 1 for text in contents]


def _digest(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()
