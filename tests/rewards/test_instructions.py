"""Instructions of the row: each kind on responses that follow it and that do not."""

import json
import time

import numpy as np
import pytest

from alignax import rewards
from alignax.batch import Example
from alignax.rewards import instructions

LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
CASES = {  # kind: (arguments, responses that follow, responses that do not)
    "keywords:existence": (
        {"keywords": ["cat", "a dog"]}, ["A dog and a CAT."], ["A cat.", "category, a dog"],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["cat"]}, ["category", "dog"], ["A Cat!", "the cat"],
    ),
    "keywords:frequency": (
        {"keyword": "no", "frequency": 2, **LEAST}, ["no, No", "no no no"], ["no", "no not"],
    ),
    "keywords:letter_frequency": (
        {"letter": "E", "let_frequency": 2, "let_relation": "less than"}, ["be"], ["eE"],
    ),
    "length_constraints:number_words": (
        {"num_words": 3, **LESS}, ["a b", "one"], ["a b c", "a\nb\nc d"],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, **LEAST}, ["One. Two!", "One? and", 'He said "no." Yes.'],
        ["One.", "3.5 only", "One...", "One. ..."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2}, ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a", "a\n***\nb\n***\nc", "a\n***\n \n***\nb"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        ["A.\n\nso it is", "A.\n \n\n\n\"So,\" he said"], ["A.\n\nIt", "So", "A\nso"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2}, ["[name] in [city]"], ["[name]", "name city"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."}, ["Hi.\nP.S. me", "Hi\n p. s. me"], ["Hi", "a P.S. b"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2}, ["* a\n* b", "- a\ntext\n  - b"], ["* a", "* a\n* b\n- c", "**a**\n**b**"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, ["*a* and *b c*", "**a** *b*"], ["*a*", "* a\nb", "** ** * *"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "PART", "num_sections": 2}, ["PART 1\na\nPART 2\nb"], ["PART 1", "part a part b"],
    ),
    "detectable_format:title": ({}, ["<<My title>>\ntext"], ["<<>>", "<< >>", "title", "<a>"]),
    "detectable_format:json_format": (
        {}, ['{"a": 1}', '```json\n{"a": 1}\n```', "3"], ["{", "a", "[" * 100_000],
    ),
    "combination:two_responses": (
        {}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "a******"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say it."}, ["say it. It."], ["It. Say it."],
    ),
    "startend:end_checker": (
        {"end_phrase": "That is all."}, ["Hi. that is ALL.", '"That is all."\n'], ["That is all. Bye"],
    ),
    "startend:quotation": ({}, ['"Hi."', ' "Hi"\n'], ["Hi", '"Hi', '"']),
    "change_case:english_capital": ({}, ["HI 5"], ["Hi", "5"]),
    "change_case:english_lowercase": ({}, ["hi 5"], ["Hi", "5"]),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, ["NO and NO"], ["NO", "No No"],
    ),
    "punctuation:no_comma": ({}, ["a; b"], ["a, b"]),
}  # fmt: skip


def row(**given):
    return {
        "instruction_id_list": json.dumps([*given]),
        "kwargs": json.dumps([*given.values()]),
    }


def test_every_kind_has_its_cases():
    assert {*CASES} == {*instructions.CHECKS}
    assert len(CASES) >= 12


@pytest.mark.parametrize("name", CASES)
def test_each_instruction_by_hand(name):
    given, good, bad = CASES[name]
    asked = row(**{name: {**given, "other": None, "language": None}})
    got = instructions.reward([[*good, *bad, "", " \n"]], [asked])
    np.testing.assert_array_equal(got, [[1] * len(good) + [0] * (len(bad) + 2)])


