"""Recovery: what is given, what is scored, and how often."""

import numpy as np
import pytest

from alignax.batch import Example
from alignax.data import Examples, recovery
from alignax.text import tokenizer

PAIRS = Examples(
    [
        Example(f"p:{i}", f"How {i}?", ("I cannot.", "First take two cups"))
        for i in range(400)
    ]
)


def pairs(*, split):
    del split
    return PAIRS


def prefill(row):
    """What the answer of a row begins with and is not scored."""
    (answer,) = row.responses
    return "" if isinstance(answer, str) else answer[0]["prefill"]


def make(**hyper):
    return recovery.examples(
        split="train", source={"name": f"{__name__}.pairs"}, **hyper
    )


def test_half_of_the_answers_follow_the_beginning_of_a_harmful_one():
    rows = make()
    given = [prefill(row) for row in rows]
    words = np.array([len(g.split()) for g in given])
    # 400 fair coins: 4 standard errors are 40
    assert abs((words > 0).sum() - 200) < 40
    assert set(words) == {0, 1, 2, 3, 4}
    assert np.bincount(words)[1:].min() > 20  # uniform over 1..4
    for row, g in zip(rows, given, strict=True):
        (answer,) = row.responses
        assert (answer[0]["content"] if g else answer) == f"{g} I cannot.".strip()
        assert "First take two cups".startswith(g)


def test_at_most_so_many_words_are_given():
    words = [len(prefill(r).split()) for r in make(longest=2, plain=0.0)]
    assert set(words) == {1, 2}


def test_nothing_given_is_the_plain_refusal():
    assert all(r.responses == ["I cannot."] for r in make(plain=1.0))


def test_only_the_refusal_is_scored():
    text = tokenizer.load("bytes")
    example = make(plain=0.0)[0]
    ids, (answer,), (scored,) = text.tokenize(example)
    given = prefill(example)
    n = scored.index(True)
    assert text.decode(answer[:n]) == given
    assert text.decode(answer[n:]) == " I cannot."
    assert all(scored[n:])
    assert ids == text.prompt(example)


def test_the_same_seed_gives_the_same_examples():
    assert list(make(seed=1)) == list(make(seed=1))
    assert list(make(seed=1)) != list(make(seed=2))


@pytest.mark.parametrize(
    ("hyper", "message"),
    [({"plain": 1.5}, "plain is 1.5"), ({"longest": 0}, "longest is 0")],
)
def test_numbers_out_of_range_are_refused(hyper, message):
    with pytest.raises(ValueError, match=message):
        make(**hyper)


def test_what_is_no_pair_is_named(monkeypatch):
    monkeypatch.setattr(
        f"{__name__}.PAIRS", Examples([Example("p:7", "How?", ("I cannot.",))])
    )
    with pytest.raises(
        ValueError, match="p:7: recovery needs pairs, found 1 responses"
    ):
        make()


def scored(*, split):
    """The refusal has the higher score, and comes second."""
    del split
    return Examples(
        [Example("s:0", "How?", ("Take two cups", "I cannot."), (2.0, 8.0))]
    )


def tied(*, split):
    del split
    return Examples([Example("t:0", "How?", ("a", "b"), (2.0, 2.0))])


def test_the_refusal_of_scored_responses_is_the_better_one():
    spec = {"name": f"{__name__}.scored"}
    (row,) = recovery.examples(split="train", source=spec, plain=1.0)
    assert row.responses == ["I cannot."]
    with pytest.raises(ValueError, match=r"t:0: recovery needs pairs.*tie"):
        recovery.examples(split="train", source={"name": f"{__name__}.tied"})
