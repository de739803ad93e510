"""Strings, special tokens and ids as stops: the same while decoding and in the finished text."""

import json

import numpy as np
import pytest
import tiny

from alignax.respond import output, respond
from alignax.sampling import stops
from alignax.text import tokenizer

pytestmark = pytest.mark.slow

BYTES = tokenizer.load("bytes")
EOS, PAD = 257, 258
FAMILIES = ("chatml", "llama2", "llama3", "gemma", "channel")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return lambda name: tokenizer.load(tiny.family(name, folder))


def first(table, ids, least=0):
    """Tokens of a response up to the one that stops it; 0 if none does."""
    state = 0
    for n, token in enumerate(ids, 1):
        if table.flag[state, token] and n >= least:
            return n
        state = int(table.next[state, token])
    return 0


def table(text, wanted):
    return stops.table(stops.parse(wanted, text), stops.pieces(text, text.vocab_size))


KINDS = {  # stops, ids of a response: (tokens up to the stop, text in front of it)
    "special": ("<pad>", [97, PAD, 98], (2, "a")),
    "its id": (PAD, [97, PAD, 98], (2, "a")),
    "several": ([EOS, "<pad>", "x"], [97, PAD, 98], (2, "a")),
    "an ordinary id": ([98], [97, PAD, 98, 99], (3, "a")),
    "its characters": ("<pad>", [97, *b"<pad>", 98], (6, "a")),
    "text, then special": ("a<pad>", [97, 97, PAD], (3, "a")),
    "special, then text": ("<pad>\nb", [97, PAD, 10, 98], (4, "a")),
    "two specials": ("<pad><bos>", [97, 256, PAD, 256], (4, "a")),
    "another special between": ("a<pad>", [97, 256, PAD, 98], (3, "")),
    "text around one that is not named": ("ab", [99, 97, PAD, 98], (4, "c")),
    "text alone beside a special stop": (["ab", "x<pad>"], [97, PAD, 98], (3, "")),
    "not the text in front": ("b<pad>", [97, PAD, 98], (0, "ab")),
    "text of the name alone": (["pad", "<bos>"], [97, PAD, 98], (0, "ab")),
    "one inside another": (["abc", "b"], [*b"xabcd"], (3, "xa")),
    "one begins another": (["abc", "ab"], [*b"xabcd"], (3, "x")),
    "two that end together": (["b", "xab"], [*b"xabcd"], (3, "")),
    "the longer one is broken off": (["abcd", "bx"], [*b"abcbx"], (5, "abc")),
    "an id inside a string": (["abc", 98], [*b"xabcd"], (3, "xa")),
    "a special inside a string": (["a<pad>b", PAD], [120, 97, PAD, 98], (3, "xa")),
    "not in the order": ("<pad>\n", [97, 10, PAD, 98], (0, "a\nb")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_is_found_while_decoding_and_in_the_finished_text(kind):
    wanted, ids, (n, text) = KINDS[kind]
    assert first(table(BYTES, wanted), ids) == n
    got = output.response(ids, True, BYTES, stops=wanted)
    assert got == (text, n or len(ids), "stop" if n else "length")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_special_token_of_a_tokenizer_is_a_stop(family, load):
    text = load(family)
    words = text.encode("One word")
    for name, i in text.hidden.items():
        ids = [*words, i, *words]
        for wanted in (name, i, "word" + name, name + "One"):
            if wanted == name + "One" and text.encode("One") != words[: len(text.encode("One"))]:  # fmt: skip
                continue
            shown = text.decode(words)
            got = output.response(ids, True, text, stops=wanted)
            cut = shown.removesuffix("word") if wanted == "word" + name else shown
            assert (got.text, got.finish) == (cut, "stop"), wanted
            assert got.tokens == first(table(text, wanted), ids) > len(words)
    assert len(text.hidden) >= 2


def test_stops_at_random_are_the_same_in_both_places():
    rng, found = np.random.default_rng(0), 0
    some = [97, 98, 256, PAD]
    names = {97: "a", 98: "b", 256: "<bos>", PAD: "<pad>"}
    for _ in range(300):
        wanted = [
            "".join(names[i] for i in rng.choice(some, rng.integers(1, 4)).tolist())
            for _ in range(rng.integers(1, 4))
        ]
        wanted += rng.choice(some, rng.integers(0, 2)).tolist()
        ids = rng.choice(some, 8).tolist()
        n = first(table(BYTES, wanted), ids)
        got = output.response(ids[: n or None], not n, BYTES, stops=wanted)
        assert got.finish == ("stop" if n else "length"), (wanted, ids)
        assert output.response(ids, True, BYTES, stops=wanted).tokens == (n or 8)
        found += n > 0
    assert 100 < found < 300


def nested(rng, shown):
    """Stops of a text: parts of it, parts of these, and text that is not in it."""
    out = []
    for _ in range(rng.integers(1, 4)):
        at, size = rng.integers(0, len(shown)), rng.integers(1, 7)
        out.append(shown[at : at + size])
        if len(out[-1]) > 2 and rng.random() < 0.6:
            out.append(out[-1][1:-1])
        if rng.random() < 0.3:
            out.append(out[-1] + "~")
    return out


TEXTS = (
    "Hello world, the answer is fine.\n\nZürich ist schön 😀 and so on",
    "  two blanks\n###\nUser: What's up? aaabbbabcabab",
)


@pytest.mark.parametrize("family", ["bytes", *FAMILIES])
def test_both_places_cut_stops_that_nest_at_the_same_character(family, load):
    """Sampling that ended at a stop, and sampling that went on: one text, one finish."""
    text, rng = load(family) if family != "bytes" else BYTES, np.random.default_rng(1)
    found = 0
    every = stops.pieces(text, text.vocab_size)
    for trial in range(80):
        ids = text.encode(TEXTS[trial % 2])
        ids = ids[rng.integers(0, len(ids) // 2) :][:20]
        if trial % 3 == 0:
            rng.shuffle(ids)
        wanted = nested(rng, " " + text.decode(ids))
        least = int(rng.integers(0, 4)) if trial % 4 == 0 else 0
        given = text.encode("So it") if trial % 5 == 0 else []
        groups = stops.parse(wanted, text)
        n = first(stops.table(groups, every), ids, least)
        assert stops.end(groups, text, ids, min_new=least) == n, (wanted, ids)
        asked = {"stops": wanted, "given": given, "min_new": least}
        went_on = output.response(ids, True, text, **asked)
        ended = output.response(ids[:n] if n else ids, not n, text, **asked)
        assert ended == went_on, (wanted, ids)
        if n:
            found += 1
            assert went_on.finish == "stop"
            assert (
                0 < went_on.tokens <= n
            )  # fewer where tokens are parts of a character
            tail = text.decode([*given, *ids[:n]])[len(went_on.text) :]
            front = text.encode("a")  # the blank that begins a text may be dropped
            blank = text.decode([*front, *ids[:n]])[1:]
            assert any(tail.startswith(w) or blank.startswith(w) for w in wanted)
    assert found > 30


def test_a_blank_that_a_tokenizer_drops_is_a_part_of_stops(load):
    """The token has it, and so has the text behind a prefill."""
    text = load("llama2")
    ids = text.encode("Hello world")
    assert text.decode(ids) == "Hello world"
    for given, wanted, shown in (
        ([], " Hello", ""), ([], "Hello", ""), ([], " ", ""), ([], "llo", "He"),
        (text.encode("So"), " Hello", "So"), (text.encode("So"), "Hello", "So "),
    ):  # fmt: skip
        got = output.response(ids, True, text, stops=wanted, given=given)
        assert (got.text, got.finish) == (shown, "stop"), (given, wanted)
        n = first(table(text, wanted), ids)
        assert output.response(ids[:n], False, text, stops=wanted, given=given) == got


def test_a_special_stop_that_comes_too_early_or_in_the_prefill_does_not_count():
    ids = [97, PAD, 98, PAD]
    got = output.response(ids, True, BYTES, stops="<pad>", min_new=3)
    assert got == ("ab", 4, "stop")
    assert output.response(ids, True, BYTES, stops=PAD, min_new=3) == got
    given = [120, PAD]
    got = output.response([97, 98], True, BYTES, given=given, stops=["<pad>", "xa"])
    assert got == ("xab", 2, "length")
    got = output.response(ids, True, BYTES, given=given, stops=["<pad>"])
    assert got == ("xa", 2, "stop")


WRONG = ("", [""], ["a", ""], [259], -1, [True], [None], ["a", 1.5], [["a"]])


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_stop_is_refused(wrong):
    with pytest.raises(ValueError, match=r"stops has .* or ids 0\.\.258"):
        stops.parse(wrong, BYTES)


# -- every way to respond

WAYS = {
    "sampled": {},
    "greedy": {"generate.temperature": 0.0},
    "drafted": {"generate.draft": "ngram"},
    "drafted by layers": {"generate.draft": "layers:1", "generate.rule": "token"},
    "guided": {"method": "proxy"},
    "best_of_n": {"method": "best_of_n", "decoder.n": 2},
}
SEARCHES = {
    "deal": {"decoder.top_k": 2, "decoder.lookahead": 2},
    "rain": {"decoder.simulations": 3, "decoder.rollout": 2},
    "nudging_words": {"decoder.nudge": "target"},
}


def answered(c, folder):
    assert respond.respond(c, str(folder))
    return [json.loads(x) for x in (folder / respond.NAME).read_text().splitlines()]


# every way with one stop, and every stop where a token is sampled or drafted
STOPPED = [
    *((way, "<pad>") for way in WAYS), ("sampled", PAD), ("sampled", "<pad><pad>"),
    ("drafted", "<pad><pad>"), ("best_of_n", PAD),
]  # fmt: skip


@pytest.mark.parametrize("way, stop", STOPPED)
def test_every_way_to_respond_stops_at_a_special_token(tmp_path, way, stop):
    changes = dict(WAYS[way])
    method = changes.pop("method", "")
    c = tiny.to_respond(tmp_path, method, ["Say", "Two?"], **changes)
    c.generate.group, c.generate.stops = 1, (stop,)
    c.generate.logit_bias = ((PAD, 1000.0),)
    for row in answered(c, tmp_path / "run"):
        assert row["finish"] == ["stop"]
        assert row["tokens"][0] == (2 if stop == "<pad><pad>" else 1) or method
        assert row["responses"] == [""]


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_is_cut_at_ids(tmp_path, method):
    c = tiny.to_respond(tmp_path, method, ["Say", "Two?"], **SEARCHES[method])
    c.generate.group, c.generate.max_new = 1, 12
    if method == "rain":  # a judge that the cut does not concern
        c.generate.reward = {"name": "constraints", "max_words": 1000}
    free = answered(c, tmp_path / "free")
    stop = ord(next(x for r in free for x in r["responses"][0] if ord(x) < 128))
    c.generate.stops = (stop,)
    cut = answered(c, tmp_path / "cut")
    assert [r["responses"][0].split(chr(stop))[0] for r in free] == [
        r["responses"][0] for r in cut
    ]
    assert ["stop"] in [r["finish"] for r in cut]


@pytest.mark.parametrize("seed", [0, 2])
def test_sampling_and_a_search_write_the_same_where_stops_nest(tmp_path, seed):
    """DeAL without weight is greedy, but what it draws is cut afterwards."""

    def run(name, method="", wanted=(), **changes):
        c = tiny.to_respond(tmp_path, method, ["Say", "Two?"], **changes)
        c.generate.temperature, c.generate.max_new = 0.0, 12
        c.generate.group, c.generate.stops, c.seed = 1, wanted, seed
        return [
            [row[k] for k in ("responses", "finish", "tokens")]
            for row in answered(c, tmp_path / name)
        ]

    free = [row[0][0] for row in run("free")]
    shown = max((x for text in free for x in text.split("\ufffd")), key=len)
    assert len(shown) >= 3
    # the first ends behind the second, which is inside it
    wanted = (shown[:3], shown[1], shown[:2] + "~")
    plain = run("plain", wanted=wanted)
    search = {"decoder.lam": 0.0, "decoder.top_k": 2, "decoder.lookahead": 2}
    assert run("deal", "deal", wanted, **search) == plain
    assert "stop" in [finish for _, (finish,), _ in plain]


def test_a_decoder_that_exchanges_text_refuses_special_stops(tmp_path):
    c = tiny.to_respond(tmp_path, "nudging_words")
    c.generate.group, c.generate.stops = 1, ("x", "\n<pad>")
    with pytest.raises(ValueError, match=r"nudging_words exchanges text.*leave '<pad>' out"):  # fmt: skip
        respond.respond(c, str(tmp_path / "run"))
