"""KL between two models by position in the response, and tokens that changed rank.

  D_k = mean over responses of KL(π(·|x, y_<k) ‖ π_ref(·|x, y_<k)),   k = 1, 2, ...
  early = Σ_{k ≤ 5} D_k / Σ_k D_k
  token y_k is unshifted at rank 1 under π_ref, marginal at 2 or 3, shifted beyond

Shallow alignment has almost all of its KL in the first few tokens, and most tokens of an
aligned answer are those that the base model would have generated.

Source: Qi et al. 2024, https://arxiv.org/abs/2406.05946, section 2 (KL); Lin et al. 2023,
https://arxiv.org/abs/2312.01552, section 2 (ranks)
Differs from the papers: the responses are those of the data set unless `max_new` is given;
the first paper takes harmful answers, the second the aligned model's greedy ones. Of tokens
with equal probability under the base the lower id ranks first.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignax import logprob
from alignax.batch import LM, Batch, Metrics
from alignax.inputs.prompts import prompt_batches
from alignax.inputs.source import eval_batches
from alignax.models import transformer
from alignax.sampling import generation_settings

TILE = 16  # positions whose rows of logits exist at once
RANGES = {"positions": "[1, inf)", "early": "[1, inf)", "max_new": "[0, inf)"}


class _Shift(NamedTuple):
    """How the baseline rates each token of a response."""

    kl: Float[Array, "N R"]  # nats
    rank: Int[Array, "N R"]  # from 1, under the baseline
    logp: Float[Array, "N R"]  # nats, under the baseline


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, baseline: str = "ref", positions: int = 20,
    early: int = 5, ranks: bool = False, max_new: int = 0, plain: bool = False,
) -> Metrics:  # fmt: skip
    """Exact KL from a baseline at each position of responses, and their tokens' ranks.

    Args:
      baseline: name in `lms` of the model to compare with.
      positions: how many positions are reported one by one.
      early: positions that count as early.
      ranks: also report the ranks of tokens under the baseline.
      max_new: tokens of a greedy response of the model to each prompt, which are scored
        instead of the data's; 0 scores the data's.
      plain: the baseline reads the prompt without the chat template, as a base model
        would; each response is one turn.

    Returns:
      'kl' (mean nats per token), 'early' (share of the sum of D_k over all positions) and
      'position/01' ... : D_k where a response is that long. With `ranks` 'unshifted',
      'marginal' and 'shifted' (shares of all tokens), 'rank' (their mean), 'base_prob'
      (mean probability under the baseline) and each of them by position too, as
      'shifted/01'.

    Raises:
      ValueError: no LM of that name, one that lacks an id, or `positions` < 1.
    """
    if baseline not in lms:
        raise ValueError(
            f"token_shift needs an LM {baseline!r} to compare with; there are {sorted(lms)}"
        )
    if positions < 1:
        raise ValueError(f"positions is {positions}, expected at least 1")
    base, bare = lms[baseline], tokenizer.without_template()
    prompts = {e.id: e.prompt for e in data} if plain else {}
    found: dict[str, list[np.ndarray]] = {}  # of each response one row of numbers
    for batch, ids in _responses(
        lm, data, tokenizer, generate, key, batch_size, length, max_new
    ):
        if not (ranks or plain):
            kl = np.asarray(score(lm, batch, ("kl",), kl_to=base).kl, np.float64)
            scored = np.asarray(batch.mask & batch.valid[..., None])
            rows = [k[s] for k, s in zip(_flat(kl), _flat(scored), strict=True)]
            found.setdefault("kl", []).extend(r for r in rows if len(r))
            continue
        others = [bare.prompt(prompts[i]) for i in ids] if plain else None
        for name, values in _compare(lm, base, batch, others).items():
            found.setdefault(name, []).extend(values)
    out = _by_position("kl", found["kl"], positions)
    curve = _curve(found["kl"], len)
    out["early"] = float(curve[:early].sum() / max(curve.sum(), 1e-30))
    out = {k.replace("kl/", "position/"): v for k, v in out.items()}
    if not ranks:
        return out
    rank = found["rank"]
    named = {
        "unshifted": [r == 1 for r in rank],
        "marginal": [(r > 1) & (r <= 3) for r in rank],
        "shifted": [r > 3 for r in rank],
        "rank": rank,
        "base_prob": [np.exp(x) for x in found["logp"]],
    }
    for name, rows in named.items():
        out |= _by_position(name, rows, positions)
    return out


def _responses(
    lm, data, tokenizer, generate, key, batch_size, length, max_new
) -> Iterator[tuple[Batch, list[str]]]:
    """Batches of responses, and the ids of their prompts."""
    if not max_new:
        batches = eval_batches(data, tokenizer, batch_size=batch_size, length=length)
        yield from ((batch, batches.ids(i)) for i, batch in enumerate(batches))
        return
    prompts = prompt_batches(data, tokenizer, batch_size=batch_size, length=length)
    for p in prompts:
        out = generate(
            lm, p.tokens, p.lengths, key, max_new=max_new, temperature=0.0
        ).batch
        out = jax.device_get(out)
        yield out._replace(valid=out.valid & p.valid[:, None]), p.ids


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _curve(rows: list[np.ndarray], size: Any) -> np.ndarray:
    """The mean at each position over the responses that are that long."""
    longest = max(map(size, rows), default=0)
    total, count = np.zeros(longest), np.zeros(longest)
    for row in rows:
        total[: len(row)] += row
        count[: len(row)] += 1
    return total / np.maximum(count, 1)


def _by_position(name: str, rows: list[np.ndarray], positions: int) -> Metrics:
    """The mean over all tokens, and at each of the first positions."""
    every = np.concatenate(rows).astype(np.float64)
    curve = _curve(rows, len)[:positions]
    by = {f"{name}/{k:02d}": float(x) for k, x in enumerate(curve, 1)}
    return {name: float(every.mean()), **by}


def _compare(
    lm: LM, base: LM, batch: Batch, prompts: list[list[int]] | None
) -> dict[str, list[np.ndarray]]:
    """The fields of _Shift, one row per valid response.

    Args:
      lm: scores the batch.
      base: scores it too, or the responses after `prompts`.
      batch: [B, G, T].
      prompts: of the first, valid rows of B; None for those of the batch.
    """
    for reader in (lm, base):
        logprob.check_ids(reader, batch)
    common = min(lm.config.vocab_size, base.config.vocab_size)  # as in `logprob.score`
    lm, base = (transformer.limit_ids(x, common) for x in (lm, base))
    mask, tokens = np.asarray(batch.mask), np.asarray(batch.tokens)
    places = [(b, g) for b, g in np.argwhere(batch.valid) if mask[b, g].any()]
    ours, theirs, responses, at = [], [], [], []
    for b, g in places:
        (scored,) = np.nonzero(mask[b, g])
        ids = tokens[b, g, : int(batch.lengths[b, g])].tolist()
        ours.append(ids)
        at.append((scored - 1, scored - 1))
        responses.append(tokens[b, g][scored])
        theirs.append(ids)
        if prompts is not None:
            if len(scored) != scored[-1] - scored[0] + 1:
                raise ValueError("plain: a response of several turns")
            theirs[-1] = [*prompts[b], *responses[-1].tolist()]
            at[-1] = (scored - 1, np.arange(len(scored)) + len(prompts[b]) - 1)
    longest = max(map(len, responses))
    r = -(-longest // TILE) * TILE

    def pad(rows):
        return np.stack([np.pad(x, (0, r - len(x))) for x in rows]).astype(np.int32)

    out = jax.device_get(
        _read(
            lm, base, generation_settings.ragged(ours)[0], generation_settings.ragged(theirs)[0],
            pad([a for a, _ in at]), pad([b for _, b in at]), pad(responses),
        )
    )  # fmt: skip
    return {
        name: [row[: len(s)] for row, s in zip(x, responses, strict=True)]
        for name, x in out._asdict().items()
    }


@jax.jit
def _read(lm, base, ours, theirs, at_ours, at_theirs, responses):
    """_Shift [N, R] of the tokens of `responses`, each read at the position before it."""
    n, r = responses.shape
    row = jnp.arange(n)[:, None]
    h = transformer.hidden(lm, ours)[0][row, at_ours]
    g = transformer.hidden(base, theirs)[0][row, at_theirs]

    def tile(xs):
        h, g, token = xs
        p, q = (logprob.rows(*x, whole=False) for x in ((lm, h), (base, g)))
        logp = jnp.take_along_axis(q, token[..., None], -1)
        before = jnp.arange(q.shape[-1]) < token[..., None]
        ahead = (q > logp) | ((q == logp) & before)
        return _Shift((jnp.exp(p) * (p - q)).sum(-1), 1 + ahead.sum(-1), logp[..., 0])

    def tiles(x):
        return jnp.moveaxis(x.reshape(n, r // TILE, TILE, *x.shape[2:]), 1, 0)

    out = jax.lax.map(tile, jax.tree.map(tiles, (h, g, responses)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(n, r), out)
