"""R³: every factor by hand, and what each of them is there to forbid."""

import dataclasses

import numpy as np
import pytest

from alignax import plugin, rewards
from alignax.batch import Example
from alignax.inputs.source import dataset_source
from alignax.rewards import relevance
from alignax.text import tokenizer

TK = tokenizer.load("bytes")
QUERY = "How do I bake rye bread?"
GOOD = (
    "Mix rye flour and water, let it rest for a day, then knead, shape and bake the bread: "
    "how long depends on the oven, but I do it for forty minutes until it is brown."
)


def scored(*responses, query=QUERY, tk=TK, **hyper):
    """Rewards of responses to one query, through the batch that a run would have."""
    example = Example("a", query, responses)
    source = dataset_source([example], tk, batch_size=1, length=512, seed=0)
    batch = source.next()
    judge = rewards.load({"name": "relevance", **hyper})
    return rewards.call(judge, batch, [list(responses)], {}, tokenizer=tk)[0]


def test_golden_number():
    """Six words of the query, each once; 'bread' twice in a response of four words."""
    got = scored("bread Bread is rye", words=10.0)
    # cosine: (2 bread + 1 rye) / sqrt(6 (4 + 1 + 1)) = 3/6; length 4/10; two trigrams
    assert got[0] == pytest.approx(0.5 * 0.4 * 1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a b", 1.0), ("a b c", 1.0), ("a a a", 1.0), ("a a a a", 1 / 2),
        ("a b c a b c a", 3 / 5), ("", 1.0),
    ],
)  # fmt: skip
def test_repetition_is_the_share_of_distinct_trigrams(text, want):
    assert relevance.distinct(text.split()) == pytest.approx(want)


def test_trigrams_are_of_words_and_runs_of_punctuation():
    assert relevance.split("Well... it's 3.5, no?!") == [
        "Well", "...", "it", "'", "s", "3", ".", "5", ",", "no", "?!",
    ]  # fmt: skip


def test_length_counts_words_and_nothing_else():
    padded = "one ... two !!! three. ? ? ?"
    got = scored("one two three", padded, factors=("length",), words=8.0)
    np.testing.assert_allclose(got, 3 / 8)


def test_a_response_without_a_word_earns_nothing():
    got = scored("?!", GOOD, factors=("repetition",))
    assert got.tolist() == [0.0, 1.0]


def test_what_no_word_of_the_query_is_in_earns_nothing():
    got = scored("Trains leave every hour.", "?!", GOOD)
    assert got[:2].tolist() == [0, 0]
    assert got[2] > 0


def test_case_and_punctuation_are_no_difference_in_relevance():
    got = scored("BREAD; rye!", "bread rye", factors=("relevance",))
    assert got[0] == got[1] > 0


def test_relevance_alone_is_highest_for_a_copy_and_the_product_is_not():
    copy, again = QUERY, " ".join([QUERY] * 8)
    alone = scored(copy, again, GOOD, factors=("relevance",))
    assert alone[0] == pytest.approx(1, abs=1e-6)
    assert alone[0] > alone[2]
    # with the length's factor the copy is repeated; all three prefer the answer
    longer = scored(copy, again, GOOD, factors=("relevance", "length"))
    assert longer.argmax() == 1
    assert scored(copy, again, GOOD).argmax() == 2


TEMPLATE = (
    "system you bake bread; {% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_words_of_the_chat_template_are_not_the_query():
    chat = dataclasses.replace(TK, chat_template=TEMPLATE)
    got = scored("you assistant system user", "rye", query="Is rye good", tk=chat)
    assert got[0] == 0
    assert got[1] == pytest.approx(1 / np.sqrt(3) / 100, rel=1e-6)


def test_unknown_factors_and_a_missing_tokenizer_are_named(make_batch):
    with pytest.raises(
        ValueError, match=r"factors are \('fluency',\), expected some of"
    ):
        scored(GOOD, factors=("fluency",))
    with pytest.raises(ValueError, match="expected some of relevance"):
        scored(GOOD, factors=())
    judge = plugin.load("rewards", "relevance")
    message = "rewards.relevance reads 'tokenizer', which is not given here"
    with pytest.raises(ValueError, match=message):
        rewards.call(judge, make_batch(1, 1, 16), [["a"]], {})
