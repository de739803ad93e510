"""Win rates under a procedure against enumeration and the theory's closed forms."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny

from alignax.batch import Batch, Example
from alignax.evals import inference_win_rate
from alignax.evals.inference_win_rate import best_weights, win_rates
from alignax.models import transformer
from alignax.models.sharding import make_mesh
from alignax.text import tokenizer
from alignax.theory import infalign
from alignax.training import build, parallel

TK = tokenizer.load("bytes")
PROMPTS = [Example(f"p{i}", p, ()) for i, p in enumerate("abcdef")]


def enumerated(a, b, n):
    """All subsets of n on both sides, a tie counting half."""
    pairs = itertools.product(
        map(max, itertools.combinations(a, n)), map(max, itertools.combinations(b, n))
    )
    return np.mean([(x > y) + (x == y) / 2 for x, y in pairs])


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_every_subset_counts_once(n):
    rng = np.random.default_rng(n)
    ours, theirs = rng.integers(0, 4, (5, 6)) * 1.0, rng.integers(0, 4, (5, 5)) * 1.0
    want = [enumerated(a, b, n) for a, b in zip(ours, theirs, strict=True)]
    np.testing.assert_allclose(win_rates(ours, theirs, n), want, atol=1e-12)


def test_the_estimate_is_unbiased_and_quieter_than_one_draw():
    """Two distributions over four outcomes with ties, whose best-of-3 win rate is known exactly."""
    rng = np.random.default_rng(0)
    p, q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
    want = infalign.discrete_win_rate(p, q, 3, best=True)
    ours = rng.choice(4, (4000, 12), p=p) * 1.0
    theirs = rng.choice(4, (4000, 12), p=q) * 1.0
    got = win_rates(ours, theirs, 3)
    assert abs(got.mean() - want) < 4 * got.std() / np.sqrt(4000)
    once = win_rates(ours[:, :3], theirs[:, :3], 3)
    assert got.std() < 0.6 * once.std()


def test_weights_of_the_best():
    assert best_weights(5, 5).tolist() == [0, 0, 0, 0, 1]
    assert best_weights(4, 1).tolist() == [0.25] * 4
    np.testing.assert_allclose(best_weights(4, 2), np.array([0, 1, 2, 3]) / 6)
    with pytest.raises(ValueError, match="best of 5 cannot be taken of 4"):
        best_weights(4, 5)


def last(batch: Batch, texts, lms) -> np.ndarray:
    """The id of the last token: an order on responses that the test can sum over."""
    tokens, ends = np.asarray(batch.tokens), np.asarray(batch.lengths)
    return np.take_along_axis(tokens, ends[..., None] - 1, -1)[..., 0] * 1.0


def evaluate(lm, ref, **settings):
    mesh = make_mesh((1, 1, 1))
    more = {"samples": 64, "max_new": 1, "n": (2, 4), **settings}
    return inference_win_rate.evaluate(
        lm, {"ref": ref}, PROMPTS, key=jax.random.key(1), tokenizer=TK,
        generate=parallel.generator(TK, mesh), score=parallel.scorer(mesh), batch_size=4,
        length=8, reward="test_inference_win_rate.last", **more,
    )  # fmt: skip


def distribution(lm):
    """[V] of the one token after each prompt."""
    rows = [TK.prompt(e) for e in PROMPTS]

    @jax.jit
    def last_logits(lm, rows):
        h, _ = transformer.hidden(lm, rows)
        return transformer.unembed(lm, h[:, -1:])[:, 0]

    logits = np.asarray(last_logits(lm, np.array(rows)), np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def spread_of(p, q, n, best, samples=400, times=60):
    """Standard error of the mean over prompts, by drawing from the distributions themselves."""
    rng, sign = np.random.default_rng(n), 1.0 if best else -1.0
    ours, theirs = (
        np.stack([rng.choice(len(x), (times, samples), p=x) for x in probs], 1)
        for probs in (p, q)
    )  # [times, prompts, samples]
    means = [
        win_rates(sign * a, sign * b, n).mean()
        for a, b in zip(ours, theirs, strict=True)
    ]
    return np.std(means)


def test_on_a_model_it_is_that_of_the_distributions(tiny_config, make_lm):
    config = dataclasses.replace(tiny_config, vocab_size=TK.vocab_size)
    lm, ref = make_lm(config, 0), make_lm(config, 1)
    got = evaluate(lm, ref, samples=400)
    p, q = distribution(lm), distribution(ref)
    exact = {
        "standard": (1, True), "best_of_2": (2, True), "best_of_4": (4, True),
        "worst_of_2": (2, False), "worst_of_4": (4, False),
    }  # fmt: skip
    for name, (n, best) in exact.items():
        want = np.mean([infalign.discrete_win_rate(a, b, n, best=best) for a, b in zip(p, q, strict=True)])  # fmt: skip
        error = spread_of(p, q, n, best)
        assert error < 0.02
        assert got[name] == pytest.approx(want, abs=4 * error), name
        assert got[f"{name}/lo"] <= got[name] <= got[f"{name}/hi"]
    kl = (p * np.log(p / q)).sum(-1).mean()
    spread = np.sqrt((p * (np.log(p / q) - kl) ** 2).sum(-1).mean() / 2400)
    assert abs(got["kl"] - kl) < 4 * spread


def test_a_model_against_itself_wins_half_at_no_kl(tiny_config, make_lm):
    lm = make_lm(dataclasses.replace(tiny_config, vocab_size=TK.vocab_size), 0)
    got = evaluate(lm, lm)
    assert got["kl"] == 0
    assert got["kl/se"] == 0
    assert got["best_of_4"] == pytest.approx(0.5, abs=4 * 2 / np.sqrt(6 * 64))


def test_what_cannot_be_estimated_is_refused(tiny_lm):
    with pytest.raises(ValueError, match=r"n is \(65,\), expected numbers from 1 to"):
        evaluate(tiny_lm, tiny_lm, n=(65,))
    with pytest.raises(ValueError, match="needs an LM 'sft'"):
        evaluate(tiny_lm, tiny_lm, baseline="sft")
    with pytest.raises(ValueError, match="size is 1, of 6 prompts"):
        evaluate(tiny_lm, tiny_lm, size=1)


def test_one_n_is_a_number(tiny_config, make_lm):
    lm = make_lm(dataclasses.replace(tiny_config, vocab_size=TK.vocab_size), 0)
    assert "best_of_3" in evaluate(lm, lm, n=3, samples=4)


REFUSED = [
    ({"n": 33}, r"evals\.inference_win_rate: n is 33"),
    ({"baseline": "sft"}, "needs an LM 'sft'; there are"),
    ({"reward": "nobody"}, "unknown name 'nobody' in rewards"),
    ({"size": 1}, "size is 1, of 16 prompts"),
]


@pytest.mark.parametrize("hyper, message", REFUSED, ids=lambda x: str(x))
def test_a_run_does_not_begin_with_what_it_cannot_end(hyper, message, tmp_path):
    config = tiny.config("sft")
    config.lms = {"ref": "init"}
    config.eval_data = {"name": "synthetic", "split": "test", "kind": "sft", "size": 16}
    config.evals = {
        "inference_win_rate": {"reward": "constraints", "max_new": 8, **hyper}
    }
    with pytest.raises(ValueError, match=message):
        build.build(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
