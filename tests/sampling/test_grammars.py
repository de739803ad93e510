"""Grammars from regular expressions and JSON schemas: against `re` and `json`, exhaustively."""

import itertools
import json
import re

import jax
import numpy as np
import pytest

from alignax.sampling import decode, grammars, stops
from alignax.text import tokenizer

# whole and joined characters, none, a part of a character (id 6), EOS (id 5), two bytes
PIECES = [b"a", b"b", b"ab", b"ba", b"c", b"", b"\xff", "é".encode(), b"\n", b"b\nc"]
EOS = 5
PATTERNS = [
    "a*b", "(ab|c)+", "^a{2,3}$", "[^c]*", "(?i)A?b", "a|", "^(a|b)*c$", "\\w+\n?",
    "(a|b)*a(a|b){2}", "(?:é|ba)+?", "(?s).{2}", "(a*)*b", "^(ab$|c)",
]  # fmt: skip


def ends(grammar, sequence):
    """Whether a response may be these tokens and EOS."""
    state = 0
    for v in (*sequence, EOS):
        if not grammar.flag[state, v]:
            return False
        state = grammar.next[state, v]
    return True


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_responses_that_end_are_those_that_match(pattern):
    grammar = grammars.regex(pattern, PIECES, [EOS])
    seen = 0
    for n in range(5):
        for tokens in itertools.product([v for v in range(10) if v != EOS], repeat=n):
            text = b"".join(PIECES[v] for v in tokens).decode(errors="replace")
            wanted = 6 not in tokens and re.fullmatch(pattern, text) is not None
            assert ends(grammar, tokens) == wanted, (tokens, text)
            seen += wanted
    assert seen > 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_response_can_always_go_on_to_its_end(pattern):
    grammar = grammars.regex(pattern, PIECES, [EOS])
    rng = np.random.default_rng(0)
    for _ in range(20):
        state, left = 0, 0
        while left < 200:
            allowed = np.flatnonzero(grammar.flag[state])
            assert allowed.size
            assert not {6} & {*allowed.tolist()}
            v = EOS if EOS in allowed and left > 3 else rng.choice(allowed)
            if v == EOS:
                break
            state, left = grammar.next[state, v], left + 1


def test_what_no_token_goes_on_from_is_not_begun():
    """There is no token 'b': after 'a' only 'bc' could follow, which does not fit."""
    grammar = grammars.regex("ab|c", [b"a", b"bc", b"c", b""], [3])
    assert grammar.flag[0].tolist() == [False, False, True, False]


def test_states_are_the_fewest():
    """(a|b)*a(a|b){n} needs 2**(n + 1) states, and one that is dead."""
    for n in range(5):
        grammar = grammars.regex(f"(a|b)*a(a|b){{{n}}}", [b"a", b"b", b""], [2])
        assert len(grammar.next) == 2 ** (n + 1) + 1
    assert len(grammars.regex("a|aa|aaa|a{4,}", PIECES, [EOS]).next) == 3


@pytest.mark.parametrize(("pattern", "words"), [
    ("(", "no regular expression"), (r"a\bb", "has no"), ("(?m)^a$", "has no"),
    ("(?=a)b", "lookahead"), ("[x-z]+", "no text of the tokenizer"), ("a^b", "no text"),
    ("(a|b)*a(a|b){13}", "more than 4096 states"),
])  # fmt: skip
def test_patterns_that_are_no_grammar_are_refused(pattern, words):
    with pytest.raises(ValueError, match=f"mine: .*{words}"):
        grammars.regex(pattern, PIECES, [EOS], "mine")


def test_a_table_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(grammars, "CELLS", 200)
    assert len(grammars.regex("[ab]{1,18}", PIECES, [EOS]).next) == 20
    with pytest.raises(ValueError, match=r"has 21 states.* at most 20 fit"):
        grammars.regex("[ab]{1,19}", PIECES, [EOS])


ADDRESS = {
    "type": "object", "properties": {"zip": {"type": "integer"}, "c/o": {"type": "string"}},
    "required": ["zip"], "additionalProperties": False,
}  # fmt: skip
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A person",
    "type": "object", "required": ["name", "score"], "$defs": {"address~": ADDRESS},
    "properties": {
        "nick": {"type": "string", "minLength": 1, "maxLength": 3},
        "name": {"type": "string", "description": "whole"},
        "tags": {"type": "array", "items": {"enum": ["a", 'b"c', "é", 1.5, None]}, "maxItems": 2},
        "at": {"type": "array", "items": {"$ref": "#/$defs/address~0"}, "minItems": 2},
        "score": {"anyOf": [{"type": ["number", "null"]}, {"const": "(none)"}]},
        "ok": {"type": "boolean"},
    },
}  # fmt: skip


