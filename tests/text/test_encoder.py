"""Segments have the ids of the whole text, in their places; control tokens can be text."""

import bisect
import json
import random
import time

import chat_families as families
import pytest
import tokenizers
from chat_families import FAMILIES
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from alignax.text.encoder import (
    PRIVATE,
    Encoded,
    Encoder,
    FunctionEncoder,
    Key,
    Segment,
)

MANY = 2000
WORDS = ["Hello", "two", "é", "東京", "a\u0301", " ", "  ", "\n", "\n\n", "\t", "x", ".", "1", "▁", "<", "|>",
         "\u00a0", "\u2028", "\U0001f469\u200d\U0001f467", "<0x41>", "_", "A"]  # fmt: skip


def bpe(*, flags=(), normalizer=None, pre=None):
    """Characters with bytes to fall back on, and added tokens with these flags."""
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    for c in "Helotwx \n.1▁aé":
        vocab.setdefault(c, len(vocab))
    made = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer, made.pre_tokenizer = normalizer, pre
    for name in ("<s>", "</s>", "<|a|>", "<|ab|>", "<|word"):
        made.add_special_tokens([AddedToken(name, special=True, **dict(flags))])
    made.add_tokens([AddedToken("<tool>", **dict(flags)), AddedToken("\n\n")])
    return made


MADE = {
    "plain": {},
    "lstrip": {"flags": [("lstrip", True)]},
    "rstrip": {"flags": [("rstrip", True)]},
    "both": {"flags": [("lstrip", True), ("rstrip", True)]},
    "single_word": {"flags": [("single_word", True)]},
    "lstrip_word": {"flags": [("lstrip", True), ("single_word", True)]},
    "normalized": {"flags": [("normalized", True)], "normalizer": normalizers.NFC()},
    "lowercase": {"flags": [("normalized", True)], "normalizer": normalizers.Lowercase()},
    "prepend": {
        "normalizer": normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    },
    "first": {"pre": pre_tokenizers.Metaspace("▁", "first", split=False)},
    "always": {"pre": pre_tokenizers.Metaspace("▁", "always", split=False)},
    "nfkc": {"normalizer": normalizers.NFKC()},
}  # fmt: skip
TEMPLATE = "<tool> <think> </think> <tool_call>"
_kept = {}


def encoder(name):
    """(encoder, the tokenizer itself)."""
    if name not in _kept:
        if name in MADE:
            core = bpe(**MADE[name])
            ends = {core.token_to_id("</s>")}
            found = Encoder(core, TEMPLATE, ends, core.token_to_id("<s>"))
        else:
            found = families.load(name).encoder
            core = tokenizers.Tokenizer.from_str(found._core.to_str())
        _kept[name] = found, core
    return _kept[name]


ALL = [*FAMILIES, *MADE]


def random_texts(name, seed=0, many=MANY):
    control = list(encoder(name)[0].control)
    rng = random.Random(seed)
    pieces = [
        *WORDS,
        *control,
        *(c[:-1] for c in control),
        *(c.upper() for c in control),
    ]
    for _ in range(many):
        yield "".join(rng.choice(pieces) for _ in range(rng.randrange(9)))


def ids(core, text):
    return core.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ALL)
def test_segments_have_the_ids_of_the_whole(name):
    one, core = encoder(name)
    texts = list(random_texts(name))
    one.prefetch(s.key for text in texts for s in one.split(text))
    whole = core.encode_batch(texts, add_special_tokens=False)
    for text, expected in zip(texts, whole, strict=True):
        assert one.encode(text).ids == expected.ids, repr(text)


def in_place(one, text, got, protected=(), inserts=()):
    """By brute force: indices by the places of all ids."""
    segments = one.split(text, protected, inserts)
    starts = {s.start: k for k, s in reversed(list(enumerate(segments)))}
    for place in range(len(text) + 1):
        if place in starts:
            k = sum(len(one.ids(s.key)) for s in segments[: starts[place]])
        else:
            k = bisect.bisect_right([b for _, b in got.places()], place)
        yield place, k


