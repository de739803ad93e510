"""Measures of text, counted by hand."""

import importlib.util
import math
import time

import pytest

from alignax.text import measures

needs = {
    name: pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name}, of the extra 'text'"
    )
    for name in ("pyphen", "textblob")
}
PLAIN = "The cat sat on the mat. It saw a dog!"  # 10 words, 2 sentences, 10 syllables
LONG = "Considerable difficulty remains."  # 3 words; 5 + 4 + 2 syllables


def test_grade_of_words_and_syllables_counted_by_hand():
    assert measures.difficulty(PLAIN) == pytest.approx(0.39 * 5 + 11.8 - 15.59)
    want = 0.39 * 3 + 11.8 * 11 / 3 - 15.59
    assert measures.difficulty(LONG) == pytest.approx(want)


@pytest.mark.parametrize(
    "word, many",
    [
        ("the", 1), ("cake", 1), ("cakes", 1), ("table", 2), ("jumped", 1), ("wanted", 2),
        ("going", 2), ("didn't", 2), ("Didn’t", 2), ("can't", 1), ("don't", 1), ("it's", 1), ("about", 2),
        ("well-known", 2), ("naïve", 1), ("e\u0301clair", 2), ("rhythm", 1), ("hmm", 1), ("be", 1),
        ("consideration", 5),
    ],
)  # fmt: skip
def test_syllables_by_the_rule(word, many):
    """'naïve' is a miss of the rule: two vowels in a row are one syllable."""
    assert measures.vowel_groups(word) == many


@needs["pyphen"]
@pytest.mark.parametrize(
    "word, many",
    [("difficulty", 4), ("reading", 2), ("The", 1), ("extraordinary", 5), ("about", 1)],
)
def test_syllables_by_hyphenation(word, many):
    """dif-fi-cul-ty, read-ing, the, ex-tra-or-di-nary; one letter is never cut off."""
    assert measures.hyphenated(word) == many
    grade = measures.difficulty(word, measures.hyphenated)
    assert grade == pytest.approx(0.39 + 11.8 * many - 15.59)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "no." Then left.', ['He said "no."', "Then left."]),
        ("Dr. Li met J. K. Ray, e.g. at 3.5 km. Good.", ["Dr. Li met J. K. Ray, e.g. at 3.5 km.", "Good."]),
        ("So do I. Yes. No. Go.", ["So do I.", "Yes.", "No.", "Go."]),
        ("A title\n\nA text... and more", ["A title", "A text...", "and more"]),
        ("Is it?! (Yes.) ... !", ["Is it?!", "(Yes.)"]),
        ("It ended with Mr.", ["It ended with Mr."]),
        ("", []), (" \n ", []), ("... ?", []),
    ],
)  # fmt: skip
def test_sentences(text, parts):
    assert measures.sentences(text) == parts


@pytest.mark.parametrize(
    "text, found",
    [
        ("don't, it’s", ["don't", "it’s"]),
        ("well-known - no", ["well-known", "no"]),
        ("snake_case 42 3.5", ["snake", "case", "42", "3", "5"]),
        ("cafe\u0301s Äpfel Привет 你好", ["cafés", "Äpfel", "Привет", "你好"]),
        ("'quoted' (x)", ["quoted", "x"]),
        ("", []),
    ],
)
def test_words(text, found):
    assert measures.words(text) == found
    assert measures.length(text) == len(found)


def test_diversity_of_a_text_by_hand():
    """Forward 'a b a' falls to 2/3: a factor; 'c d' is none: 5 / 1.

    Backward 'd c a b' has share 1, with the last 'a' 4/5: a rest of .2 / .28: 5 / (5/7).
    """
    assert measures.diversity("a b A, c d.") == pytest.approx((5 + 7) / 2)


def test_a_factor_ends_at_a_share_of_72_percent_exactly():
    """18 distinct words of 25: seven repetitions at the end."""
    letters = [chr(ord("a") + i) for i in range(18)]
    text = " ".join(letters + letters[:7])
    backward = letters[:7][::-1] + letters[::-1]
    assert len(set(backward)) / 25 == 0.72
    assert measures.diversity(text) == 25
    # a 26th word begins the next factor, of which it is nothing yet
    assert measures._run_length([*text.split(), "z"]) == 26


