"""Examples: random access, order, and what data made of other data passes on."""

import json

import pytest

from alignax.batch import Example
from alignax.data import Examples, none_left, share, wrapped
from alignax.plugin import load

ROWS = [
    Example(f"r:{i}", f"p{i} " * 9, (f"c{i}", f"r{i}"), (1.0, 0.0)) for i in range(6)
]


def test_examples_are_a_lazy_sequence():
    made = []

    def convert(i):
        made.append(i)
        return ROWS[i]

    all_rows = Examples(range(6), convert, {"dropped": ["x"]}, files=["f"], carried=["c"])  # fmt: skip
    some = all_rows[1:5][::-2]
    assert made == []
    assert list(some) == [ROWS[4], ROWS[2]]
    assert some[-1] == ROWS[2]
    assert (some.report, some.files, some.carried) == ({"dropped": ["x"]}, ("f",), ("c",))  # fmt: skip
    with pytest.raises(IndexError, match="example 2 of 2"):
        some[2]


def test_other_examples_made_of_these_add_to_what_they_say():
    inner = Examples(ROWS, None, {"dropped": ["x"]}, files=["f"], carried=["c"])
    outer = inner.over(range(2), lambda i: ROWS[i], {"dropped": ["y"], "z": ["w"]}, ("c", "d"))  # fmt: skip
    assert outer.report == {"dropped": ["x", "y"], "z": ["w"]}
    assert inner.report == {"dropped": ["x"]}
    assert (outer.files, outer.carried) == (("f",), ("c", "d"))
    assert Examples(ROWS).over(range(2), carried=("c",)).carried is None


def test_a_bad_example_is_an_error_when_all_are_checked():
    with pytest.raises(ZeroDivisionError):
        Examples([1, 0], lambda x: 1 / x).checked()


def plain(*, split):
    del split
    return ROWS


def test_a_plain_sequence_can_be_wrapped():
    assert list(wrapped({"name": f"{__name__}.plain"}, "train")) == ROWS


@pytest.mark.parametrize(
    "name, parameters, carried",
    [
        ("unpaired", {}, ()),
        ("density_ratio", {"source": {"name": "unpaired"}}, ("density_ratio",)),
        ("recovery", {}, ()),
        ("urial", {}, ()),
        ("long_context", {"documents": 1}, ()),
        ("pairing", {}, ()),
    ],
)
def test_data_made_of_a_file_say_so_and_hold_no_row(
    tmp_path, name, parameters, carried
):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]} for r in ROWS]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {}]))
    source = {"name": "jsonl", "path": str(path)}
    if "source" in parameters:
        source = {**parameters["source"], "source": source}
    hyper = {"split": "train", **parameters, "source": source}
    made = load("data", name, hyper)()
    assert (made.files, made.carried) == ((str(path),), carried)
    assert len(made.report["malformed"]) == 1
    assert made[0] == made[0]
    assert made[0] is not made[0]
    assert list(made) == [made[i] for i in range(len(made))]


@pytest.mark.parametrize("name", ["unpaired", "density_ratio", "recovery", "urial", "long_context", "pairing", "short_long"])  # fmt: skip
def test_a_split_without_rows_stays_one(tmp_path, name):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}))
    source = {"name": "jsonl", "path": str(path), "test_fraction": 0.0}
    keys = ("short", "long") if name == "short_long" else ("source",)
    hyper = {"split": "test", **dict.fromkeys(keys, source)}
    assert len(load("data", name, hyper)()) == 0


def test_a_share_is_checked_and_an_empty_one_explained():
    assert [share(x, "train") for x in (None, 0, 0.5, 1)] == [0, 0, 0.5, 1]
    for bad in ((0.5, "dev"), (None, "test"), (-1, "train"), (True, "all")):
        with pytest.raises(ValueError, match=r"split|test_fraction"):
            share(*bad)
    assert "set a smaller one" in none_left("f", "train", 0.5, 3)
    assert "among 3 rows" in none_left("f", "test", 0.5, 3)