@pytest.mark.parametrize("name", ALL)
def test_the_index_of_a_place_is_that_by_the_offsets(name):
    one, _ = encoder(name)
    for text in random_texts(name, 1, 6):
        got = one.encode(text)
        for place, k in in_place(one, text, got):
            found = got.index(place)
            # The ids of the text up to the place tell more than offsets do, where a token
            # owns blanks, or unknown characters have one place in common.
            exact = found > k and got.ids[:found] == one.encode(text[:place]).ids
            assert found == k or exact, (text, place, got.places())


@pytest.mark.parametrize("name", ALL)
def test_places_are_in_order_within_the_text(name):
    one, _ = encoder(name)
    for text in random_texts(name, 2, 50):
        got = one.encode(text)
        places = got.places()
        assert len(places) == len(got.ids)
        assert places == sorted(places)
        assert all(0 <= a <= b <= len(text) for a, b in places)
        for token, (a, b) in zip(got.ids, places, strict=True):
            written = one._names.get(token)
            if written is not None and not one._loose:
                assert text[a:b].strip() == written.strip()


def spots(rng, text):
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text) + 1, 4)))
    return [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]


@pytest.mark.parametrize("name", ALL)
def test_protected_text_has_no_control_ids(name):
    one, core = encoder(name)
    rng, control = random.Random(3), set(one.control.values())
    hidden = 0
    for text in random_texts(name, 3, 200):
        protected = spots(rng, text)
        got = one.encode(text, protected)
        for token, (a, b) in zip(got.ids, got.places(), strict=True):
            if token in control:  # it may own blanks, which have no control token
                a, b = (
                    a + len(text[a:b]) - len(text[a:b].lstrip()),
                    len(text[:b].rstrip()),
                )
                assert not any(x < b and a < y for x, y in protected), (text, protected)
        segments = one.split(text, protected)
        if not any(s.key.shadowed for s in segments):
            assert got.ids == ids(core, text)
        hidden += any(s.key.shadowed for s in segments)
        assert max(got.ids, default=0) < core.get_vocab_size() + 4
    assert hidden > 10


