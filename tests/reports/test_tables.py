"""What a run prints, as text."""

from alignax.reports import tables


def test_table_puts_the_interval_beside_its_value():
    text = tables.table(
        {"a": 0.5, "bb": 2.0, "a/lo": 0.25, "a/hi": 0.75, "samples": []}
    )
    assert text == "  a   0.5  [0.25, 0.75]\n  bb  2"


def test_summary_counts_and_names():
    counts = dict(
        read=5, used=3, cut=1, dropped=1, malformed=1, padding=0.125, useful=0.75,
        dropped_ids=["a:2: too long"], malformed_ids=["a:4: not JSON"],
    )  # fmt: skip
    assert tables.summary(counts).splitlines() == [
        "5 read, 3 used, 1 cut, 1 dropped, 1 malformed, 12.5% padding, 75.0% useful tokens",
        "  dropped: a:2: too long",
        "  malformed: a:4: not JSON",
    ]
