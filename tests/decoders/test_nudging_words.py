"""The loop on text, between two models whose words are scripted."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import LM, Batch, Scores, from_groups
from alignax.decoders import nudging_words
from alignax.sampling.decode import Generated
from alignax.text import tokenizer
from alignax.text.encoder import FunctionEncoder

TK = tokenizer.load("bytes")
EOS = 257
PROMPT = "Q:"


def octets(text):
    return text.encode("utf-8", "surrogateescape")


def written(ids):
    return bytes(i for i in ids if i < 256).decode("utf-8", "surrogateescape")


@pytest.fixture
def talk(monkeypatch):
    """talk(base, nudge, **hyper) -> response; each is text -> (next text, probabilities).

    A text that ends in '$', or is empty, ends in EOS; a single probability is that of all
    bytes. Bytes that are a part of a character are surrogates in the texts.
    """

    def generate(lm, tokens, lengths, key, *, max_new, temperature, eos_ids):
        assert temperature == 0.0
        ids = np.asarray(tokens[0])[: int(lengths[0])].tolist()
        text = written(ids)
        assert text.startswith(PROMPT)
        said, p = lm.params["says"](text.removeprefix(PROMPT))
        new = [EOS if c == ord("$") else c for c in octets(said or "$")]
        p = np.broadcast_to(p, len(new))[:max_new]
        new = new[:max_new]
        batch = from_groups([ids], [[new]], length=tokens.shape[1] + max_new)
        raw = np.zeros(batch.mask.shape)
        raw[0, 0, len(ids) : len(ids) + len(new)] = np.log(p)
        return Generated(batch, raw, np.zeros((1, 1), bool), {})

    monkeypatch.setattr(nudging_words.decode, "generate", generate)
    monkeypatch.setattr(
        nudging_words.hypotheses,
        "score",
        lambda lm, batch: Scores(jnp.zeros(batch.mask.shape)),
    )

    def run(base, nudge, **hyper):
        hyper = {"max_new": 80, "chunk": 20, "gamma": 0.4} | hyper
        ids = np.array([TK.encode(PROMPT)])
        out = nudging_words.search(
            LM(None, {"says": base}), {"nudge": LM(None, {"says": nudge})}, ids,
            np.array([ids.shape[1]]), jax.random.key(0), tokenizer=TK, eos_ids=[EOS],
            **hyper,
        )  # fmt: skip
        assert isinstance(out.batch, Batch)
        text = TK.decode(out.batch.tokens[0, 0][out.batch.mask[0, 0]])
        return text, out

    return run


def rest(sentence):
    """A model that finishes a sentence, whatever was said so far."""
    return lambda text: (written(octets(sentence)[len(octets(text)) :]), 0.9)


def base(text):
    """Knows the capital, and nothing about manners."""
    if text.endswith(" is"):
        return " Paris?", [0.9] * 6 + [0.1]
    return "x", 0.1


def test_the_base_says_what_it_knows_and_the_other_says_the_rest(talk):
    def nudge(text):
        if "Paris" in text:
            return ", I think.$", 0.9
        return "The answer is Lyon indeed"[len(text) :], 0.9

    text, out = talk(base, nudge)
    assert text == "The answer is Paris, I think."
    assert not out.truncated[0, 0]
    assert out.batch.tokens[0, 0, out.batch.lengths[0, 0] - 1] == EOS
    assert out.stats["rounds"] == 2
    assert out.stats["nudged"] == pytest.approx(1 - len(" Paris") / len(text))
    assert out.batch.old_logps is None


def test_the_first_word_is_taken_even_from_a_base_that_is_never_unsure(talk):
    text, _ = talk(rest("No, it is not so."), rest("Yes it is so indeed it is"), gamma=0.0, rounds=1)  # fmt: skip
    assert text.startswith("Yes")
    assert text == "Yes" + "No, it is not so."[3:]


@pytest.fixture
def asked(talk, monkeypatch):
    """asked(words, base) -> (words that are taken, what the base goes on with, its calls)."""

    def run(words, base, gamma=0.4):
        calls = []

        def says(text):
            calls.append(text)
            return base(text)

        ids = TK.encode(PROMPT)
        stats = {"tokens_sampled": 0}
        speaker = nudging_words.Speaker(
            LM(None, {"says": says}), TK, ids, [EOS], 8, stats
        )
        taken, said = nudging_words.nudges(words, speaker, "", gamma)
        return taken, written(said.ids), calls

    return run


def test_no_more_words_are_taken_where_the_base_would_begin_the_next_one(asked):
    """A blank is a part of the comparison: the base has to begin ' answer'."""
    for first, taken in ((" an", "The"), (" answer", "The"), ("an", "The answer is")):
        got, said, _ = asked("The answer is fine", lambda text, f=first: (f, 0.2))
        assert got == taken, first
        assert said == (first if taken == "The" else "")


def test_the_last_word_is_compared_although_it_is_never_taken(asked):
    got = asked(
        "The answer is fine", lambda text: (" fi" if text[-2:] == "is" else "x", 0.2)
    )
    assert got == ("The answer is", " fi", ["The", "The answer", "The answer is"])
    got = asked(
        "The answer is fine", lambda text: (" fo" if text[-2:] == "is" else "x", 0.2)
    )
    assert got[:2] == ("The answer is", " fo")  # by its first token, ' '
    got = asked("The answer is fine", lambda text: ("x", 0.2))
    assert got == ("The answer is", "", ["The", "The answer", "The answer is"])


def test_a_single_word_is_taken_and_the_base_is_not_asked(asked):
    for words in ("Yes", " Yes", "Yes,\nindeed"):
        assert asked(words, lambda text: (" sure", 0.9)) == (words, "", [])


def test_several_blanks_are_no_words(asked):
    got = asked("  One  two three", lambda text: ("x", 0.2))
    assert got == ("  One  two", "", ["  One ", "  One  two"])
    assert asked("One two  ", lambda text: ("x", 0.2))[0] == "One two "


def test_an_unsure_end_of_the_base_is_unsure_too(asked):
    assert asked("One two three", lambda text: ("$", 0.2))[0] == "One two"
    assert asked("One two three", lambda text: ("$", 0.9))[0] == "One"


def test_the_first_token_of_the_base_is_accepted_if_it_begins_the_next_word(talk):
    """It is below γ, as is the next one, which is the other's to give."""

    def nudge(text):
        return ("The answer is here"[len(text) :], 0.9) if len(text) < 4 else ("$", 0.9)

    assert talk(lambda text: (" q", 0.2), nudge)[0] == "The "
    assert talk(lambda text: ("q", 0.2), nudge)[0] == "The answer is"
    assert talk(lambda text: (" not so", [0.2, 0.9, 0.9, 0.9, 0.2, 0.9, 0.9]), nudge)[0] == "The not"  # fmt: skip


