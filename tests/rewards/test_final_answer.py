"""The final answer: forms, numbers as people and models write them, and hostile text."""

import time

import numpy as np
import pytest

from alignax import rewards
from alignax.batch import Example
from alignax.rewards import final_answer

RIGHT = {  # marked text -> the reference that it equals
    "72": "72", " 72 ": "72", "72.": "72", "72.00": "72", "072": "72", "+72": "72",
    "$72": "72", r"\$72": "72", "72$": "72", "$72$": "72", "US$72": "72", "72 €": "72",
    "72 clips": "72", "72kg": "72", "60 km/h": "60", "$5/hour": "5", "5 m^2": "5",
    "5 cm^{2}": "5", "5 m²": "5", "30°": "30", r"30^\circ": "30", r"30^{\circ}": "30",
    "**72**": "72", "*72*": "72", "`72`": "72", "72!": "72", '"72"': "72", "(72)": "72",
    "x = 72": "72", "48 + 24 = 72": "72", "= 72": "72", "<<48+24=72>>72": "72",
    "<answer>72</answer>": "72", "72 (that is 72 clips)": "72", "about 72": "72",
    "1,234": "1234", "1,234,567.50": "1234567.5", "$1,234": "1234", "1{,}234": "1234",
    r"1\,234": "1234", r"1,\!234": "1234", "1\u202f234": "1234", "1\u00a0234": "1234",
    "1234": "1,234", "-5": "-5", "- 5": "-5", "−5": "-5", "-$5": "-5", "$-5": "-5",
    "- $ 5": "-5", "-€5": "-5", "the value is -5": "-5", "0": "-0", ".5": "0.5",
    "0.5": "1/2", "1/2": "0.50", "2/4": "1/2", "1 / 2": "1/2", "-1/2": "-0.5",
    "1 1/2": "1.5", "1½": "3/2", "½": "0.5", "3/4 cup": "0.75", "1⁄2": "0.5",
    r"\frac{1}{2}": "0.5", r"\dfrac{1}{2}": "0.5", r"\frac12": "0.5", r"-\frac{1}{2}": "-1/2",
    r"\frac{-1}{2}": "-1/2", r"3\frac{1}{2}": "3.5", r"\frac{1,000}{8}": "125",
    r"72\text{ clips}": "72", r"\text{72}": "72", r"5\ \mathrm{cm}": "5", r"5\,\text{cm}": "5",
    "50%": "50", "50 %": "0.5", r"50\%": "50%", "50 percent": "50", "0.50": "50%",
    "50": "50 %", "12.5%": "1/8", "1.5e3": "1500", "1.5E-1": "0.15", "3 x 10^8": "300000000",
    r"3 \times 10^{8}": "300000000", r"2\cdot10^{-1}": "0.2", "７２": "72", "6/3": "2",
}  # fmt: skip
WRONG = {  # marked text -> a reference that it does not equal
    "71": "72", "720": "72", "7 2": "72", "7.2": "72", "72 or 73": "72", "71, 72": "72",
    "72 73 74": "74", "0.333": "1/3", "0.3333333333333333": "1/3", "-72": "72", "72": "-72",
    "x72": "72", "72^2": "72", "2^72": "72", "2(2)": "2", "36 + 36": "36", "36*2": "36",
    "√72": "72", r"\sqrt{72}": "72", r"\frac{x}{72}": "72", r"72\pi": "72", "72π": "72",
    "±72": "72", r"\pm 72": "72", "x > 72": "72", "100-72": "72", "72/0": "72", "7:12": "12",
    "1,23": "123", "1.234.567": "1234567", "0,072": "72", "1/1/1": "1", "seventy-two": "72",
    "50%": "5", "0.5%": "50", "9" * 401: "9", "1e9999": "1", "1e400": "1", "": "72",
    "72 = x": "x", "5^2": "25",
}  # fmt: skip


def one(text, reference, **hyper):
    return float(final_answer.reward([[text]], [{"answer": reference}], **hyper)[0, 0])


