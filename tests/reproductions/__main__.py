"""Runs reproductions, all or those named: python tests/reproductions [NAME ...]

Writes their figures and their rows of launch/results/reproductions.md.
"""

import importlib
import pathlib
import sys

import report

SHARED = ("__main__", "report", "toy")


def main(names: list[str]) -> None:
    known = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("*.py"))
    known = [name for name in known if name not in SHARED]
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"no reproduction {unknown}; there are {', '.join(known)}")
    failed = []
    for name in names or known:
        module = importlib.import_module(name)
        start = report.now()
        try:
            rows = module.main()
        except AssertionError as error:
            failed.append(f"{name}: {error}")
            print(f"  FAILED: {error}", flush=True)
            continue
        wall, cpu = report.now() - start
        print(f"  {wall:.0f} s, {cpu:.0f} s of all cores", flush=True)
        report.write(name, module.__doc__, rows, wall, cpu)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main(sys.argv[1:])
