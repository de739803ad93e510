"""How typical a prompt is of desirable responses: BCO's weight on undesirable ones.

  w(x) = p(x | desirable) / p(x | undesirable) ≈ p / (1 - p)

p comes from a logistic regression that tells the prompts of desirable from those of
undesirable rows, fitted on as many of each.

Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656, underlying distribution matching
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from alignax.batch import Example
from alignax.data import Examples, wrapped
from alignax.records import messages


def examples(
    *,
    split: str,
    source: Mapping[str, Any],
    features: int = 64,
    fitted_on: int = 512,
    ridge: float = 1.0,
    seed: int = 0,
) -> Examples:
    """The inner rows with w(x) as the column 'density_ratio'.

    Prompts are embedded as counts of hashed words, scaled to unit length: what a label
    depends on must be visible in the words. (The paper embeds them by a language model.)

    Args:
      split: of the inner data set.
      source: single labelled responses, {'name': ..., its own parameters}, such as
        `data.unpaired`; the label is the first response's feedback, > 0.5 is desirable.
      features: size of the embedding.
      fitted_on: most prompts per class that the regression is fitted on.
      ridge: strength of the squared penalty on its weights, > 0.
      seed: of the choice of prompts.

    Raises:
      ValueError: a row without a label, only one label, or `ridge` <= 0.
    """
    if ridge <= 0:
        raise ValueError(f"ridge is {ridge}, expected a positive number")
    inner = wrapped(source, split)
    if not len(inner):  # a split that is to have no rows
        return inner
    labels = np.zeros(len(inner))
    x = np.zeros((len(inner), features))
    for i, row in enumerate(inner):
        if not row.feedback:
            raise ValueError(f"{row.id}: density_ratio needs a label, found none")
        labels[i], x[i] = row.feedback[0], embed(_words(row.prompt), features)
    desirable = labels > 0.5
    if desirable.all() or not desirable.any():
        raise ValueError("density_ratio needs rows of both labels")
    rng = np.random.default_rng(seed)
    count = min(fitted_on, int(desirable.sum()), int((~desirable).sum()))
    seen = np.concatenate(
        [rng.permutation(np.flatnonzero(desirable == k))[:count] for k in (True, False)]
    )
    logit = fit(x[seen], desirable[seen], ridge)
    ratios = np.exp(np.clip(logit(x), -10.0, 10.0))

    def convert(i: int) -> Example:
        row = inner[i]
        columns = {**row.columns, "density_ratio": float(ratios[i])}
        return row._replace(columns=columns)

    return inner.over(range(len(inner)), convert, carried=("density_ratio",))


def _words(prompt) -> str:
    """The text of a prompt, of all its turns."""
    if isinstance(prompt, str):
        return prompt
    return " ".join(map(messages.text, prompt))


def embed(text: str, size: int) -> np.ndarray:
    """Counts of the text's words, hashed into `size` places, of unit length."""
    out = np.zeros(size)
    for word in text.lower().split():
        out[zlib.crc32(word.encode()) % size] += 1.0
    return out / max(float(np.linalg.norm(out)), 1.0)


def fit(
    x: np.ndarray, labels: np.ndarray, ridge: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Logistic regression with a free constant, by Newton's method.

    Args:
      x: [N, F].
      labels: [N] booleans.
      ridge: penalty ½ ridge |w|² on the weights, not on the constant.

    Returns:
      A function from [M, F] to logits [M].
    """
    whole = np.concatenate([x, np.ones((len(x), 1))], 1)
    penalty = np.diag([ridge] * x.shape[1] + [1e-9])
    weights = np.zeros(whole.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-whole @ weights))
        gradient = whole.T @ (p - labels) + penalty @ weights
        hessian = (whole * (p * (1 - p))[:, None]).T @ whole + penalty
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    return lambda other: other @ weights[:-1] + weights[-1]
