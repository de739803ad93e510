"""A sweep: runs of one config that differ in some keys, and a table of their results.

  alignax sweep configs/dpo.py runs/sweep --grid loss.beta=0.05,0.1 seed=0,1
  alignax sweep configs/dpo.py runs/sweep --runs runs.txt --dry_run

`--grid` runs every combination of the values; a file of `--runs` has one run per line, as
`key=value` words (quoted as in a shell; # begins a comment). The name of a run is its
changes, and its folder is SWEEP/NAME. Runs that succeeded are not started again, so the same
command resumes a sweep; a run that saved and ended with 75 is started again up to
`--retries` times. A sweep's folder belongs to one config: another config is refused, and so
is a name under which other changes ran. Without `--launcher` a run is a process of this Python in
the current folder; a launcher must wait for its run (launch/xpk.sh does not).

SWEEP/results.md and results.csv have one row per run: its keys, how it ended, and the last
value of every metric that `--metrics` matches. SWEEP/NAME.log is the output of the run.

Exit code: 0 if all runs succeeded, 1 if some failed (they are named), 75 after SIGTERM or
Ctrl-C, which is forwarded to the current run.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

from etils import epath

from alignax.models import json_object

RESUME = 75  # EX_TEMPFAIL: saved, can be resumed
LONGEST = 250  # bytes of a run's name, which its log has with four more
STATUS = (
    "sweep.json"  # in its folder: {run: {"config": ..., "changes": ..., "code": ...}}
)


def split(values: str) -> list[str]:
    """'1,2' -> ['1', '2']; commas inside brackets or quotes belong to a value."""
    parts, depth, quote = [""], 0, ""
    for c in values:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += (c in "([{") - (c in ")]}") if not quote else 0
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def pair(word: str) -> tuple[str, str]:
    """'loss.beta=0.1' -> ('loss.beta', '0.1').

    Raises:
      ValueError: not of that form.
    """
    key, equals, value = word.removeprefix("--config.").partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ValueError(f"'{word}' is not key=value, as loss.beta=0.1")
    return key, value


def grid(words: list[str]) -> list[dict[str, str]]:
    """Every combination of the values of 'key=value,value' words."""
    pairs = [pair(word) for word in words]
    keys = [key for key, _ in pairs]
    if len({*keys}) < len(keys):
        raise ValueError(f"--grid names a key twice: {keys}")
    choices = itertools.product(*(split(values) for _, values in pairs))
    return [dict(zip(keys, choice, strict=True)) for choice in choices]


def listed(text: str) -> list[dict[str, str]]:
    """The changes of the runs of a file, one per line.

    Raises:
      ValueError: a line has other words, or a key twice; its number is named.
    """
    runs = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            pairs = [pair(word) for word in shlex.split(line, comments=True)]
            if len(dict(pairs)) < len(pairs):
                raise ValueError(f"a key twice: {[key for key, _ in pairs]}")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if pairs:
            runs.append(dict(pairs))
    return runs


def of_file(path: str | None) -> list[dict[str, str]]:
    """The runs of the file of --runs; none without one.

    Raises:
      OSError, ValueError: it cannot be read; it is named.
    """
    try:
        return listed(pathlib.Path(path).read_text("utf-8")) if path else []
    except ValueError as error:
        raise ValueError(f"--runs {path}: {error}") from error


def check_numbers(metrics: str, retries: int) -> None:
    """Raises ValueError for what only the end of a run would show."""
    try:
        re.compile(metrics)
    except (re.error, RecursionError) as error:
        raise ValueError(
            f"--metrics '{metrics}' is no regular expression: {error}"
        ) from error
    if retries < 0:
        raise ValueError(f"--retries is {retries}, expected 0 or more")


def name(changes: dict[str, str]) -> str:
    """The name of a run's folder, from its changes: 'loss.beta=0.1,seed=0'."""
    plain = {k: re.sub(r"[^-+.=\w]", "_", v) for k, v in changes.items()}
    parts = [f"{k}={v}" for k, v in plain.items()]
    return ",".join(parts) or "base"