@pytest.mark.parametrize(("text", "reference"), RIGHT.items())
def test_the_same_number_written_otherwise_is_right(text, reference):
    assert one(f"So it is.\n#### {text}", reference) == 1
    assert one(rf"So it is \boxed{{{text}}}.", reference) == 1


@pytest.mark.parametrize(("text", "reference"), WRONG.items())
def test_another_number_or_more_than_one_is_wrong(text, reference):
    assert one(f"Of 5000.\n#### {text}", reference) == 0
    assert one(rf"Of 5000: \boxed{{{text}}}.", reference) == 0


@pytest.mark.parametrize(
    ("text", "reference", "want"),
    [
        ("48 + 24 = 72 clips, that is all.", "72", 1),
        ("It costs $1,234.50.", "1234.5", 1),
        ("He lost 5, which makes -5", "-5", 1),
        ("He has 10-5", "5", 1),  # a minus between numbers is no sign
        ("- 5 apples", "5", 1),  # nor is the mark of a list
        ("half of it, 1/2", "0.5", 1),
        ("72 of them, 73 in all", "72", 0),
        ("seventy-two", "72", 0),
        ("", "72", 0),
        ("see x72", "72", 0),
        ("1.234.567", "567", 0),
        ("first 3\n1/2", "1/2", 1),
        ("It is 50 percent", "50", 1),
    ],
)
def test_without_a_mark_the_last_number_counts(text, reference, want):
    assert one(text, reference) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("#### 71\nWait.\n#### 72", 1),  # the last mark counts
        ("#### 72\nWait.\n#### 71", 0),
        (r"\boxed{71} no, \boxed{72}", 1),
        (r"\boxed{72} no, \boxed{71}", 0),
        (r"#### 72 \boxed{71}", 0),  # no choice between two
        ("#### 72\n" + r"\boxed{71}", 1),  # the first form counts
        ("#### 71 or so, or 72", 0),  # nor a retreat to the last number
        ("####\n72\nThat is 5 more.", 1),
        ("####72", 1),
        ("####: 72", 1),
        ("#### Solution\n48 + 24 = 72", 1),  # a heading is no mark
        ("#### 72\n##### 71", 1),
        ("### 71\n72", 1),
        (r"\boxed{\boxed{72}}", 1),
        (r"\boxed{72", 1),  # not closed: the last number
        (r"\boxed{}72", 1),
        (r"\boxed{\text{seventy}} 72", 1),
        ("#### 72\n\nQuestion: 5?", 1),
    ],
)
def test_which_mark_counts(text, want):
    assert one(text, "72") == want


def test_only_accepted_forms_count():
    texts = [["#### 72", r"\boxed{72}", "72", "#### 71\n72"]]
    rows = [{"answer": "72"}]
    for accept, want in (
        (("hash",), [1, 0, 0, 0]), (("boxed",), [0, 1, 0, 0]), (("last",), [1, 1, 1, 1]),
        (("last", "boxed"), [1, 1, 1, 1]), (("last", "hash"), [1, 1, 1, 0]),
    ):  # fmt: skip
        got = final_answer.reward(texts, rows, accept=accept)
        np.testing.assert_array_equal(got, [want])
    for accept in ((), ("hash", "answer")):
        with pytest.raises(ValueError, match="expected some of hash, boxed, last"):
            final_answer.reward(texts, rows, accept=accept)


def test_a_readable_mark_is_paid_right_or_wrong():
    texts = [["#### 72", "#### 71", "72", "71", "#### 1 2", r"\boxed{5}", "#### x"]]
    got = final_answer.reward(texts, [{"answer": 72}], correct=2.0, format=0.25)
    np.testing.assert_array_equal(got, [[2.25, 0.25, 2, 0, 0, 0.25, 0]])
    assert got.dtype == np.float32


@pytest.mark.parametrize(
    ("reference", "text", "want"),
    [
        ("Tuesday", "#### tuesday.", 1),
        ("Tuesday", "It is Tuesday", 0),  # only marked text is compared as text
        ("(3, 5)", r"\boxed{(3,5)}", 1),
        ("(3, 5)", r"\boxed{(5,3)}", 0),
        ("B", r"\boxed{\text{B}}", 1),
        ("B", r"#### A and B", 0),
        ("B", "", 0),
        (r"\frac{x}{2}", r"\boxed{\dfrac{x}{2}}", 1),
        ("2 km and 3 km", "#### 2 km and 3 km", 1),
    ],
)
def test_a_reference_that_is_no_number_is_compared_as_text(reference, text, want):
    assert one(text, reference) == want