def test_the_same_word_again_and_again_has_a_factor_of_two():
    """Shares 1, 1/2: every second word ends a factor."""
    assert measures.diversity("no " * 10) == 2
    assert measures.diversity("no " * 11) == pytest.approx(11 / 5)


def test_one_word_and_no_word():
    assert measures.diversity("Hello") == math.inf
    assert measures.difficulty("Hello") == pytest.approx(0.39 + 2 * 11.8 - 15.59)
    assert measures.length("Hello") == 1
    for text in ("", "  \n", "?! ..."):
        assert measures.length(text) == 0
        assert math.isnan(measures.difficulty(text))
        assert math.isnan(measures.diversity(text))
        assert math.isnan(measures.formality(text, lambda t: []))


def test_numerals_are_one_syllable():
    assert measures.difficulty("1984 7") == pytest.approx(0.39 * 2 + 11.8 - 15.59)


def test_formality_of_tags_by_hand():
    """3 nouns, 1 adjective, 1 preposition, 2 articles; a pronoun, 2 verbs, an adverb.

    'this' is a determiner, '42' and '.' have no letter: 11 words, 7 - 4 of them.
    """
    tagged = [
        ("The", "DT"), ("old", "JJ"), ("dog", "NN"), ("of", "IN"), ("a", "DT"),
        ("Paris", "NNP"), ("cats", "NNS"), ("she", "PRP"), ("saw", "VBD"), ("run", "VB"),
        ("quickly", "RB"), ("42", "CD"), (".", "."),
    ]  # fmt: skip
    want = (100 * (7 - 4) / 11 + 100) / 2
    assert measures.formality_of(tagged) == pytest.approx(want)
    with_this = [*tagged, ("this", "DT")]
    assert measures.formality_of(with_this) == pytest.approx((25 + 100) / 2)
    assert measures.formality("", lambda text: tagged) == pytest.approx(want)
    assert measures.formality_of([("dog", "NN")]) == 100
    assert measures.formality_of([("oh", "UH"), ("could", "MD"), ("who", "WP")]) == 0


@needs["textblob"]
def test_tags_of_a_sentence():
    got = measures.pattern_tags("She didn’t see the old dog. It's in Paris!")
    assert got == [
        ("She", "PRP"), ("did", "VBD"), ("n't", "RB"), ("see", "VB"), ("the", "DT"),
        ("old", "JJ"), ("dog", "NN"), (".", "."),
        ("It", "PRP"), ("'s", "POS"), ("in", "IN"), ("Paris", "NNP"), ("!", "."),
    ]  # fmt: skip


@needs["textblob"]
def test_a_report_is_more_formal_than_a_chat():
    report = "The committee approved the annual budget of the ministry for education."
    chat = "Oh, I really think you should just go and tell him, you know!"
    assert measures.formality(report) > measures.formality(chat) + 30
    assert math.isnan(measures.formality(""))


@pytest.mark.parametrize("library", ["pyphen", "textblob"])
def test_a_missing_library_is_named(library, monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, library, None)
    monkeypatch.setitem(
        importlib.import_module("sys").modules, "textblob.en.taggers", None
    )
    measures._pyphen.cache_clear()
    measures._tagger.cache_clear()
    use = {"pyphen": measures.hyphenated, "textblob": measures.formality}[library]
    with pytest.raises(ImportError, match=r"pip install alignax\[text\]"):
        use("word")


def test_numbers_of_a_list_are_no_sentences():
    assert measures.sentences("1. Buy milk.\n2. Go home.") == ["1. Buy milk.", "2. Go home."]  # fmt: skip
    assert measures.sentences("It was 1999. Then it rained.") == ["It was 1999.", "Then it rained."]  # fmt: skip


def test_many_abbreviations_take_linear_time():
    def seconds(many):
        start = time.process_time()
        measures.sentences("e.g. " * many + "end")
        return time.process_time() - start

    assert min(seconds(40_000) for _ in range(2)) < 5  # .1 s; quadratic: minutes