def named(runs: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    """{name: changes}.

    Raises:
      ValueError: two runs have one name, or one has a name that no folder can have.
    """
    out: dict[str, dict[str, str]] = {}
    for changes in runs:
        folder = name(changes)
        if folder in out:
            raise ValueError(f"two runs are called '{folder}'")
        if (size := len(folder.encode())) > LONGEST:
            raise ValueError(
                f"the name of run '{folder:.40}...' has {size} bytes, and that of a folder "
                f"{LONGEST} at most: put the long values into a config"
            )
        out[folder] = changes
    return out


def command(
    launcher: str, config: str, workdir: str, changes: dict[str, str]
) -> list[str]:
    """The command line of one run; without a launcher, of this Python."""
    flags = [f"--config.{k}={v}" for k, v in changes.items()]
    if launcher:
        return [*shlex.split(launcher), config, workdir, *flags]
    words = ["-m", "alignax.main", "--config", config]
    return [sys.executable, *words, "--workdir", workdir, *flags]


def check_launcher(launcher: str) -> None:
    """Raises ValueError if a launcher cannot be started, or does not wait for its run."""
    if not launcher:
        return
    try:
        word = [*shlex.split(launcher), ""][0]
    except ValueError as error:
        raise ValueError(f"--launcher {launcher}: {error}") from error
    if not shutil.which(word):
        raise ValueError(f"--launcher '{word}' is not there, or cannot be executed")
    if pathlib.Path(word).name == "xpk.sh":
        raise ValueError(
            "--launcher xpk.sh returns when its run is submitted: how the run ends is not "
            "known here, and all of them would have one workload's name"
        )


def begun(file: epath.Path) -> dict[str, dict]:
    """What the sweep.json of a folder says of its runs; {} without one.

    Raises:
      OSError, ValueError: it cannot be read, or is damaged; it is named.
    """
    if not file.exists():
        return {}
    found = json_object.read(file)
    for run, one in found.items():
        fits = isinstance(one, dict) and isinstance(one.get("changes"), dict)
        if not fits or not isinstance(one.get("code"), int | None):
            raise ValueError(
                f"{file} does not say how run '{run}' differs and ended: delete the file, "
                "and all runs are started again, which go on from what they saved"
            )
    return found


def place(file: epath.Path, text: str) -> None:
    """Writes a file; a kill leaves what was there before, or all of it."""
    part = file.parent / f".{file.name}"
    part.write_text(text)
    part.replace(file)


def check_same(before: dict[str, dict], config: str, runs: dict) -> None:
    """Raises ValueError if a run in the folder has another config, or other changes."""
    for run, one in before.items():
        if one.get("config", config) != config:
            raise ValueError(
                f"run '{run}' there is of {one['config']}: {config} needs another folder"
            )
        if run in runs and one["changes"] != runs[run]:
            raise ValueError(
                f"run '{run}' there changes {one['changes']}, this one {runs[run]}: it "
                "needs another folder"
            )


def last_metrics(workdir, pattern: str) -> dict[str, float]:
    """The last value of the metrics that match; those of a stage as 'stage/metric'."""
    folder = epath.Path(workdir)
    found: dict[str, float] = {}
    if not folder.is_dir():
        return found
    for path in sorted([folder, *(p for p in folder.iterdir() if p.is_dir())]):
        file = path / "metrics.jsonl"
        if not file.is_file():
            continue
        stage = "" if path == folder else f"{path.name}/"
        for line in file.read_bytes().split(b"\n"):
            # the end, or a line that a kill left incomplete, or that no run wrote
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                row = dict(json.loads(line.decode()))
                found |= {
                    f"{stage}{k}": float(v)
                    for k, v in row.items()
                    if k == "step" or re.search(pattern, k)
                }
    return found


def table(
    status: dict[str, dict], sweep: str, pattern: str
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the results: keys, how it ended, metrics."""
    metrics = {run: last_metrics(epath.Path(sweep) / run, pattern) for run in status}
    keys = list(dict.fromkeys(k for s in status.values() for k in s["changes"]))
    columns = list(dict.fromkeys(k for m in metrics.values() for k in m))
    rows = []
    for run, one in status.items():
        values = [metrics[run].get(c) for c in columns]
        rows.append(
            [run, *(one["changes"].get(k, "") for k in keys), ended(one["code"])]
            + ["" if v is None else f"{v:.6g}" for v in values]
        )
    return ["run", *keys, "ended", *columns], rows


def ended(code: int | None) -> str:
    """An exit code in words."""
    known = {None: "not run", 0: "well", RESUME: "stopped"}
    return known.get(code, f"failed ({code})")


def write(sweep: str, header: list[str], rows: list[list[str]]) -> str:
    """Writes results.md and results.csv; returns the Markdown."""
    folder = epath.Path(sweep)

    def line(cells):
        cells = (" ".join(c.replace("|", "\\|").splitlines()) for c in cells)
        return "| " + " | ".join(cells) + " |"

    rule = line(["---"] * len(header))
    text = "\n".join([line(header), rule, *map(line, rows)]) + "\n"
    place(folder / "results.md", text)
    comma = io.StringIO()
    csv.writer(comma, lineterminator="\n").writerows([header, *rows])
    place(folder / "results.csv", comma.getvalue())
    return text


class Runner:
    """Runs one command after the other, and forwards signals to the current one."""

    def __init__(self):
        self.stopped, self._process = False, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_):
        self.stopped = True
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def run(self, words: list[str], log: pathlib.Path) -> int:
        """Runs a command to its end, in its own session, where Ctrl-C does not reach it."""
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            if self.stopped:
                self._stop()
            return self._process.wait()


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="e.g. configs/dpo.py")
    parser.add_argument("sweep", help="folder of the sweep")
    parser.add_argument("--grid", nargs="+", default=[], metavar="KEY=V,V")
    parser.add_argument("--runs", help="file with one run a line")
    parser.add_argument("--launcher", default="", help="e.g. launch/local.sh")
    parser.add_argument("--metrics", default=r"^eval/(?!.*/(lo|hi)$)|^train/loss$")
    parser.add_argument("--retries", type=int, default=3)
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    args = parser.parse_args(argv)
    try:
        runs = named([*of_file(args.runs), *(grid(args.grid) if args.grid else [])])
        check_launcher(args.launcher)
        check_numbers(args.metrics, args.retries)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not runs:
        parser.error("no runs: name them by --grid or --runs")
    sweep = (
        args.sweep if "://" in args.sweep else str(pathlib.Path(args.sweep).resolve())
    )
    commands = {
        run: command(args.launcher, args.config, f"{sweep}/{run}", changes)
        for run, changes in runs.items()
    }
    if args.dry_run:
        print("\n".join(map(shlex.join, commands.values())))
        return 0
    file = epath.Path(sweep) / STATUS
    try:
        before = begun(file)
        check_same(before, args.config, runs)
    except (ValueError, OSError) as error:
        parser.error(f"{sweep}: {error}")
    try:
        return conduct(sweep, before, runs, commands, args)
    except OSError as error:  # of the folder, or of the launcher
        print(f"error: {error}", file=sys.stderr)
        return 1


def conduct(sweep: str, before: dict, runs: dict, commands: dict, args) -> int:
    """Starts the runs that have not succeeded yet; returns the exit code of the sweep.

    `before` holds the runs of earlier commands of this folder, which stay in the table.
    """
    folder = epath.Path(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STATUS
    status = before | {
        run: {
            "config": args.config, "changes": changes,
            "code": before.get(run, {}).get("code"),
        }
        for run, changes in runs.items()
    }  # fmt: skip
    logs = pathlib.Path("runs" if "://" in sweep else sweep)
    logs.mkdir(parents=True, exist_ok=True)
    runner = Runner()
    for i, run in enumerate(runs):
        if status[run]["code"] == 0:
            print(f"[{i + 1}/{len(runs)}] {run}: ended well before", flush=True)
            continue
        print(f"[{i + 1}/{len(runs)}] {run}", flush=True)
        for _ in range(1 + args.retries):
            code = runner.run(commands[run], logs / f"{run}.log")
            if code != RESUME or runner.stopped:
                break
        status[run]["code"] = code
        place(file, json.dumps(status, indent=1))
        text = write(sweep, *table(status, sweep, args.metrics))
        if runner.stopped:
            print("stopped: the same command goes on", file=sys.stderr)
            return RESUME
    text = write(sweep, *table(status, sweep, args.metrics))
    place(file, json.dumps(status, indent=1))
    print(text, end="")
    failed = [run for run in runs if status[run]["code"] != 0]
    for run in failed:
        lines = (logs / f"{run}.log").read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if re.search("error", line, re.I)]
        last = [*lines, *errors][-1] if lines else ""
        print(f"{run} {ended(status[run]['code'])}: {last}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
