"""Long contexts from short ones."""

import pytest

from alignax.batch import Example
from alignax.data import Examples, long_context

SHORT = Examples([Example(f"e:{i}", f"p{i}", (f"s{i}", "no")) for i in range(5)])


def short(*, split):
    del split
    return SHORT


def source(name):
    return {"name": f"{__name__}.{name}"}


def test_each_prompt_ends_a_context_of_other_prompts():
    rows = long_context.examples(split="train", source=source("short"), documents=2)
    for i, row in enumerate(rows):
        *others, own = row.prompt.split("\n\n")
        assert own == f"p{i}"
        assert len({*others} - {own}) == 2
        assert row.responses == SHORT[i].responses
        assert row.id == SHORT[i].id


def test_more_distractors_than_examples_are_refused():
    with pytest.raises(ValueError, match="5 examples are too few for 5 distractors"):
        long_context.examples(split="train", source=source("short"), documents=5)
    with pytest.raises(ValueError, match="documents is 0"):
        long_context.examples(split="train", source=source("short"), documents=0)
