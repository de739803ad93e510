"""Where responses come from: prefill, then the whole decode in one jitted while-loop."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignax import logprob
from alignax.batch import LM, Batch
from alignax.models import transformer


class Generated(NamedTuple):
    """What a sampler made: a Batch of prompts and responses, and how likely they were."""

    batch: Batch  # [B, G, P + max_new]; old_logps is under the law really sampled
    raw_logps: Float[Array, "B G T"]  # nats, under the unmodified policy
    truncated: Bool[Array, "B G"]  # True where max_new ended a response, not EOS
    stats: dict[str, Any]  # 'steps' taken, 'ended': share of responses that end in EOS


def generate(
    lm: LM,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    key: Array,
    *,
    max_new: int,
    group: int = 1,
    temperature: float = 1.0,
    eos_ids: Sequence[int] = (),
) -> Generated:
    """Samples `group` responses to every prompt; they share one prefill.

    A second call with the same shapes compiles nothing. A row's randomness comes from
    (key, row index) alone, so a response does not depend on its neighbours.

    Args:
      lm: the model.
      prompts: ids, right-padded.
      lengths: real tokens of each prompt, at least 1.
      key: `jax.random.key`.
      max_new: most tokens of a response, EOS included.
      group: G.
      temperature: of the sampled law, softmax(logits / temperature); 0 is greedy.
      eos_ids: any of them ends a response; it is part of the response and scored.

    Returns:
      Generated, with T = P + max_new. Under greedy decoding old_logps is 0 (the law is
      certain) and raw_logps is the policy's.

    Raises:
      ValueError: a negative temperature, or max_new or group below 1.
    """
    if temperature < 0 or max_new < 1 or group < 1:
        raise ValueError(
            f"temperature={temperature}, max_new={max_new}, group={group}; expected "
            "temperature >= 0, max_new >= 1, group >= 1"
        )
    eos = jnp.asarray(sorted(eos_ids), jnp.int32)
    return _generate(
        lm, jnp.asarray(prompts), jnp.asarray(lengths), key,
        jnp.float32(temperature or 1.0), eos,
        max_new=max_new, group=group, greedy=temperature == 0,
    )  # fmt: skip


class _State(NamedTuple):
    step: Array
    tokens: Array  # [N, T]
    ends: Array  # [N] where the next token goes
    done: Array  # [N]
    h: Array  # [N, 1, D] after the last token
    cache: transformer.Cache
    raw: Array  # [N, T]
    law: Array  # [N, T]


@functools.partial(jax.jit, static_argnames=("max_new", "group", "greedy"))
def _generate(lm, prompts, lengths, key, temperature, eos, *, max_new, group, greedy):
    b, p = prompts.shape
    n, t = b * group, p + max_new
    lm = transformer.unstack(lm)
    cache = transformer.init_cache(lm.config, b, t)
    h, filled = transformer.hidden(lm, prompts, cache=cache)
    h = jnp.take_along_axis(h, (lengths - 1)[:, None, None], 1)

    def fan_out(x):
        return jnp.repeat(x, group, axis=0)

    prompts, lengths = fan_out(prompts), fan_out(lengths)
    row = jnp.arange(n)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(row)
    real = jnp.arange(p) < lengths[:, None]
    tokens = jnp.zeros((n, t), prompts.dtype).at[:, :p].set(jnp.where(real, prompts, 0))
    zeros = jnp.zeros((n, t), jnp.float32)

    def draw(s):
        logps = logprob.rows(lm, s.h)[:, 0]
        if greedy:
            token = jnp.argmax(logps, -1)
            law = jnp.zeros_like(logps)
        else:
            law = jax.nn.log_softmax(logps / temperature)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, s.step)
            token = jax.vmap(jax.random.categorical)(step_keys, law)
        return token.astype(prompts.dtype), logps[row, token], law[row, token]

    def body(s):
        token, raw, law = draw(s)
        # A finished row writes nowhere: index T is out of bounds and dropped.
        at = jnp.where(s.done, t, s.ends)
        tokens = s.tokens.at[row, at].set(token, mode="drop")
        raws = s.raw.at[row, at].set(raw, mode="drop")
        laws = s.law.at[row, at].set(law, mode="drop")
        position = jnp.minimum(s.ends, t - 1)[:, None]
        h, cache = transformer.hidden(lm, token[:, None], position, cache=s.cache)
        assert cache is not None
        ends = s.ends + ~s.done
        done = s.done | (token[:, None] == eos[None]).any(-1)
        return _State(s.step + 1, tokens, ends, done, h, cache, raws, laws)

    done = jnp.zeros(n, bool)
    start = _State(
        jnp.int32(0), tokens, lengths, done, fan_out(h),
        jax.tree.map(fan_out, filled), zeros, zeros,
    )  # fmt: skip
    s = jax.lax.while_loop(lambda s: (s.step < max_new) & ~s.done.all(), body, start)
    at = jnp.arange(t)
    mask = (at >= lengths[:, None]) & (at < s.ends[:, None])

    def split(x):
        return x.reshape(b, group, *x.shape[1:])

    batch = Batch(
        split(s.tokens), split(mask), split(s.ends), jnp.zeros((b, group)),
        jnp.ones((b, group), bool), old_logps=split(s.law),
    )  # fmt: skip
    stats = {"steps": s.step, "ended": s.done.mean()}
    return Generated(batch, split(s.raw), split(~s.done), stats)