WORDS = "Zürich, Café 😀 naïve\u200dly größ!"


@pytest.mark.parametrize("chunk", range(1, 10))
def test_no_chunk_divides_a_character(talk, chunk):
    """Whoever speaks; one of the characters has four bytes."""
    hyper = {"chunk": chunk, "rounds": 99, "max_new": 99}
    said, out = talk(lambda text: ("#", 0.1), rest(WORDS + "$"), **hyper)
    assert (said, bool(out.truncated[0, 0])) == (WORDS, False)
    if chunk >= 3:  # otherwise the nudging model gives no two words
        said, _ = talk(
            rest("A" + WORDS), lambda text: ("$" if text else "A b", 0.9), **hyper
        )
        assert said == "A" + WORDS


def test_a_base_that_is_unsure_inside_a_character_leaves_all_of_it(talk):
    """The probability is low at one byte; what is kept are the characters in front."""
    for at in range(len(octets(WORDS))):

        def base(text, at=at):
            behind = octets(" " + WORDS)[len(octets(text)) - 3 :]
            p = [
                0.1 if n + len(octets(text)) - 4 == at else 0.9
                for n in range(len(behind))
            ]
            return written(behind), p or 0.9

        said, _ = talk(base, lambda text: ("$" if text else "One two", 0.9), max_new=99)
        assert said == "One " + octets(WORDS)[:at].decode("utf-8", "ignore")


def scripted(seed, letters, least):
    """A model at random: (text) -> (next letter, '' at its end; its probability)."""

    def following(text):
        x = np.random.default_rng([seed, zlib.crc32(text[-3:].encode())])
        c, p = letters[x.integers(len(letters))], x.choice([0.1, 0.9])
        return c, max(p, least)

    return following


def speech(following, text, many):
    """(text, probabilities with that of the end, whether it ended)."""
    out, best = "", []
    while len(best) < many:
        c, p = following(text + out)
        best.append(p)
        if not c:
            return out, best, True
        out += c
    return out, best, False


def by_the_rules(base, nudge, *, chunk, gamma, max_new, rounds, repeats):
    """The response by the rules of the header, for one character per token."""
    answer, given = "", []
    for _ in range(rounds):
        if len(answer) >= max_new:
            break
        words, _, ended = speech(nudge, answer, chunk)
        if ended:
            return answer + words
        front = len(words) - len(words.lstrip(" "))
        cuts = [i for i in range(front, len(words)) if words[i] == " "]
        taken, own = words if not cuts else words[: cuts[-1]], None
        for i in cuts:
            if words[i + 1 : i + 2] in ("", " "):
                continue
            own = speech(base, answer + words[:i], chunk)
            if own[1][0] >= gamma or (own[0] and words[i:].startswith(own[0][0])):
                taken = words[:i]
                break
            own = None
        given.append(taken)
        if not taken or given[-repeats - 1 :] == [taken] * (repeats + 1):
            break
        answer += taken
        said = own[0][:1] if own else ""
        first = 1
        while said or first == 0:
            text, best, ended = own if first else speech(base, answer + said, chunk)
            text, best = text[first:], best[first:]
            if not text or text in said:
                break
            sure = [*(p >= gamma for p in best), False].index(False)
            more = text[:sure]
            if len(more.split(" ")) > 5 and more in answer + said:
                break
            said, first = said + more, 0
            if sure < len(text) or ended or len(answer + said) >= max_new:
                break
        answer += said
    return answer


