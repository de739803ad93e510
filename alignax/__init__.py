"""alignax: LLM alignment research in JAX. One batch layout, one kernel, one loop.

    import alignax as ax

The names below are imported when they are first used; see `alignax/api.py`.
"""

import difflib
import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The public surface: name -> the module that has it. No name is a submodule's.
PUBLIC = {
    "load": "alignax.api",
    "save": "alignax.api",
    "tokenizer": "alignax.api",
    "score": "alignax.api",
    "generate": "alignax.api",
    "speculate": "alignax.api",
    "config": "alignax.api",
    "train": "alignax.api",
    "Model": "alignax.api",
    "Batch": "alignax.batch",
    "Scores": "alignax.batch",
}
__all__ = [*PUBLIC]

if TYPE_CHECKING:  # a misspelt import is an error for a type checker
    from alignax.api import Model as Model
    from alignax.api import config as config
    from alignax.api import generate as generate
    from alignax.api import load as load
    from alignax.api import save as save
    from alignax.api import score as score
    from alignax.api import speculate as speculate
    from alignax.api import tokenizer as tokenizer
    from alignax.api import train as train
    from alignax.batch import Batch as Batch
    from alignax.batch import Scores as Scores
else:

    def __getattr__(name: str):
        if name in PUBLIC:
            value = getattr(importlib.import_module(PUBLIC[name]), name)
            globals()[name] = value
            return value
        near = difflib.get_close_matches(name, PUBLIC, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'alignax' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
