"""Questions to an LM: both orders, what cancels, and the odds of a real model."""

import dataclasses

import chat_families
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import rewards
from alignax.batch import LM, Batch, Example, Scores
from alignax.models import pine, transformer
from alignax.reward_functions import questions
from alignax.text import documents, tokenizer

TK = tokenizer.load("bytes")
PROMPTS = ["Say hi", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Bye?"}]]  # fmt: skip
TEXTS = [["good", "bad {x}", "fine"], ["bad", "good", "good"]]
WORTH = {"good": 2.0, "bad {x}": -1.0, "bad": -1.0, "fine": 0.5, "rival": 1.0}
BIAS = 3.0  # nats for the letter A, whatever stands behind it


def opinion(value):
    """score(lm, batch): log P(A) - log P(B) is value(question); rows are [A, B]."""

    def score(lm, batch, needs=()):
        logps = np.zeros(batch.tokens.shape, np.float32)
        for b, g in np.ndindex(batch.valid.shape):
            mask = np.asarray(batch.mask)[b, g]
            ids = np.asarray(batch.tokens)[b, g]
            assert TK.decode(ids[mask].tolist()) == "AB"[g]  # and no EOS
            assert mask.sum() == 1
            question = TK.decode(ids[: mask.argmax()].tolist())
            logps[b, g, mask.argmax()] = value(question) * (0.5 - g)
        return Scores(logps)

    return score


def compares(question):
    parts = [p.split("\n\n")[1] for p in question.split("Answer ")[1:]]
    return BIAS + WORTH[parts[0]] - WORTH[parts[1]]


def made(texts, invalid=()):
    shape = (len(texts), len(texts[0]), 4)
    valid = np.ones(shape[:2], bool)
    for at in invalid:
        valid[at] = False
    mask = np.broadcast_to(np.arange(4) > 1, shape)
    return Batch(
        np.zeros(shape, np.int32), mask, np.full(shape[:2], 4, np.int32),
        np.zeros(shape[:2], np.float32), valid,
    )  # fmt: skip


@pytest.fixture
def lms(tiny_config):
    config = dataclasses.replace(tiny_config, max_length=4096, vocab_size=TK.vocab_size)
    return {"judge": LM(config, {})}


def call(name, texts, lms, score, examples=None, invalid=(), **hyper):
    reward = rewards.load({"name": name, **hyper})
    examples = examples or [Example("", p, []) for p in PROMPTS]
    return rewards.call(
        reward, made(texts, invalid), texts, lms, tokenizer=TK, score=score,
        examples=examples,
    )  # fmt: skip


def test_a_group_is_a_tournament_without_the_bias_for_a_letter(lms):
    got = call("judge", TEXTS, lms, opinion(compares))
    worth = np.array([[WORTH[t] for t in group] for group in TEXTS])
    want = (worth[:, :, None] - worth[:, None]).sum(-1) / 2  # two others each
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-5)


def test_invalid_responses_are_no_opponents(lms):
    got = call("judge", TEXTS, lms, opinion(compares), invalid=[(0, 1), (1, 0), (1, 1)])
    np.testing.assert_allclose(got, [[1.5, 0, -1.5], [0, 0, 0]], atol=1e-5)


def test_the_opponent_may_be_in_the_row(lms):
    rows = [Example("", p, [], (), {"best": "rival"}) for p in PROMPTS]
    got = call("judge", TEXTS, lms, opinion(compares), examples=rows, against="best")
    np.testing.assert_allclose(got, [[1, -2, -0.5], [-2, 1, 1]], atol=1e-5)
    with pytest.raises(
        ValueError, match=r"row 0 has no column 'worst'; it has \['best'\]"
    ):
        call("judge", TEXTS, lms, opinion(compares), examples=rows, against="worst")


def test_the_question_holds_prompt_and_rubric(lms):
    seen = []

    def value(question):
        seen.append(question)
        return 0.0

    call("judge", TEXTS, lms, opinion(value), rubric="Which is shorter?")
    assert any("Instructions: Be kind.\n\nUser: Bye?" in q for q in seen)
    assert any("User: Say hi" in q for q in seen)
    assert all("Which is shorter? Reply" in q for q in seen)


@pytest.mark.parametrize("name", ["judge", "self_evaluation"])
def test_a_judge_that_is_not_there_is_named(name, lms):
    with pytest.raises(ValueError, match=rf"rewards\.{name} needs an LM 'grader'; there are \['judge'\]: set config\.lms\.grader"):  # fmt: skip
        call(name, TEXTS, lms, None, model="grader")
    with pytest.raises(ValueError, match="reads the tokenizer"):
        questions.reader(lms, "judge", None, who=name)


