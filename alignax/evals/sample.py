"""Samples of the policy with their rewards, of which on-policy pairs are made.

  satisfaction = mean over prompts and responses of r(x, y)
  best of G    = mean over prompts of max_g r(x, y_g)

The rows go to the run's samples.jsonl, which `data.jsonl` reads back as scored groups and
`data.pairing` turns into pairs: samples, verifiers as reward, best against worst.

Source: constraint verifiers that label a model's own samples, as in ACT (Wang et al.
2024), https://arxiv.org/abs/2403.06326
Differs from the paper: nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import rewards
from alignax.batch import LM, Example, Metrics
from alignax.data import best_first
from alignax.inputs.prompts import prompt_batches
from alignax.reports.metrics import bootstrap

TRUNCATEDS = ("keep", "drop")


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int, reward: str | Mapping[str, Any], group: int = 4,
    max_new: int = 64, temperature: float = 1.0, size: int = 256,
    keep_given: bool = False, truncated: str = "keep",
) -> Metrics:  # fmt: skip
    """Samples a group of responses to each prompt and scores them.

    Args:
      reward: a file in rewards/ (or {'name': ..., its hyper-parameters}), or a dotted
        name of a function of the response's text.
      group: G, responses per prompt.
      max_new: most tokens per response.
      temperature: of the sampler.
      size: prompts to use, from the start of the data (0 = all).
      keep_given: put the data's chosen or best response in front of each group, so that the
        model's own samples are its negatives; it scores one more than the best of them.
      truncated: 'keep' has responses that max_new cut off in the rows, and says which; for
        rows to train on, 'drop' leaves them out.

    Returns:
      'reward' and 'best' (of a group) with intervals over prompts, 'ended' (share of
      responses that end in EOS), 'empty' (prompts without a response for the rows: that is
      not blank and, under 'drop', ends; they are in no row) and 'samples': rows of prompt, responses and scores.

    Raises:
      ValueError: `keep_given` of a prompt without a response.
    """
    judge = rewards.load(reward)
    data = data[:size] if size else data
    prompts = prompt_batches(data, tokenizer, batch_size=batch_size, length=length)
    mean, best, ended, empty = [], [], [], 0
    samples: list[dict[str, Any]] = []
    for i, p in enumerate(prompts):
        out = jax.device_get(
            generate(
                lm, jnp.asarray(p.tokens), jnp.asarray(p.lengths),
                jax.random.fold_in(key, i), max_new=max_new, group=group,
                temperature=temperature,
            )
        )  # fmt: skip
        r, texts = rewards.of_samples(
            judge, out.batch, p, lms, tokenizer=tokenizer, score=score
        )
        for j in np.flatnonzero(p.valid):
            example = data[i * batch_size + int(j)]
            done = ~out.truncated[j]
            mean.append(r[j].mean())
            best.append(r[j].max())
            ended.append(done.mean())
            kept = [
                (t, float(s), not d)
                for t, s, d in zip(texts[j], r[j], done.tolist(), strict=True)
                if (d or truncated == "keep") and t.strip()
            ]
            if keep_given:
                if not example.responses:
                    raise ValueError(
                        f"{example.id}: keep_given, but no response is given"
                    )
                kept.insert(0, (response_text(example), float(r[j].max()) + 1, False))
            if not kept:
                empty += 1
                continue
            samples.append(
                {
                    "id": example.id,
                    "prompt": example.prompt,
                    "responses": [t for t, _, _ in kept],
                    "scores": [s for _, s, _ in kept],
                }
                | (
                    {"truncated": [c for _, _, c in kept]}
                    if truncated == "keep"
                    else {}
                )
            )
    return {
        **bootstrap(np.array(mean)).named("reward"),
        **bootstrap(np.array(best)).named("best"),
        "ended": float(np.mean(ended)),
        "empty": empty,
        "samples": samples,
    }


def response_text(example: Example) -> str:
    """The assistant turns of an example's chosen or best response."""
    response = best_first(example).responses[0]
    if isinstance(response, str):
        return response
    return "\n".join(m["content"] for m in response if m["role"] == "assistant")