def check_person(x):
    assert list(x) == [k for k in SCHEMA["properties"] if k in x]  # in their order
    assert {"name", "score"} <= set(x)
    assert 1 <= len(x.get("nick", "abc")) <= 3
    assert len(x.get("tags", ())) <= 2
    assert all(t in ("a", 'b"c', "é", 1.5, None) for t in x.get("tags", ()))
    assert len(x.get("at", "ab")) >= 2
    for a in x.get("at", ()):
        assert isinstance(a["zip"], int)
        assert isinstance(a.get("c/o", ""), str)
        assert set(a) <= {"zip", "c/o"}
    assert (
        x["score"] is None
        or x["score"] == "(none)"
        or isinstance(x["score"], int | float)
    )
    assert isinstance(x.get("ok", True), bool)


def test_random_walks_are_json_of_the_schema():
    text = tokenizer.load("bytes")
    size = 260
    pieces = stops.pieces(text, size)
    eos = sorted(text.eos_ids)
    grammar = grammars.regex(grammars.json_schema(SCHEMA), pieces, eos)
    rng, finished, keys = np.random.default_rng(1), 0, set()
    for _ in range(400):
        state, ids = 0, []
        while len(ids) < 400:
            allowed = np.flatnonzero(grammar.flag[state])
            quote = np.flatnonzero([pieces[v] in (b'"', b"]") for v in allowed])
            v = (
                allowed[quote[0]]
                if len(quote) and rng.random() < 0.5
                else rng.choice(allowed)
            )
            if v in eos:
                found = json.loads(b"".join(pieces[v] for v in ids))
                check_person(found)
                finished, keys = finished + 1, keys | set(found)
                break
            ids.append(int(v))
            state = grammar.next[state, v]
    assert finished > 50
    assert keys == set(SCHEMA["properties"])


def valid(x):
    """Of the schema, written from Python's values."""
    return [
        json.dumps(x),
        json.dumps(x, separators=(",", ":")),
        json.dumps(x, ensure_ascii=False),
    ]


@pytest.mark.parametrize("x", [
    {"name": "", "score": 0}, {"name": 'a"\\\n é', "score": -1.5e-7, "ok": False},
    {"nick": "ab", "name": "x", "tags": [], "score": None},
    {"name": "x", "tags": ["é", 1.5], "at": [{"zip": 1, "c/o": "y"}, {"zip": -20}], "score": "(none)"},
])  # fmt: skip
def test_what_json_dumps_writes_is_in_the_grammar(x):
    pattern = grammars.json_schema(SCHEMA)
    texts = (
        valid(x)[:2] if "é" not in json.dumps(x, ensure_ascii=False) else valid(x)[2:]
    )
    for text in texts:
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("x", [
    {"score": 0}, {"name": "x"}, {"score": 0, "name": "x"}, {"name": "x", "score": "0"},
    {"name": "x", "score": 0, "ok": 1}, {"name": "x", "score": 0, "other": 1}, [],
    {"nick": "", "name": "x", "score": 0}, {"nick": "abcd", "name": "x", "score": 0},
    {"name": "x", "at": [{"zip": 1}], "score": 0}, {"name": "x", "tags": ["b"], "score": 0},
    {"name": "x", "tags": ["a", "a", "a"], "score": 0},
    {"name": "x", "at": [{"zip": 1}, {"c/o": "y"}], "score": 0},
])  # fmt: skip
def test_what_the_schema_rejects_is_not(x):
    assert not re.fullmatch(grammars.json_schema(SCHEMA), json.dumps(x))


@pytest.mark.parametrize(("schema", "words"), [
    ({"type": "object"}, "needs `properties`"), ({"type": "array"}, "needs `items`"),
    ({"oneOf": [{"type": "null"}]}, "None is not supported"), ({"type": "any"}, "'any'"),
    ({"type": "object", "properties": ["a"]}, "needs `properties`"), ({"enum": 5}, "`enum` is 5"),
    ({"anyOf": 5}, "`anyOf` is 5"), ({"type": {"a": 1}}, "type {'a': 1} is not"),
    ({"properties": {"a": {"type": "null"}}, "required": True}, "`required` is True"),
    ({"properties": {"a": {"type": "null"}}, "required": "a"}, "`required` is 'a'"),
    ({"type": "integer", "enum": ["a", True]}, "at least one value"), ({"type": [[]]}, "type"),
    ({"enum": [float("nan")]}, "no JSON"), ({"$ref": "#foo"}, "not within the schema"),
    ({"type": ["null", "boolean"], "minLength": 2}, "'minLength' is not supported"),
    ({"type": "string", "pattern": "a"}, "'pattern' is not supported"),
    ({"type": "integer", "minimum": 0}, "'minimum' is not supported"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength=3 is above"),
    ({"type": "string", "maxLength": True}, "maxLength is True"), (3, "3 is no schema"),
    ({"enum": []}, "at least one value"), ({"$ref": "other.json"}, "not within the schema"),
    ({"$ref": "#/$defs/x"}, r"no '\$defs'"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"anyOf": [{"$ref": "#/$defs/x"}]}}}, "contains itself"),
    ({"properties": {"a": {"type": "null"}}, "required": ["b"]}, "`required` has 'b'"),
])  # fmt: skip
def test_schemas_that_are_not_supported_are_refused_by_name(schema, words):
    with pytest.raises(ValueError, match=words):
        grammars.json_schema(schema)


