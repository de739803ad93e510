"""A host batch as text, for the state of a source; bit for bit."""

import base64
import io
from typing import Any

import numpy as np

from alignax.batch import Batch


def dumps(batch: Batch) -> str:
    """A host batch as text."""
    named: dict[str, Any] = {
        name: np.asarray(value)
        for name, value in batch._asdict().items()
        if value is not None and name != "extra"
    }
    named |= {f"extra/{name}": np.asarray(x) for name, x in (batch.extra or {}).items()}
    file = io.BytesIO()
    np.savez_compressed(file, **named)
    return base64.b64encode(file.getvalue()).decode()


def loads(text: str) -> Batch:
    """The batch that `dumps` wrote."""
    fields: dict[str, Any] = {}
    for name, value in dict(np.load(io.BytesIO(base64.b64decode(text)))).items():
        field, _, column = name.partition("/")
        if column:
            fields.setdefault(field, {})[column] = value
        else:
            fields[field] = value
    return Batch(**fields)
