"""What a sweep cannot do is said in one line, before its runs where that is known then."""

import json

import pytest

from alignax import sweep

pytestmark = pytest.mark.usefixtures("signal_handlers")

LAUNCHER = """#!/bin/sh
mkdir -p "$2"
echo '{"step": 1, "train/loss": 0.5}' > "$2/metrics.jsonl"
"""


@pytest.fixture
def begin(tmp_path, capsys):
    """(folder of a sweep of one run, function of further words: exit code, its errors)."""
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    folder = tmp_path / "sweep"

    def start(*words):
        given = [
            "config.py",
            str(folder),
            "--launcher",
            str(launcher),
            "--grid",
            "seed=0",
        ]
        try:
            code = sweep.main([*given, *map(str, words)])
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr().err.strip().splitlines()
        return code, said[-1] if said else ""

    return folder, start


DAMAGED = [
    b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"seed=0": 3}', b'{"seed=0": {}}',
    b'{"x": {"changes": 3, "code": 0}}', b'{"x": {"changes": {}, "code": "0"}}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_list_of_runs_is_named(begin, content):
    folder, start = begin
    folder.mkdir()
    (folder / sweep.STATUS).write_bytes(content)
    code, said = start()
    assert code == 2 and f"{folder}/{sweep.STATUS} " in said
    assert (folder / sweep.STATUS).read_bytes() == content


@pytest.mark.parametrize(
    "words, message",
    [
        (["--metrics", "("], r"--metrics '(' is no regular expression"),
        (["--retries", "-1"], "--retries is -1, expected 0 or more"),
        (["--launcher", " "], "--launcher '' is not there"),
        (["--launcher", '"x'], '--launcher "x: No closing quotation'),
        (
            ["--grid", "tokenizer=" + "a" * 300],
            "has 310 bytes, and that of a folder 250",
        ),
    ],
)
def test_what_ends_a_sweep_later_is_refused_first(begin, words, message):
    folder, start = begin
    code, said = start(*words)
    assert code == 2 and message in said
    assert not folder.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff", "'utf-8' codec can't decode"),
        (b"seed=1\nseed=2 'x\n", "line 2: No closing quotation"),
        (b"seed=1 seed=2", "line 1: a key twice: ['seed', 'seed']"),
    ],
)
def test_a_file_of_runs_is_named(begin, tmp_path, content, message):
    (tmp_path / "runs.txt").write_bytes(content)
    code, said = begin[1]("--runs", tmp_path / "runs.txt")
    assert code == 2 and f"{tmp_path}/runs.txt: {message}" in said


@pytest.mark.parametrize("name", ["", "results.md", "seed=0.log"])
def test_what_cannot_be_written_is_named(begin, name):
    folder, start = begin
    if name:
        (folder / name).mkdir(parents=True)
    else:
        folder.write_text("")
    code, said = start()
    assert code == 1 and said.startswith("error: ") and str(folder / name) in said


LINES = [
    b"12",
    b"[1]",
    b"null",
    b'{"step": 1, "train/loss": null}',
    b"\xff{",
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_metrics_is_left_out(begin, line):
    folder, start = begin
    assert start()[0] == 0
    path = folder / "seed=0" / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert start() == (0, "")
    assert "| well | 1 | 0.5 |" in (folder / "results.md").read_text()


def test_a_kill_leaves_a_whole_list_of_runs(begin, monkeypatch):
    folder, start = begin
    assert start()[0] == 0
    before = json.loads((folder / sweep.STATUS).read_text())

    def killed(file, text):
        if file.name == f".{sweep.STATUS}":
            raise KeyboardInterrupt
        return written(file, text)

    path = type(sweep.epath.Path(str(folder)))
    written = path.write_text
    monkeypatch.setattr(path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert json.loads((folder / sweep.STATUS).read_text()) == before


def test_a_run_is_one_row_whatever_its_changes(begin):
    folder, start = begin
    assert start("--grid", "tokenizer=a\nb|c")[0] == 0
    assert len((folder / "results.md").read_text().splitlines()) == 3
