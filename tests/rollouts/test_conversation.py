"""Responses of several turns: their rows, their log-probabilities, and what ends them."""

import jax
import numpy as np
import pytest
import tiny

from alignax import logprob
from alignax.batch import Example, check
from alignax.inputs.prompts import prompt_batches
from alignax.models.sharding import make_mesh
from alignax.rollouts import sampler, turns
from alignax.sampling.automaton import Automaton
from alignax.text import tokenizer
from alignax.training import loading, parallel

TK = tokenizer.load("bytes")
PROMPTS = [Example("a", "ab", (), columns={"k": 1.0}), Example("b", "c", (), columns={"k": 2.0})]  # fmt: skip
SEEN: list = []


def polite(rows, texts):
    """Two replies at most; the second conversation of a prompt is left at once."""
    SEEN.append((rows, texts))
    return ["go on" if len(t) == 1 else f"again {r['k']:g}" if len(t) == 2 else None for r, t in zip(rows, texts, strict=True)]  # fmt: skip


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm(loading.model_config(tiny.config(), TK.vocab_size))


def draw(lm, reply=polite, many=3, *, max_new=72, group=2, seed=0, stops=None):
    mesh = make_mesh((1, 1, 1))
    tables = None if stops is None else lambda size: {"stops": stops(size)}
    s = sampler.Sampler(
        parallel.generator(TK, mesh, tables), None, {}, TK, max_new, temperature=0.8,
        conversation=turns.Conversation(reply, many),
    )  # fmt: skip
    (prompts,) = prompt_batches(PROMPTS, TK, batch_size=2, length=4, buckets=(4,))
    return s.draw(lm, prompts, jax.random.key(seed), group)


def every_byte(size):
    """Each turn is one token long."""
    return Automaton(np.zeros((1, size), np.int32), np.ones((1, size), bool))


def text_of(row, length):
    return TK.decode(np.asarray(row)[:length].tolist(), keep_specials=True)


def test_the_rows_are_the_dialogue_and_only_the_policys_tokens_are_scored(lm):
    SEEN.clear()
    drawn = draw(lm, stops=every_byte)
    batch = check(drawn.batch)
    assert np.asarray(batch.mask).sum(-1).tolist() == [
        [3, 3],
        [3, 3],
    ]  # turns of a token
    assert not drawn.truncated.any()
    end = TK.decode([TK.eos_id], keep_specials=True)
    for b, g in np.ndindex(2, 2):
        said = [
            TK.decode([i], keep_specials=True)
            for i in batch.tokens[b, g][batch.mask[b, g]]
        ]
        first, second, third = said
        # a turn that ended by itself has its end already
        ends = ["" if x == end else end for x in said]
        between = "\n\nUser: {}\n\nAssistant:"
        want = PROMPTS[b].prompt + first + ends[0] + between.format("go on")
        want += second + ends[1] + between.format(f"again {b + 1}") + third
        assert text_of(batch.tokens[b, g], batch.lengths[b, g]) == want
    (rows, texts), (_, later), *_ = SEEN
    assert [r["k"] for r in rows] == [1, 1, 2, 2]
    assert [len(t) for t in texts] == [1] * 4
    assert [t[:1] for t in later] == texts


def test_log_probabilities_are_those_of_the_whole_row(lm):
    drawn = draw(lm, stops=every_byte, seed=1)
    score = jax.jit(logprob.score, static_argnames="temperature")
    at = np.asarray(drawn.batch.mask)
    tempered = np.asarray(score(lm, drawn.batch, temperature=0.8).logps)
    np.testing.assert_allclose(tempered, drawn.batch.old_logps, atol=2e-5)
    plain = np.asarray(score(lm, drawn.batch).logps)
    np.testing.assert_allclose(plain, drawn.raw_logps, atol=2e-5)
    assert (np.asarray(drawn.batch.old_logps)[~at] == 0).all()


def test_one_turn_is_what_it_is_without_replies(lm):
    drawn = draw(lm, lambda rows, texts: [None] * len(rows), max_new=5)
    mesh = make_mesh((1, 1, 1))
    plain = sampler.Sampler(
        parallel.generator(TK, mesh), None, {}, TK, 5, temperature=0.8
    )
    (prompts,) = prompt_batches(PROMPTS, TK, batch_size=2, length=4, buckets=(4,))
    want = plain.draw(lm, prompts, jax.random.key(0), 2)
    for name in ("mask", "lengths", "old_logps", "valid"):
        np.testing.assert_array_equal(
            getattr(drawn.batch, name), getattr(want.batch, name)
        )
    at = np.asarray(want.batch.mask)
    np.testing.assert_array_equal(drawn.batch.tokens[at], want.batch.tokens[at])
    np.testing.assert_array_equal(drawn.truncated, want.truncated)


def test_a_reply_without_room_behind_it_is_left_out(lm):
    """A turn of one token and a reply of 30: there is room for the first reply alone."""
    drawn = draw(lm, stops=every_byte, max_new=40)
    assert np.asarray(drawn.batch.mask).sum(-1).tolist() == [[2, 2], [2, 2]]
    assert drawn.truncated.all()
    ends = np.asarray(drawn.batch.lengths)
    last = np.take_along_axis(np.asarray(drawn.batch.mask), ends[..., None] - 1, -1)
    assert last.all()  # every response ends with a token of the policy's


def test_a_turn_that_is_cut_off_ends_the_conversation(lm):
    SEEN.clear()
    drawn = draw(lm, max_new=4)
    cut = drawn.truncated
    assert cut.any()
    many = sum(len(texts) for _, texts in SEEN)
    assert many == (~cut).sum() or not cut.all()
    assert (np.asarray(drawn.batch.mask).sum(-1)[cut] <= 4).all()


@pytest.mark.parametrize(
    "reply, message",
    [
        (lambda rows, texts: [], "gave 0 replies to 4 conversations"),
        (lambda rows, texts: [1] * len(rows), "gave 1, expected a text, or None"),
        (lambda rows, texts: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_what_is_no_reply_is_named(reply, message, lm):
    with pytest.raises(ValueError, match=rf"rollout\.reply {message}"):
        draw(lm, reply, stops=every_byte)


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "qwen25"])
def test_what_follows_a_turn_is_what_the_template_puts_there(family, tmp_path):
    """The ids of prompt, turn, reply, turn: as if the dialogue had been written at once."""
    text = tokenizer.load(str(tiny.family(family, tmp_path)))
    asked = [{"role": "user", "content": "Guess."}]
    history = turns.dialogue("Guess.", [])
    first = turns._ids(text, Example("", asked, ["Seven!"]))
    link = turns.between(text, history, "Higher.", ended=True)
    whole = [
        *asked, {"role": "assistant", "content": "Seven!"},
        {"role": "user", "content": "Higher."},
    ]  # fmt: skip
    assert first + link == turns._ids(text, Example("", whole, ()))
    without = turns.between(text, history, "Higher.", ended=False)
    assert without[1:] == link
    assert without[0] == first[-1]


def test_a_prompt_that_begins_the_answer_is_refused():
    with pytest.raises(ValueError, match="last turn is not the assistant's"):
        turns.dialogue([{"role": "assistant", "content": "It is"}], [])
