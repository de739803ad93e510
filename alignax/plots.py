"""Draws the learning curves of a run: python -m alignax.plots WORKDIR

Writes learning_curves.png and details.png into the workdir; see `reports/curves.py`.
"""

import sys
from collections.abc import Sequence

from alignax.reports import curves


def main(arguments: Sequence[str]) -> None:
    """Draws the run in the given workdir and prints the paths of the pictures."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m alignax.plots WORKDIR")
    try:
        for path in curves.plot(arguments[0]):
            print(path)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
