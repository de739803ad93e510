"""Decoding a real model: greedy as transformers', and speculation as plain greedy."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob
from alignax.decoders import contrastive
from alignax.models import load, transformer
from alignax.sampling import decode, drafts
from alignax.sampling.speculate import speculate

PATH = os.environ.get("ALIGNAX_SMOLLM2")
GOLDEN = pathlib.Path(__file__).parent / "golden" / "smollm2_hh.npz"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PATH, reason="set ALIGNAX_SMOLLM2 to SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
]


@pytest.fixture(scope="module")
def lm():
    return load.load(PATH)


@pytest.fixture(scope="module")
def golden():
    """transformers' greedy continuations [16, 64], and the best two logits' gaps."""
    return dict(np.load(GOLDEN))


def greedy(function, *models, golden, **settings):
    out = function(
        *models, golden["prompts"], golden["prompt_lengths"], jax.random.key(0),
        max_new=golden["greedy"].shape[1], temperature=0.0, **settings,
    )  # fmt: skip
    tokens = np.asarray(out.batch.tokens)[:, 0]
    at = golden["prompt_lengths"][:, None] + np.arange(golden["greedy"].shape[1])
    return np.take_along_axis(tokens, at, 1), out.stats


@pytest.fixture(scope="module")
def plain(lm, golden):
    return greedy(decode.generate, lm, golden=golden)[0]


def test_every_next_token_after_its_output_is_that_of_transformers(lm, golden):
    """Teacher-forced, 16 prompts x 64 tokens, wherever the gap is above 1e-3."""
    want, clear = golden["greedy"], golden["gaps"] > 1e-3
    assert want.shape == (16, 64)
    assert clear.mean() > 0.99
    prompts, n = golden["prompts"], golden["prompt_lengths"]
    rows = np.pad(prompts, ((0, 0), (0, want.shape[1])))
    at = n[:, None] + np.arange(want.shape[1])
    np.put_along_axis(rows, at, want, 1)
    for row, spots, say, sure in zip(rows, at - 1, want, clear, strict=True):
        h, _ = transformer.hidden(lm, jnp.asarray(row[None]))
        got = np.argmax(logprob.rows(lm, h[:, spots])[0], -1)
        np.testing.assert_array_equal(got[sure], say[sure])


def test_greedy_decoding_is_that_of_transformers(golden, plain):
    """Up to a row's first gap that float32 cannot tell."""
    seen = 0
    for got, want, gaps in zip(plain, golden["greedy"], golden["gaps"], strict=True):
        first = int(np.append(gaps <= 1e-3, True).argmax())
        np.testing.assert_array_equal(got[:first], want[:first])
        seen += first
    assert seen > 0.9 * plain.size


def most_layers(lm):
    """Of the thirty, all but two: it agrees with the whole in three tokens of five."""
    return drafts.some_layers(lm, [i for i in range(30) if i not in (25, 26)])


def test_speculation_says_what_plain_greedy_says_in_fewer_calls(lm, golden, plain):
    fast, stats = greedy(speculate, lm, most_layers(lm), golden=golden)
    np.testing.assert_array_equal(fast, plain)
    print(f"{stats['tokens_per_target_call']:.2f} tokens a call of the target")
    assert stats["tokens_per_target_call"] >= 1.5


def test_guided_speculation_says_what_guided_greedy_says_in_fewer_calls(lm, golden):
    """Contrastive decoding against the model's own first layers."""
    lms = {"amateur": drafts.some_layers(lm, range(20))}
    guide = contrastive.guide(lms, amateur="amateur")
    some = ("prompts", "prompt_lengths", "greedy")
    golden = {k: golden[k][:6] for k in some}  # for time: three models are read
    slow, _ = greedy(decode.generate, lm, golden=golden, guide=guide)
    fast, stats = greedy(speculate, lm, most_layers(lm), golden=golden, guide=guide,
                         guided_draft=True)  # fmt: skip
    np.testing.assert_array_equal(fast, slow)
    print(f"{stats['tokens_per_target_call']:.2f} tokens a call of the target")
    assert stats["tokens_per_target_call"] >= 1.5