def test_it_follows_the_rules_of_its_header(talk):
    """Models at random, of which the response depends on every rule."""
    seen = set()
    for seed in range(60):
        base = scripted(seed, ["a", "b", " ", " ", ""], 0.0)
        nudge = scripted(seed + 99, ["a", "b", "c", " ", " ", ""], 0.9)
        rules = {"chunk": 2 + seed % 7, "gamma": 0.4, "max_new": 40, "rounds": 9,
                 "repeats": 1 + seed % 3}  # fmt: skip

        def says(following):
            def run(text):
                out, best, ended = speech(following, text, 20)
                return out + "$" * ended, [*best]

            return run

        got, _ = talk(says(base), says(nudge), **rules)
        want = nudging_words.once(by_the_rules(base, nudge, **rules))[:40]
        assert got == want, seed
        seen.add(want)
    assert len(seen) > 40


def test_an_end_of_the_base_ends_nothing(talk):
    def says(text):
        return ("$", 0.9) if text.endswith("One") else (" two$", 0.9)

    def nudge(text):
        return ("One more", 0.9) if not text else (" three$", 0.9)

    assert talk(says, nudge)[0] == "One three"


def test_the_same_words_again_and_again_end_the_response(talk):
    """The fourth time is left out; other words between begin the count again."""
    text, out = talk(lambda text: ("x", 0.1), lambda text: (" well,", 0.9))
    assert text == " well, well, well,"
    assert out.stats["rounds"] == 4
    assert out.truncated[0, 0]
    text, out = talk(lambda text: ("x", 0.1), lambda text: (" well,", 0.9), repeats=1)
    assert (text, out.stats["rounds"]) == (" well,", 2)

    def twice(text):
        return (" oh," if text.endswith(" well, well,") else " well,"), 0.9

    text, out = talk(lambda text: ("x", 0.1), twice, repeats=2, rounds=7)
    assert text == 2 * " well, well, oh," + " well,"


def test_a_long_chunk_that_was_said_before_is_dropped(talk):
    chunk = " one two three four five six"

    def nudge(text):
        return (" Then so" if len(text) < 45 else " done$"), 0.9

    text, _ = talk(lambda text: (chunk + "!", [0.9] * len(chunk) + [0.1]), nudge,
                   chunk=40, repeats=9)  # fmt: skip
    assert text.count("three") == 1
    assert text.endswith("done")


def test_the_response_has_no_more_tokens_than_it_may(talk):
    text, out = talk(lambda text: ("abcdefghij", 0.9), rest("Go on and on"), max_new=12)
    assert len(text) == 12
    assert out.truncated[0, 0]
    assert out.batch.tokens.shape == (1, 1, 14)


def test_a_long_end_that_is_repeated_is_said_once():
    line = "This is a sentence of some length. "
    assert nudging_words.once("Start. " + line * 3) == "Start. " + line
    assert nudging_words.once("ha ha ha ") == "ha ha ha "


def test_a_repeated_end_is_said_once_where_the_response_ended_too(talk):
    line = "This is a sentence of some length. "
    text, out = talk(base, lambda text: (line * 2 + "$", 0.9), chunk=80)
    assert text == line
    assert not out.truncated[0, 0]


def test_two_tokenizers_and_real_models(make_lm, tiny_config):
    """The base has 37 ids, the nudging model bytes: nothing but text is exchanged."""
    small = dataclasses.replace(tiny_config, num_layers=1)
    letters = " abcdefghijklmnopqrstuvwxyz.,!?:;()-"
    toy = dataclasses.replace(
        TK, vocab_size=37, eos_ids=frozenset({36}), eos_id=36, bos_id=None,
        encoder=FunctionEncoder(
            lambda text: [max(letters.find(c), 0) for c in text.lower()], {"\x00": 36}
        ),
        _decode=lambda ids, keep: "".join(letters[i] for i in ids if i < 36),
    )  # fmt: skip
    lms = {"nudge": make_lm(dataclasses.replace(small, vocab_size=259), 1)}
    prompts = np.array([[3, 4, 5, 6], [7, 8, 0, 0]])
    out = nudging_words.search(
        make_lm(small), lms, prompts, np.array([4, 2]), jax.random.key(0), max_new=6,
        tokenizer=toy, nudge_tokenizer="bytes", eos_ids=[36], chunk=3, rounds=3,
    )  # fmt: skip
    assert out.batch.tokens.shape == (2, 1, 10)
    assert out.batch.tokens.max() < 37
    assert (out.raw_logps[out.batch.mask] < 0).all()


def test_what_is_missing_is_named(talk):
    with pytest.raises(ValueError, match="needs the tokenizer"):
        nudging_words.search(
            LM(None, {}), {"nudge": LM(None, {})}, np.array([[1]]), np.array([1]),
            jax.random.key(0), max_new=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="chunk=0"):
        talk(base, base, chunk=0)
    with pytest.raises(ValueError, match="no LM 'nudge'"):
        nudging_words.search(
            LM(None, {}), {}, np.array([[1]]), np.array([1]), jax.random.key(0),
            max_new=2, tokenizer=TK,
        )  # fmt: skip
