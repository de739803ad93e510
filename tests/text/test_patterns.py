"""Linear regular expressions: as `re.search` says, and at once."""

import random
import re
import time

import pytest

from alignax.text import patterns

PATTERNS = [
    r"abc", r"^abc$", r"[.!?]\s*$", r"\bcat\b", r"\Bcat", r"a|b|", r"(a|b)*c", r"(?i)HeLLo",
    r"(?i:x)Y", r"(?i)a(?-i:x)", r"a{2,3}b", r"a{3}", r"a{,2}b", r"a{2,}?$", r"(a*)*b", r"(a+)+$",
    r"[^a-c\d]", r"[\w-]+@[\w-]+\.com", r"\d+(?:,\d{3})*", r".", r"(?s).\n.", r"a.b",
    r"(?m)^b$", r"(?m)a$", r"\Aa\Z", r"(?P<n>a)b", r"\s\S\d\D\w\W", r"(?a)\w", r"é", r"[à-ü]",
    r"(?x) a b # c", r"", r"$", r"^", r"\b", r"(?:a|ab)(?:c|bcd)", r"[^\n]*x", r"\$5\.00",
    r"(?i)[a-z]ß", r"(?i)ſ", r"x*?y", r"(|a)+b", r"[]a]", r"[a\]]", "\n", r"\\", r"(?i)K",
]  # fmt: skip
LETTERS = "abcx yY1,.!\n-@éKß\u212a$5"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_found_where_re_finds_it(pattern):
    rng = random.Random(pattern)
    compiled, wanted = patterns.compile(pattern), re.compile(pattern)
    texts = ["", "\n", "abc", "abc\n", "cat", "concat cat", "HELLO", "xY", "a@b.com", "$5.00", "abcd"]  # fmt: skip
    texts += ["".join(rng.choices(LETTERS, k=rng.randrange(12))) for _ in range(300)]
    for text in texts:
        assert compiled.search(text) == bool(wanted.search(text)), text


def random_pattern(rng, depth=3):
    if not depth or rng.random() < 0.3:
        return rng.choice(
            ["a", "b", "c", ".", "[ab]", "[^a]", r"\b", "^", "$", r"\w", ""]
        )
    kind = rng.randrange(4)
    one, two = random_pattern(rng, depth - 1), random_pattern(rng, depth - 1)
    repeat = rng.choice(["*", "+", "?", "{2}", "{1,2}", "*?", "{2,}"])
    return [one + two, f"(?:{one}|{two})", f"(?:{one}){repeat}", one][kind]


def test_random_patterns_are_found_where_re_finds_them():
    rng = random.Random(0)
    for _ in range(400):
        pattern = random_pattern(rng)
        compiled, wanted = patterns.compile(pattern), re.compile(pattern)
        for _ in range(10):
            text = "".join(rng.choices("abc \n", k=rng.randrange(8)))
            assert compiled.search(text) == bool(wanted.search(text)), (pattern, text)


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+b", r"(a|a)*b", r"(a|aa)+$b", r"^(a*)*$b", r"(.*)*x", r"a*a*a*a*a*a*b", r"(.*a){11}b",
     r"(\w+\s?)*!", r"(x+x+)+y|(a+a+)+b", r"(?:a?){30}a{30}b"],
)  # fmt: skip
def test_patterns_for_which_backtracking_explodes_end(pattern):
    compiled = patterns.compile(pattern)
    begin = time.process_time()
    assert not compiled.search("a" * 5000)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            r"(?=a)b",
            "a lookahead or lookbehind, which cannot be matched in linear time",
        ),
        (r"(?<!a)b", "a lookahead or lookbehind"),
        (r"(a)\1", "a reference to a group"),
        (r"(a)?(?(1)b|c)", "a reference to a group"),
        (r"(?>a*)b", "an atomic group"),
        (r"a*+b", "a possessive repeat"),
        (r"(a", "is no regular expression: missing"),
        (r"[", "is no regular expression"),
        (r"(?:a{100}){100}", "more than 2000 steps"),
        (r"(?:){999999999}", "more than 2000 steps"),
        (r"((a{50}){50}){50}", "more than 2000 steps"),
    ],
)
def test_what_has_no_linear_time_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        patterns.compile(pattern)