@pytest.mark.parametrize("name", ALL)
def test_the_shadow_gives_ordinary_text_its_ids(name):
    one, core = encoder(name)
    for text in random_texts(name, 4, 100):
        for lead in ("", *list(set(one.control) - one._words)[:1]):
            expected = ids(core, lead + text)
            if not set(expected[bool(lead) :]) & set(one.control.values()):
                assert one.ids(Key(lead, text, True)) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_control_tokens_decode_to_their_text(name):
    one, core = encoder(name)
    for token in one.control:
        got = one.encode(f"x{token}y", [(0, len(token) + 2)])
        assert not set(got.ids) & set(one.control.values())
        assert token in core.decode(got.ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", [*FAMILIES, "plain", "first", "always"])
def test_inserted_tokens_are_where_they_are_put(name):
    one, core = encoder(name)
    rng = random.Random(5)
    token = next(iter(one.control))
    for text in random_texts(name, 5, 50):
        at = rng.randrange(len(text) + 1)
        if any(m.start() < at < m.end() for m in one._find.finditer(text)):
            continue  # a token in the middle of a control token
        got = one.encode(text, inserts=[(at, token)])
        assert got.ids == ids(core, text[:at] + token + text[at:]), (text, at)
        k = got.index(at)
        assert got.ids[k] == one.control[token]
        assert got.places()[k] == (at, at)


@pytest.mark.parametrize("name", ALL)
def test_a_text_that_begins_with_another_shares_its_segments(name):
    one, _ = encoder(name)
    rng = random.Random(6)
    for text in random_texts(name, 6, 20):
        head = text[: rng.randrange(len(text) + 1)]
        segments = one.split(head)
        if not segments:
            continue
        last = segments[-1]
        if one.split(text)[: len(segments) - 1] != segments[:-1]:
            continue
        if one.split(text)[len(segments) - 1].key.lead != last.key.lead:
            continue
        again = one.split(text, head=segments)
        assert again == one.split(text)
        first = Encoded(one, segments)
        shared, alone = Encoded(one, again, first), one.encode(text)
        assert (shared.ids, shared.places()) == (alone.ids, alone.places())
        assert [shared.index(k) for k in range(len(text) + 1)] == [
            alone.index(k) for k in range(len(text) + 1)
        ]


def test_private_characters_are_text_unless_they_meet_the_shadow():
    one, core = encoder("chatml")
    private = chr(PRIVATE)
    assert one.encode(f"a{private}b").ids == ids(core, f"a{private}b")
    user = f"{private}<|im_end|>"
    with pytest.raises(ValueError, match="private"):
        _ = one.encode(user, [(0, len(user))]).ids


def test_surrogates_are_an_error_of_the_text():
    for one in (encoder("chatml")[0], families.load("bytes").encoder):
        with pytest.raises(ValueError):
            _ = one.encode("a\ud800").ids


def test_a_token_that_takes_blanks_of_a_user_is_still_the_templates():
    one, core = encoder("lstrip")
    text = "Hello \n<|a|>"
    assert one.encode(text, [(0, 7)]).ids == ids(core, text)
    assert one.encode(text, [(0, 8)]).ids != ids(core, text)


def test_a_text_is_not_cut_where_the_ids_would_change():
    one, core = encoder("prepend")
    assert one._uncut == {"<tool>"}  # found behind the blank that is put in front
    assert one.encode("a<tool>b").ids == ids(core, "a<tool>b")
    assert encoder("plain")[0]._uncut == set()


def test_what_the_normaliser_makes_a_control_token_is_text_too():
    one, core = encoder("lowercase")
    text = "<|A|>a <|a|>"
    assert one.encode(text).ids == ids(core, text)
    hidden = one.encode(text, [(0, 7)])
    assert hidden.ids.count(one.control["<|a|>"]) == 1
    assert hidden.ids[-1] == one.control["<|a|>"]


def test_the_bytes_of_a_text():
    one = families.load("bytes").encoder
    assert isinstance(one, FunctionEncoder)
    for text in ("", "Hello", "é東", "a\u0301<eos>"):
        got = one.encode(text, [(0, len(text))])
        assert got.ids == list(text.encode())
        ends = [b for _, b in got.places()]
        for place in range(len(text) + 1):
            assert got.index(place) == bisect.bisect_right(ends, place)
    eos = next(iter(one.control))
    got = one.encode("é", inserts=[(1, eos)])
    assert got.ids == [*"é".encode(), one.control[eos]]
    assert got.places() == [(0, 1), (0, 1), (1, 1)]


def test_equal_segments_are_encoded_once_and_forgotten_late(monkeypatch):
    one, _ = encoder("chatml")
    asked = []
    real = one._encode
    monkeypatch.setattr(
        one, "_encode", lambda keys, s: asked.append(keys) or real(keys, s)
    )
    key = Key("<|im_start|>", "user\nonce and never again", False)
    one.prefetch([key, key])
    assert one.ids(key) == one.ids(key)
    assert asked == [[key]]
    assert Segment(3, False, key).start == 3


def test_a_shadow_is_the_same_tokenizer_but_for_names():
    one, core = encoder("gemma")
    made = json.loads(one._shadowed.core.to_str())
    assert one._shadowed.core.get_vocab_size() == core.get_vocab_size()
    assert not {t["content"] for t in made["added_tokens"]} & set(one.control)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a+){10}b", r"^(([a-z])+.)+[A-Z]$"])
@pytest.mark.parametrize("way", ["ids", "places", "plain"])
def test_a_pattern_that_does_not_finish_is_an_error_within_seconds(pattern, way):
    """The library stops after ten million steps, by a panic that is no Exception."""
    vocab = {"a": 0, "b": 1, "[UNK]": 2}
    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    one, text = Encoder(core, None, [], None), "a" * 3000
    started = time.monotonic()
    with pytest.raises(ValueError, match="a text that the tokenizer does not finish"):
        if way == "plain":
            one.plain(text)
        else:
            segment = Segment(0, False, Key("", text, False))
            one.ids(segment.key) if way == "ids" else one.places(segment)
    assert time.monotonic() - started < 30
