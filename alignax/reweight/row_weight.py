"""Weights of the rows themselves: a column of numbers multiplies the loss of each row.

  L ← Σ_b w_b L_b / B

  config.data = {"name": "jsonl", "path": ..., "numbers": ("weight",)}
  config.reweight = {"row_weight": {}}

A row of weight 2 counts as the row twice; weights are not divided by their mean.

Source: importance weighting as in Shimodaira 2000,
https://doi.org/10.1016/S0378-3758(00)00115-4
Differs from the source: where the weights are from is the user's.
"""

from jaxtyping import Array, Float

from alignax.batch import Batch, Scores

NEEDS = ("logps",)
COLUMN = "weight"


def reweight(policy: Scores, batch: Batch) -> tuple[Scores, Batch, Float[Array, " B"]]:
    """The column 'weight' of the rows.

    Args:
      policy: not read.
      batch: extra['weight'] [B].

    Returns:
      The scores and the batch as they are, and the weights.

    Raises:
      ValueError: rows without the column.
    """
    if COLUMN not in (batch.extra or {}):
        raise ValueError(
            "reweight.row_weight needs the column 'weight' in every row, as a number: set "
            "config.data.numbers=('weight',)"
        )
    assert batch.extra is not None
    return policy, batch, batch.extra[COLUMN]