@pytest.mark.parametrize(
    "reference",
    ["It is 70+2=<<70+2=72>>72.\n#### 72", r"so \boxed{72}", 72, 72.0, "72"],
)
def test_the_reference_may_be_a_solution_or_a_number(reference):
    assert one("#### 72", reference) == 1
    assert one("#### 73", reference) == 0


def test_each_row_has_its_own_reference_in_the_column():
    texts = [["#### 1", "#### 2"], ["#### 1", "#### 2"]]
    got = final_answer.reward(texts, [{"x": "1"}, {"x": 2}], column="x")
    np.testing.assert_array_equal(got, [[1, 0], [0, 1]])
    with pytest.raises(
        ValueError, match=r"row 1 has no column 'answer'; it has \['x'\]"
    ):
        final_answer.reward(texts, [{"answer": 1}, {"x": 2}])
    for empty in ("", "  ", None, "#### "):
        with pytest.raises(ValueError, match=r"'answer' of row 0 is empty"):
            final_answer.reward(texts[:1], [{"answer": empty}])


def test_a_run_loads_it_and_hands_it_the_rows(make_batch):
    judge = rewards.load({"name": "final_answer", "accept": ("hash",), "format": 0.5})
    batch = make_batch(2, 2, 16)._replace(extra={"row": np.array([1, 0], np.int32)})
    rows = [Example("a", "p", [], (), {"answer": "1"}), Example("b", "p", [], (), {"answer": 2})]  # fmt: skip
    texts = [["#### 2", "2"], ["#### 2", "#### 1"]]
    got = rewards.call(judge, batch, texts, {}, examples=rows)
    np.testing.assert_array_equal(got, [[1.5, 0], [0.5, 1.5]])


def test_equal_answers_have_one_text_for_a_vote():
    for text in ("#### 1/2", "#### 0.50", r"\boxed{\frac{2}{4}}", "I say .5"):
        assert final_answer.answer(text) == "1/2"
    assert final_answer.answer("#### 1,234") == "1234"
    assert final_answer.answer("no idea") is None
    assert final_answer.answer("#### 1 or 2") is None
    assert final_answer.answer("#### Tuesday ", numeric=False) == "tuesday"
    assert final_answer.answer("Tuesday", numeric=False) is None


PARTS = [
    "1", "1,", "1,111", "1.", "1/", "1 ", "1 1/", "-", "--1", "1e", "1e1", "#", "####",
    "#### ", "####\n", "#### 1", r"\boxed{", r"\boxed{1}", "{", "}", r"\frac{", r"\frac1",
    r"\frac{1}{", r"\text{", r"\text{1} ", "<<", "<<1", "<a", " ", "\n", "$", "$-", "%",
    "1%", "1 per", "x10^", "1 x 10^1", "^2", "a^2", "½", "\u2009", "1\u2009111", "=", "1=",
    "\\", "*", "_1", "９", "1/1/", "1 1 ", ". ", ".1",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_hostile_text_takes_linear_time(part):
    """As a whole, behind a mark, in a box, and with a tail that no pattern likes."""
    long = part * (100_000 // len(part))
    texts = [
        long,
        f"#### {long}",
        rf"\boxed{{{long}}}",
        f"{long}!x",
        f"1{long}z #### 5",
    ]
    begin = time.process_time()
    final_answer.reward([texts], [{"answer": "5"}], format=1.0)
    assert time.process_time() - begin < 5


def test_no_text_raises_or_gives_another_number():
    rng = np.random.default_rng(0)
    parts = [*PARTS, *RIGHT, *WRONG]
    for _ in range(500):
        text = "".join(rng.choice(parts, size=rng.integers(1, 8)).tolist())
        assert one(text, "5") in (0, 1)
        assert one(text, "Tuesday") in (0, 1)