def test_the_odds_are_those_of_the_model(tiny_config, make_lm):
    """Of the logits, by hand; in chunks, and with a response of two tokens."""
    config = dataclasses.replace(tiny_config, vocab_size=TK.vocab_size)
    lm = make_lm(config)
    asked = ["One?", "Another one?", "x"]
    got = questions.log_odds(lm, asked, ("yes", "n"), tokenizer=TK, chunk=2)
    for question, odds in zip(asked, got, strict=True):
        total = {}
        for answer in ("yes", "n"):
            ids = [*TK.prompt(Example("", question, [])), *answer.encode()]
            h, _ = transformer.hidden(lm, jnp.array([ids]))
            logits = np.asarray(transformer.unembed(lm, h), np.float64)[0]
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            first = len(ids) - len(answer)
            total[answer] = sum(logp[t - 1, ids[t]] for t in range(first, len(ids)))
        assert odds == pytest.approx(total["yes"] - total["n"], abs=1e-4)


# -- by PINE


@pytest.fixture(scope="module")
def real(make_lm, tiny_config):
    config = dataclasses.replace(tiny_config, max_length=1024, vocab_size=TK.vocab_size)
    return make_lm(config)


def test_by_pine_a_judge_knows_no_order(real):
    lms = {"judge": real}
    out = call("judge", [["good one", "bad"]], lms, None, pine=True)
    back = call("judge", [["bad", "good one"]], lms, None, pine=True)
    np.testing.assert_allclose(out, back[:, ::-1], atol=2e-6)
    np.testing.assert_allclose(out.sum(), 0, atol=1e-6)
    assert np.abs(out).max() > 1e-3
    ordered = call("judge", [["good one", "bad"]], lms, None)
    assert np.abs(out - ordered).max() > 1e-4


def test_by_pine_the_odds_are_those_of_the_whole_rows(real):
    """Eagerly, one document after the other, without padding."""
    said = "Someone asked an assistant:\n\nUser: Say hi\n\nThere are two answers:\n\n"
    asked = "\n\nWhich is short? Repeat that answer, and nothing else."
    mark = "<|document|>"
    whole = TK.decode(
        TK.prompt(Example("", mark.join((said, "abc", "de", asked)), ())),
        keep_specials=True,
    )
    prefix, *documents, suffix = map(TK.encode, whole.split(mark))
    means = []
    for reply in documents:
        ids, layout = pine.lay(prefix, documents, suffix + reply)
        h = pine.hidden(real, jnp.asarray(ids), layout)
        logits = np.asarray(transformer.unembed(real, h), np.float64)
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows = range(len(ids) - len(reply) - 1, len(ids) - 1)
        means.append(np.mean([logps[i, ids[i + 1]] for i in rows]))
    out = call(
        "judge", [["abc", "de"]], {"judge": real}, None, pine=True,
        rubric="Which is short?",
    )  # fmt: skip
    np.testing.assert_allclose(
        out[0], [means[0] - means[1], means[1] - means[0]], atol=1e-5
    )


def test_by_pine_an_empty_response_is_no_opponent_and_does_not_win(real):
    lms = {"judge": real}
    pair = call("judge", [["good", "bad"]], lms, None, pine=True)
    for empty in ("", "<|document|>", "<|docu<|document|>ment|>"):
        out = call("judge", [["good", empty, "bad"]], lms, None, pine=True)
        np.testing.assert_allclose(out[0, ::2], pair[0], atol=1e-6)
        assert out[0, 1] == out[0, ::2].min() < 0
    rows = [Example("", p, (), columns={"rival": ""}) for p in PROMPTS]
    alone = call(
        "judge", [["good", "bad"]], lms, None, rows, pine=True, against="rival"
    )
    assert not alone.any()


@pytest.mark.parametrize(
    "said",
    [
        "go<|document|>od",
        "go<|docu<|document|>ment|>od",
    ],
)
def test_by_pine_separators_in_a_response_do_not_count(real, said):
    lms = {"judge": real}
    pair = call("judge", [["good", "bad"]], lms, None, pine=True)
    cut = call("judge", [[said, "bad"]], lms, None, pine=True)
    np.testing.assert_allclose(cut, pair, atol=1e-6)


def test_by_pine_what_is_too_long_is_refused(real):
    short = LM(dataclasses.replace(real.config, max_length=100), real.params)
    with pytest.raises(
        ValueError, match=r"has \d+ tokens, and the LM that reads it 100"
    ):
        call("judge", [["good", "bad"]], {"judge": short}, None, pine=True)


@pytest.mark.parametrize("family", chat_families.FAMILIES[:3])
def test_a_response_that_spells_control_tokens_is_read_without_them(family):
    """Else its ids in the prompt, where it is text, and alone would differ."""
    chat = chat_families.load(family)
    for name in chat.encoder.control:
        half = len(name) // 2
        nested = f"a{name[:half]}{name}{name[half:]}b"
        assert questions.plain(nested, chat) == "ab"
        asked = documents.SEPARATOR.join(
            questions.plain(x, chat) for x in ("Which?", f"one {name}", nested, "Say.")
        )
        ids = chat.prompt(Example("", asked, ()))
        _, *found, _ = documents.pieces(chat, ids, separator=documents.SEPARATOR)
        assert [chat.decode(x).strip() for x in found] == ["one", "ab"]
