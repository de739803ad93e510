"""PAPERS.md promises nothing that is not there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "PAPERS.md").read_text(encoding="utf-8")
CONFIGS = "".join(p.read_text("utf-8") for p in (ROOT / "configs").glob("*.py"))
SEEDS, _, OTHERS = TEXT.partition("## Methods that are not among the 52")


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def problems(row):
    """What is wrong with a row, in words; its last cells are where and status."""
    *_, where, status = row
    paths = re.findall(r"`([\w/]+\.py)`", where)
    if status == "works":
        missing = [path for path in paths if not (ROOT / "alignax" / path).exists()]
        if missing or not paths:
            return f"works, but there is no {missing or 'file named'}"
        for path in paths:
            folder, _, name = path.rpartition("/")
            if folder == "losses":
                if not (ROOT / f"tests/losses/test_{name}").exists():
                    return f"works, but there is no tests/losses/test_{name}"
                if f'"{name.removesuffix(".py")}"' not in CONFIGS:
                    return f"works, but no config names {name}"
    elif status.startswith("out of scope"):
        if not re.fullmatch(r"out of scope: .{10,}", status):
            return "out of scope, without the reason"
    elif not re.fullmatch(r"planned(: .+)?", status):
        return f"'{status}' is no status; say works, planned or out of scope: why"
    elif not paths:
        return "planned, but nowhere"
    return None


def test_there_is_one_row_for_each_of_the_52_papers():
    numbers = [int(row[0]) for row in rows(SEEDS)]
    links = re.findall(r"https://arxiv\.org/abs/\d{4}\.\d{5}", SEEDS)
    assert numbers == list(range(1, 53))
    assert len(links) == len(set(links)) == 52


@pytest.mark.parametrize("row", rows(SEEDS) + rows(OTHERS), ids=lambda row: row[0])
def test_status_is_honest(row):
    assert problems(row) is None


@pytest.mark.parametrize(
    "where, status, word",
    [
        ("`losses/no_such_loss.py`", "works", "no_such_loss"),
        ("—", "works", "file named"),
        ("—", "planned", "nowhere"),
        ("—", "out of scope", "reason"),
        ("`losses/dpo.py`", "nearly", "no status"),
    ],
)
def test_a_promise_without_its_file_is_found(where, status, word):
    assert word in problems(["0", "paper", "what", where, status])
