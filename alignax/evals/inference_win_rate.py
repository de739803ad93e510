"""Win rates after best-of-N and worst-of-N, from M samples per prompt and side.

  W = Σ_i Σ_j w_i w_j [1{r_(i) > r'_(j)} + 1/2 1{r_(i) = r'_(j)}]
  w_i = C(i-1, N-1) / C(M, N)        probability that the i-th smallest of M is the best of N

Every subset of N of the M samples counts, so the estimate is unbiased and far less noisy
than one draw of N; worst-of-N mirrors the weights, N = 1 is the standard win rate.

  KL = E_{y ~ π} [log π(y|x) - log π_base(y|x)]

Source: win rates under a procedure: Balashankar et al. 2024,
https://arxiv.org/abs/2412.19792; the order-statistic weights are those of unbiased pass@k,
Chen et al. 2021, https://arxiv.org/abs/2107.03374
Differs from the papers: ties count half; both sides are averaged over all subsets.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from alignax import rewards
from alignax.batch import LM, Metrics
from alignax.inputs.prompts import prompt_batches
from alignax.reports.metrics import bootstrap


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, reward: str | Mapping[str, Any], baseline: str = "ref",
    n: int | tuple[int, ...] = (4,), samples: int = 32, max_new: int = 64, size: int = 256,
) -> Metrics:  # fmt: skip
    """Samples both sides and compares the responses that each procedure would select.

    Args:
      reward: a file in rewards/ (or {'name': ..., its hyper-parameters}), or a dotted
        name of a function of the response's text.
      baseline: name in `lms` of the model to beat.
      n: N of best-of-N and worst-of-N, one or several, each at most `samples`.
      samples: M, responses per prompt and side, at temperature 1.
      max_new: most tokens per response.
      size: prompts to use, from the start of the data (0 = all); at least 2.

    Returns:
      'standard', 'best_of_N' and 'worst_of_N' win rates, 'reward', 'baseline_reward'
      and 'kl' (nats per response), each with an interval over prompts, and 'kl/se', the
      standard error of the latter.

    Raises:
      ValueError: what `check` refuses.
    """
    check(
        tuple(lms), data, reward=reward, baseline=baseline, n=n, samples=samples, size=size
    )  # fmt: skip
    got = measure(
        lm, lms, data[:size] if size else data, key=key, tokenizer=tokenizer,
        generate=generate, score=score, batch_size=batch_size, length=length,
        reward=reward, baseline=baseline, samples=samples, max_new=max_new,
    )  # fmt: skip
    out: Metrics = {}
    for name, wins in rates(got, _several(n)).items():
        out |= bootstrap(wins).named(name)
    out |= bootstrap(got.ours.mean(1)).named("reward")
    out |= bootstrap(got.theirs.mean(1)).named("baseline_reward")
    out |= bootstrap(got.kl).named("kl")
    out["kl/se"] = float(got.kl.std(ddof=1) / math.sqrt(len(got.kl)))
    return out


class Measured(NamedTuple):
    """Rewards of samples of two models, prompt by prompt, and their KL."""

    ours: Float[np.ndarray, "B M"]  # rewards of the policy's responses
    theirs: Float[np.ndarray, "B M"]  # of the baseline's
    kl: Float[np.ndarray, " B"]  # nats per response, policy to baseline


def measure(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, reward: str | Mapping[str, Any], baseline: str = "ref",
    samples: int = 32, max_new: int = 64,
) -> Measured:  # fmt: skip
    """Draws M responses of both models to every prompt; arguments as in `evaluate`."""
    judge = rewards.load(reward)
    prompts = prompt_batches(data, tokenizer, batch_size=batch_size, length=length)
    sides: tuple[list, list] = ([], [])
    kl = []
    for i, p in enumerate(prompts):
        for side, model in enumerate((lm, lms[baseline])):
            got = jax.device_get(
                generate(
                    model, p.tokens, p.lengths, jax.random.fold_in(key, 2 * i + side),
                    max_new=max_new, group=samples,
                )
            )  # fmt: skip
            batch = got.batch._replace(extra=p.columns or None)
            r, _ = rewards.of_samples(
                judge, batch, p, lms, tokenizer=tokenizer, score=score
            )
            sides[side].extend(r[p.valid])
            if not side:
                ratio = score(lm, batch).logps - score(lms[baseline], batch).logps
                kl.append(ratio.sum(-1)[p.valid].mean(-1))
    ours, theirs = map(np.array, sides)
    return Measured(ours, theirs, np.concatenate(kl))


def rates(got: Measured, n: Sequence[int]) -> dict[str, Float[np.ndarray, " B"]]:
    """'standard', 'best_of_N' and 'worst_of_N' win rates of every prompt."""
    out = {"standard": win_rates(got.ours, got.theirs, 1)}
    for many in n:
        best, worst = (win_rates(s * got.ours, s * got.theirs, many) for s in (1, -1))
        # the worst of N is the best of N of the opposite reward, lost
        out |= {f"best_of_{many}": best, f"worst_of_{many}": 1 - worst}
    return out


def check(
    lms: Sequence[str], data, *, reward, baseline: str, n: int | Sequence[int],
    samples: int, size: int, **_,
) -> None:  # fmt: skip
    """Raises ValueError: no such baseline, N beyond the samples, or a single prompt."""
    rewards.load(reward)
    if baseline not in lms:
        raise ValueError(
            f"inference_win_rate needs an LM {baseline!r}; there are {sorted(lms)}"
        )
    many = _several(n)
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in many)
    if not (many and whole and min(many) >= 1 and max(many) <= samples):
        raise ValueError(f"n is {n}, expected numbers from 1 to samples={samples}")
    if size < 0 or len(data[:size] if size else data) < 2:
        raise ValueError(
            f"size is {size}, of {len(data)} prompts: an interval over prompts needs two"
        )


def _several(n: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(n) if isinstance(n, Sequence) else (n,)


def win_rates(ours: np.ndarray, theirs: np.ndarray, n: int) -> np.ndarray:
    """Unbiased best-of-n win rate of each prompt.

    Args:
      ours: [B, M] rewards of one side.
      theirs: [B, M'] of the other.
      n: samples that the best is taken of, at most M and M'.

    Returns:
      [B] probabilities in [0, 1], ties counting half.
    """
    w, v = best_weights(ours.shape[1], n), best_weights(theirs.shape[1], n)
    below = np.concatenate([[0.0], np.cumsum(v)])
    out = []
    for a, b in zip(np.sort(ours, 1), np.sort(theirs, 1), strict=True):
        less, most = (below[np.searchsorted(b, a, s)] for s in ("left", "right"))
        out.append(np.sum(w * (less + most) / 2))
    return np.array(out)


def best_weights(m: int, n: int) -> np.ndarray:
    """[m] probabilities that the i-th smallest of m is the best of n of them."""
    if not 1 <= n <= m:
        raise ValueError(f"the best of {n} cannot be taken of {m} samples")
    return np.array([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)])