def test_the_share_of_instructions_or_all_of_them():
    asked = [
        row(**{"punctuation:no_comma": {}, "change_case:english_lowercase": {}}),
        row(**{"punctuation:no_comma": {}}),
    ]
    texts = [["a b", "a, b", "A, b"], ["A", ",", "a"]]
    got = instructions.reward(texts, asked)
    np.testing.assert_array_equal(got, [[1, 0.5, 0], [1, 0, 1]])
    got = instructions.reward(texts, asked, rule="all")
    np.testing.assert_array_equal(got, [[1, 0, 0], [1, 0, 1]])
    assert got.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("change_case:english_lowercase", "Sure!\nthis is it."),
        ("change_case:english_lowercase", "this is it.\nHope it helps"),
        ("change_case:english_lowercase", "Sure!\nthis is it.\nHope it helps"),
        ("startend:end_checker", "It. **That is all.**"),
        ("startend:end_checker", "It. That is all.\nBye"),
    ],
)
def test_loose_forgives_a_frame_and_asterisks(name, text):
    asked = row(**{name: {"end_phrase": "That is all."}})
    assert instructions.reward([[text]], [asked]) == 0
    assert instructions.reward([[text]], [asked], loose=True) == 1
    assert instructions.reward([["No.\nNo!"]], [asked], loose=True) == 0


def test_an_unknown_instruction_is_refused_or_skipped():
    asked = row(**{"language:response_language": {"language": "de"}, "punctuation:no_comma": {}})  # fmt: skip
    with pytest.raises(ValueError, match=r"row 0 has the instruction 'language:response_language', which is none of keywords:existence.*unknown='skip'"):  # fmt: skip
        instructions.reward([["a"]], [asked])
    got = instructions.reward([["a", ","]], [asked], unknown="skip")
    np.testing.assert_array_equal(got, [[1, 0]])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, r"row 0 has no column 'instruction_id_list'; it has \[\]"),
        ({"instruction_id_list": "x", "kwargs": "[]"}, r"'x' in 'instruction_id_list', expected a list"),
        ({"instruction_id_list": "{}", "kwargs": "[]"}, "expected a list"),
        ({"instruction_id_list": "[]", "kwargs": "[{}]"}, "0 instructions .* and 1 sets of"),
        (row(**{"punctuation:no_comma": 5}), "arguments of punctuation:no_comma are 5"),
        (row(**{"keywords:existence": {}}), "keywords:existence needs 'keywords' as list, and has None"),
        (row(**{"keywords:existence": {"keywords": [1]}}), "needs 'keywords' as list"),
        (row(**{"length_constraints:number_words": {"num_words": "3", **LESS}}), "needs 'num_words' as int, and has '3'"),
        (row(**{"length_constraints:number_words": {"num_words": 3, "relation": "most"}}), "relation is 'most', expected 'at least' or"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        instructions.reward([["a"]], [bad])
    with pytest.raises(ValueError, match="rule is 'most', one of share, all"):
        instructions.reward([["a"]], [row()], rule="most")


def test_a_number_may_be_written_as_a_float():
    asked = row(**{"length_constraints:number_words": {"num_words": 2.0, **LEAST}})
    assert instructions.reward([["a b"]], [asked]) == 1


def test_a_run_hands_it_the_rows(make_batch):
    judge = rewards.load("instructions")
    rows = [Example("a", "p", [], (), row(**{"punctuation:no_comma": {}}))] * 2
    batch = make_batch(2, 2, 16)._replace(extra={"row": np.array([1, 0], np.int32)})
    got = rewards.call(judge, batch, [["a", ","], [",", "a"]], {}, examples=rows)
    np.testing.assert_array_equal(got, [[1, 0], [0, 1]])


@pytest.mark.parametrize("part", ["*", "**", "* ", "[", "]", "[]", "<<", "<<a", ".", ". ", "***", "\n", "\n ", " ", "a", "A ", "-", '"', "```", "PART ", "\0"])  # fmt: skip
def test_hostile_text_takes_linear_time(part):
    text = part * (50_000 // len(part))
    begin = time.process_time()
    for name, (given, _, _) in CASES.items():
        instructions.reward([[text, text + "x"]], [row(**{name: given})], loose=True)
    assert time.process_time() - begin < 10
