"""Long prompts made of short ones: each after the prompts of other examples.

The short context is the inner data set itself, under the same ids: `config.reference_data`
can name it, and `data.short_long` pairs a model's answers under the two.

Source: short-to-long supervision as in LongPO (Chen et al. 2025),
https://arxiv.org/abs/2502.13922
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignax.batch import Example
from alignax.data import Examples, wrapped


def examples(
    *, split: str, source: Mapping[str, Any], documents: int = 4, seed: int = 0
) -> Examples:
    """The inner examples with other prompts as distractors in front.

    Args:
      split: of the inner data set.
      source: the inner data set, {'name': ..., its own parameters}; prompts are strings.
      documents: prompts of other examples in front of each prompt, >= 1.
      seed: of the draws; the same arguments give the same examples.

    Raises:
      ValueError: fewer examples than one and its distractors, a prompt that is no
        string, or `documents` < 1.
    """
    inner = wrapped(source, split)
    if documents < 1:
        raise ValueError(f"documents is {documents}, expected at least 1")
    if not len(inner):  # a split that is to have no rows
        return inner
    if len(inner) <= documents:
        raise ValueError(
            f"{len(inner)} examples are too few for {documents} distractors each"
        )

    def convert(i: int) -> Example:
        rng = np.random.default_rng([seed, i])
        others = rng.choice(len(inner) - 1, documents, replace=False)
        texts = [inner[int(j) + (j >= i)].prompt for j in others] + [inner[i].prompt]
        if not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{inner[i].id}: long_context needs prompts in one string")
        return inner[i]._replace(prompt="\n\n".join(texts))

    return inner.over(range(len(inner)), convert).checked()
