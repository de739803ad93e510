"""Colabs run from top to bottom, and the notebooks are what the .py files say."""

import json
import re
import subprocess
import sys

import jupytext
import pytest
import tiny

pytestmark = pytest.mark.slow

COLABS = sorted((tiny.ROOT / "colabs").glob("*.py"))
each = pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)


def test_there_are_colabs():
    assert COLABS
    assert {p.stem for p in (tiny.ROOT / "colabs").glob("*.ipynb")} == {p.stem for p in COLABS}  # fmt: skip


@each
def test_notebook_is_in_sync(path):
    """`make colabs` writes it again."""
    want = jupytext.read(path)
    got = json.loads(path.with_suffix(".ipynb").read_text())
    cells = [(c["cell_type"], "".join(c["source"])) for c in got["cells"]]
    assert cells == [(c.cell_type, c.source) for c in want.cells]
    for cell in got["cells"]:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


@each
def test_installs_nothing_when_it_is_run_as_a_script(path):
    lines = path.read_text().splitlines()
    assert any(re.match(r"# #? ?%pip install", line) for line in lines)
    assert not [line for line in lines if line.startswith(("!", "%"))]


@each
def test_colab_runs_to_its_end(path, tmp_path):
    result = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, text=True, capture_output=True,
        env=tiny.environment(MPLBACKEND="Agg", TMPDIR=str(tmp_path)), check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = dict(re.findall(r"^ *(\w+): accuracy (\d\.\d+) \[", result.stdout, re.M))
    assert set(found) == {"hinge", "DPO"}, result.stdout
    # 128 pairs: four standard errors above chance
    assert all(float(x) > 0.5 + 4 * 0.5 / 128**0.5 for x in found.values()), found
