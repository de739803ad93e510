"""Win rate against a baseline on the same prompts, and its cost in KL.

  win rate = mean over prompts of 1[r(x, y) > r(x, y')] + 1/2 1[r(x, y) = r(x, y')]
  KL       = E_{y ~ π} [log π(y|x) - log π_base(y|x)]

Source: pairwise win rates as in Zheng et al. 2023, https://arxiv.org/abs/2306.05685; the
pair (win rate, KL) as in Gao et al. 2022, https://arxiv.org/abs/2210.10760
Differs from the papers: the judge is a function, so that order cannot matter. Do not
use the reward that trained the policy as the judge.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import rewards
from alignax.batch import LM, Metrics
from alignax.inputs.prompts import prompt_batches
from alignax.reports.metrics import bootstrap


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, reward: str | Mapping[str, Any], baseline: str = "ref",
    max_new: int = 64, temperature: float = 1.0, size: int = 256, show: int = 8,
) -> Metrics:  # fmt: skip
    """Samples one response per prompt from each side and compares rewards.

    Args:
      reward: a file in rewards/ (or {'name': ..., its hyper-parameters}), or a dotted
        name of a function of the response's text.
      baseline: name in `lms` of the model to beat.
      max_new: most tokens per response.
      temperature: of both samplers; KL is between the distributions at temperature 1,
        so at another temperature it is not reported.
      size: prompts to use, from the start of the data (0 = all).
      show: prompts whose responses are returned as text.

    Returns:
      'win_rate' (ties count half), 'strict_wins' (ties lose), 'reward',
      'baseline_reward', 'kl' (nats per response), each with an interval over prompts;
      'ended' (share of responses that end in EOS), 'tokens' (mean response length) and
      'samples'.
    """
    judge = rewards.load(reward)
    if baseline not in lms:
        raise ValueError(
            f"win_rate needs an LM {baseline!r} to beat; there are {sorted(lms)}"
        )
    data = data[:size] if size else data
    prompts = prompt_batches(data, tokenizer, batch_size=batch_size, length=length)
    ours, theirs, kl, ended, tokens = [], [], [], [], []
    samples: list[dict] = []
    for i, p in enumerate(prompts):
        got = []
        for side, model in enumerate((lm, lms[baseline])):
            seed = jax.random.fold_in(key, 2 * i + side)
            out = generate(
                model,
                jnp.asarray(p.tokens),
                jnp.asarray(p.lengths),
                seed,
                max_new=max_new,
                temperature=temperature,
            )
            out = jax.device_get(out)
            found = rewards.of_samples(
                judge, out.batch, p, lms, tokenizer=tokenizer, score=score
            )
            got.append((out, *found))
        (mine, r, texts), (_, r_base, base_texts) = got
        keep = p.valid
        r, r_base = r[keep, 0], r_base[keep, 0]
        ours.append(r)
        theirs.append(r_base)
        ended.append(~mine.truncated[keep, 0])
        tokens.append(mine.batch.mask[keep, 0].sum(-1))
        if temperature == 1.0:
            plain = mine.batch._replace(old_logps=None)
            ratio = score(lm, plain).logps - score(lms[baseline], plain).logps
            kl.append(ratio.sum(-1)[keep, 0])
        for j in np.flatnonzero(keep)[: max(0, show - len(samples))]:
            samples.append(
                {
                    "prompt": p.texts[j], "before": base_texts[j][0], "after": texts[j][0],
                    "reward before": float(r_base[j]), "reward after": float(r[j]),
                }
            )  # fmt: skip
    r, r_base = np.concatenate(ours), np.concatenate(theirs)
    wins, ties = np.float64(r > r_base), np.float64(r == r_base)
    out = {
        **bootstrap(wins + ties / 2).named("win_rate"),
        **bootstrap(wins).named("strict_wins"),
        **bootstrap(r).named("reward"),
        **bootstrap(r_base).named("baseline_reward"),
        "ended": float(np.concatenate(ended).mean()),
        "tokens": float(np.concatenate(tokens).mean()),
        "samples": samples,
    }
    return out | (bootstrap(np.concatenate(kl)).named("kl") if kl else {})
