"""Needs of a loss, and the LMs that fill them."""

from alignax import bindings


def test_a_pattern_among_needs_stands_for_every_lm_that_matches():
    needs, lms = (
        ("logps", "aligned*_logps", "ref_logps"),
        ["aligned_b", "ref", "aligned"],
    )
    want = ("logps", "aligned_b_logps", "aligned_logps", "ref_logps")
    assert bindings.matched(needs, lms) == want
    assert bindings.matched(needs, ["ref"]) == needs
    assert bindings.matched(("aligned*_logps", "aligned_logps"), lms) == want[1:3]
