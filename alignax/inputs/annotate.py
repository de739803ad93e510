"""Log-probabilities of frozen LMs as columns of a batch, such as `ref_logps`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from alignax import logprob
from alignax.batch import LM, OF_BEHAVIOUR, Batch


def unfilled(batch: Batch, needs: Sequence[str]) -> list[str]:
    """The '<name>_logps' among `needs` that a batch does not have yet."""
    extra = batch.extra or {}
    columns = [n for n in needs if n.endswith("_logps") and n not in OF_BEHAVIOUR]
    return [
        n
        for n in columns
        if (batch.ref_logps if n == "ref_logps" else extra.get(n)) is None
    ]


def annotate(
    batch: Batch,
    lms: Mapping[str, LM],
    *,
    needs: Sequence[str] = ("ref_logps",),
    score: Callable[..., Any] = logprob.score,
) -> Batch:
    """Adds the per-token log-probabilities of frozen LMs that a loss needs.

    'ref_logps' is the field, filled by lms['ref']; any other '<name>_logps' goes to
    `extra` and is filled by lms['<name>']. Columns that the batch has are kept.

    Args:
      batch: [B, G, T].
      lms: frozen models by name.
      needs: of the loss; names that do not end in '_logps' are ignored.
      score: `logprob.score`, perhaps with a mesh bound.

    Raises:
      ValueError: a need without its LM; the existing ones are listed.
    """
    for need in unfilled(batch, needs):
        name = need.removesuffix("_logps")
        if name not in lms:
            raise ValueError(
                f"{need!r} is needed but there is no LM {name!r}; there are {sorted(lms)}"
            )
        logps = jax.lax.stop_gradient(score(lms[name], batch).logps)
        if name == "ref":
            batch = batch._replace(ref_logps=logps)
        else:
            batch = batch._replace(extra={**(batch.extra or {}), need: logps})
    return batch
