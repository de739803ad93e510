"""Perplexity of responses: exp of the mean negative log-likelihood per scored token.

Source: Jelinek et al. 1977, https://doi.org/10.1121/1.2016299; as used for preference
models in https://arxiv.org/abs/2305.18290
Differs from the source: only response tokens are scored; of several responses the chosen or
best one.
"""

import numpy as np

from alignax.batch import LM, Metrics
from alignax.data import Examples, best_first
from alignax.inputs.source import eval_batches
from alignax.reports.metrics import bootstrap


def evaluate(
    lm: LM, lms: dict[str, LM], data, *, key, tokenizer, generate, score,
    batch_size: int, length: int,
) -> Metrics:  # fmt: skip
    """Mean nats per token over all scored tokens of the chosen or best response.

    Returns:
      'nll' (nats per token), 'perplexity' and 'log_prob' (nats per response, with its
      interval over prompts).
    """
    del lms, key, generate
    data = Examples(data, best_first, getattr(data, "report", None))
    total, count, per_prompt = 0.0, 0, []
    for batch in eval_batches(data, tokenizer, batch_size=batch_size, length=length):
        batch = batch._replace(extra=None)
        logps = score(lm, batch).logps[:, 0]
        keep = batch.valid[:, 0]
        total += float(logps[keep].astype(np.float64).sum())
        count += int(batch.mask[:, 0][keep].sum())
        per_prompt += logps[keep].sum(-1).tolist()
    nll = -total / max(count, 1)
    return {
        "nll": nll,
        "perplexity": float(np.exp(nll)),
        **bootstrap(per_prompt).named("log_prob"),
    }
