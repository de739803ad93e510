"""The loop on text, between two models whose words are scripted."""

import dataclasses

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


@pytest.fixture
def talk(monkeypatch):
    """talk(base, nudge, **hyper) -> response; each is text -> (next text, probabilities).

    A text that ends in '$' ends in EOS; a single probability is that of all characters.
    """

    def generate(lm, tokens, lengths, key, *, max_new, temperature, eos_ids):
        assert temperature == 0.0
        ids = np.asarray(tokens[0])[: int(lengths[0])].tolist()
        text = TK.decode(ids)
        assert text.startswith(PROMPT)
        said, p = lm.params["says"](text.removeprefix(PROMPT))
        new = [EOS if c == "$" else ord(c) for c in said][:max_new]
        p = np.broadcast_to(p, len(said))[: len(new)]
        batch = from_groups([ids], [[new or [0]]], length=tokens.shape[1] + max_new)
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
    return lambda text: (sentence[len(text) :], 0.9)


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


def test_no_more_words_are_taken_where_the_base_would_begin_the_next_one():
    taken, said = nudging_words.nudges(
        "The answer is fine", lambda w: nudging_words.Continuation([97, 110], [0.2, 0.2], False),
        TK.decode, 0.4,
    )  # fmt: skip
    assert taken == "The"
    assert said.ids == [97, 110]
    taken, _ = nudging_words.nudges(
        "The answer is fine", lambda w: nudging_words.Continuation([120], [0.2], False),
        TK.decode, 0.4,
    )  # fmt: skip
    assert taken == "The answer is"  # the last may have been cut off


def test_an_end_of_the_base_ends_nothing(talk):
    def says(text):
        return ("$", 0.9) if text.endswith("One") else (" two$", 0.9)

    def nudge(text):
        return ("One more", 0.9) if not text else (" three$", 0.9)

    assert talk(says, nudge)[0] == "One three"


def test_the_same_words_again_and_again_end_the_response(talk):
    text, out = talk(lambda text: ("x", 0.1), lambda text: (" well,", 0.9))
    assert text == " well, well,"
    assert out.stats["rounds"] == 3
    assert out.truncated[0, 0]


def test_a_long_chunk_that_was_said_before_is_dropped(talk):
    chunk = " one two three four five six"

    def nudge(text):
        return (" Then" if len(text) < 45 else " done$"), 0.9

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