def test_keys_of_a_type_among_several_and_types_of_constants():
    pattern = grammars.json_schema({"type": ["string", "null"], "minLength": 2})
    assert [bool(re.fullmatch(pattern, x)) for x in ('"ab"', '"a"', "null")] == [
        True,
        False,
        True,
    ]
    values = ["a", 1, 1.5, True, None, [1], {"b": 2}]
    of = {
        "string": "a",
        "number": 1.5,
        "boolean": True,
        "null": None,
        "array": [1],
        "object": {"b": 2},
    }
    for kind, value in of.items():
        pattern = grammars.json_schema({"type": kind, "enum": values})
        found = [v for v in values if re.fullmatch(pattern, json.dumps(v))]
        assert found == ([1, 1.5] if kind == "number" else [value])
    integers = grammars.json_schema({"type": "integer", "enum": values})
    assert [v for v in values if re.fullmatch(integers, json.dumps(v))] == [1]


def test_a_schema_of_a_file_is_named_and_its_content_is_its_identity(
    tmp_path, monkeypatch
):
    path = tmp_path / "answer.json"
    path.write_text('{"type": "boolean"}')
    first = grammars.load(f"json_schema:{path}")
    path.write_text('{"type": "null"}')
    assert grammars.load(f"json_schema:{path}").identity != first.identity
    path.write_text('{"type": "boolean", "title": "T"}')
    assert grammars.load(f"json_schema:{path}").identity == first.identity
    for content, words in (
        ('{"type": ', "is not JSON"),
        ('{"type": "x"}', "'x'"),
        ("[" * 10**5, ""),
    ):
        path.write_text(content)
        with pytest.raises(
            ValueError, match=f"generate.grammar: {re.escape(str(path))}.*{words}"
        ):
            grammars.load(f"json_schema:{path}", "generate.grammar")
    with pytest.raises(ValueError, match=r"generate.grammar: .*lookahead"):
        grammars.load("regex:(?=a)", "generate.grammar")
    with pytest.raises(ValueError, match=r"generate.grammar is 'none.such'"):
        grammars.load("none.such", "generate.grammar")
    for missing in ("absent.json", ""):
        where = f"{tmp_path}/{missing}" if missing else ""
        with pytest.raises(OSError, match=f"grammar: cannot read .*{missing}"):
            grammars.load(f"json_schema:{where}", "generate.grammar")
    monkeypatch.setenv("HOME", str(tmp_path))
    path.write_text('{"type": "null"}')
    assert grammars.load("json_schema:~/answer.json").build([b"null", b""], [1])


def test_samples_have_the_models_distribution_over_what_is_allowed(tiny_lm):
    """Of all responses to (ab|c)(d|e), enumerated: the product of renormalised steps."""
    size = tiny_lm.config.vocab_size
    letters = {v: bytes([96 + v]) for v in range(1, 6)} | {6: b"ab"}
    pieces = [letters.get(v, b"") for v in range(size)]
    grammar = grammars.regex("(ab|c)(d|e)", pieces, [0])
    n, prompt = 400, np.array([[7, 8, 9]])
    out = decode.generate(
        tiny_lm, prompt, np.array([3]), jax.random.key(0), max_new=4, group=n, eos_ids=[0],
        grammar=grammar,
    )  # fmt: skip
    tokens, mask = np.asarray(out.batch.tokens[0]), np.asarray(out.batch.mask[0])
    texts = [
        b"".join(pieces[v] for v in t[m]) for t, m in zip(tokens, mask, strict=True)
    ]
    assert {*texts} == {b"abd", b"abe", b"cd", b"ce"}
    assert not np.asarray(out.truncated).any()
    sums = np.asarray(out.batch.old_logps[0]).sum(-1)
    by_tokens = {tuple(t[m]): s for t, m, s in zip(tokens, mask, sums, strict=True)}
    assert len(by_tokens) == 6  # 'ab' is one token or two
    np.testing.assert_allclose(
        sum(np.exp(s) for s in by_tokens.values()), 1.0, rtol=1e-4
    )
    for ids, logp in by_tokens.items():
        share = np.mean([tuple(t[m]) == ids for t, m in zip(tokens, mask, strict=True)])
        p = np.exp(logp)
        assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / n) + 1e-6
