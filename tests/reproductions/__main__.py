"""Runs every reproduction and writes launch/results/reproductions.md.

python tests/reproductions [NAME ...]   some of them, without writing the table
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
    results, failed = {}, []
    for name in names or known:
        try:
            with report.timed() as seconds:
                rows = importlib.import_module(name).main()
        except AssertionError as error:
            failed.append(f"{name}: {error}")
            print(f"== {name} ==\n  FAILED: {error}", flush=True)
            continue
        print(f"  {seconds():.0f} s", flush=True)
        results[name] = (rows, seconds())
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))
    if not names:
        path = report.RESULTS / "reproductions.md"
        path.write_text(report.markdown(results), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
