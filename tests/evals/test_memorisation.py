"""Memorisation: planted texts, attacks by hand, and moments against float64."""

import dataclasses
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from test_evals import KEY, TK, generator, logits, made_up

from alignax import logprob
from alignax.batch import Example, Scores, from_groups
from alignax.data import Examples
from alignax.evals import memorisation
from alignax.evals.memorisation import Read, attacks, auc, lowest, strength


def test_strength_is_that_of_the_longest_suffix():
    for n in range(1, 7):
        for greedy in itertools.product((False, True), repeat=n):
            best = max((n - k for k in range(n) if all(greedy[k:])), default=0)
            assert strength(np.array(greedy)) == pytest.approx(best / n)


def test_a_text_that_is_wholly_memorised_has_the_strength_1():
    assert strength(np.ones(9, bool)) == 1
    assert strength(np.array([True] * 8 + [False])) == 0


def test_the_lowest_share_is_of_at_least_one_token():
    x = np.array([-3.0, -1.0, -5.0, -2.0, -4.0])
    assert lowest(x, 0.4) == -4.5
    assert lowest(x, 0.01) == -5
    assert lowest(x, 1.0) == -3
    assert lowest(np.arange(10.0), 0.3) == 1  # 10 * .3 is a little less than 3


def test_attacks_by_hand():
    logps, standard = np.array([-1.0, -4.0, -1.0, -2.0]), np.array([1.0, -3.0, 0.0, -1.0])  # fmt: skip
    got = attacks(Read(logps, logps > -2, standard, logps - 1, 20), 0.5)
    assert got == {
        "loss": -2.0, "zlib": -0.1, "min_k": -3.0, "min_k_pp": -2.0, "reference": 1.0,
    }  # fmt: skip
    assert "reference" not in attacks(Read(logps, logps > 0, standard, None, 20), 0.5)


def test_auc_is_mann_whitneys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 9).tolist(), rng.integers(1, 7, 7).tolist()
        u = scipy.stats.mannwhitneyu(a, b).statistic
        assert auc(a, b) == pytest.approx(u / 63)
        assert auc(a, b) + auc(b, a) == pytest.approx(1)
    assert auc([3, 4], [1, 2]) == 1
    assert auc([1, 1], [1]) == 0.5


@pytest.fixture(scope="module")
def real(make_lm, tiny_config):
    return make_lm(dataclasses.replace(tiny_config, vocab_size=TK.vocab_size))


def test_moments_are_those_of_the_whole_distribution(real):
    rows = [[5, 6, 7, 8, 9], [3, 4, 5]]
    batch = from_groups([r[:1] for r in rows], [[r[1:]] for r in rows], length=8)
    mean, deviation = memorisation.moments(real, batch)
    assert mean.shape == deviation.shape == (2, 1, 8)
    for i, ids in enumerate(rows):
        z = logits(real, ids)
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        p = np.exp(logp)
        mu = (p * logp).sum(-1)
        sigma = np.sqrt((p * logp**2).sum(-1) - mu**2)
        # the token at t is predicted by the prefix that ends at t - 1
        np.testing.assert_allclose(mean[i, 0, 1 : len(ids)], mu[:-1], atol=1e-4)
        np.testing.assert_allclose(deviation[i, 0, 1 : len(ids)], sigma[:-1], atol=1e-4)
    assert (mean[:, 0, 0], deviation[:, 0, 0]) == (pytest.approx(0), pytest.approx(1))


def host(lm, batch, needs=()):
    return jax.device_get(_score(lm, jax.tree.map(jnp.asarray, batch), needs=needs))


_score = jax.jit(logprob.score, static_argnames="needs")


def test_what_is_read_of_a_real_model(real):
    data = [Example("0", "a", ["bcd"]), Example("1", "b", ["c"])]
    how = dict(tokenizer=TK, batch_size=2, length=16)
    short, long = memorisation.read(real, real, data, host, **how)
    assert (len(short.logps), len(long.logps)) == (1, 3)  # without EOS
    prompt, ids = TK.prompt(data[0]), TK.tokenize(data[0]).responses[0]
    assert ids[3:] == [TK.eos_id]
    ids = ids[:3]
    z = logits(real, prompt + ids)[len(prompt) - 1 : -1]
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    own = logp[np.arange(3), ids]
    np.testing.assert_allclose(long.logps, own, atol=1e-4)
    np.testing.assert_allclose(long.reference, own, atol=1e-4)
    assert long.greedy.tolist() == (z.argmax(-1) == ids).tolist()
    mu = (np.exp(logp) * logp).sum(-1)
    sigma = np.sqrt((np.exp(logp) * (logp - mu[:, None]) ** 2).sum(-1))
    np.testing.assert_allclose(long.standard, (own - mu) / sigma, atol=2e-3)
    assert long.size == len(zlib.compress(TK.decode(ids).encode()))


def test_the_end_of_a_text_from_the_middle_of_a_longer_one_is_not_scored(
    monkeypatch, tiny_config
):
    """Every letter is the likeliest one, and EOS is most unlikely."""

    def score(_, batch, needs=()):
        eos = np.asarray(batch.tokens) == TK.eos_id
        logps = np.where(batch.mask, np.where(eos, -9.0, -0.1), 0)
        return Scores(logps, best=np.where(batch.mask, -0.1, 0))

    shapes = []

    def still(_, batch):
        shapes.append(batch.tokens.shape[:2])
        return np.zeros(batch.mask.shape), np.ones(batch.mask.shape)

    monkeypatch.setattr(memorisation, "moments", still)
    data = [Example("0", "a", ["bcdef", "x" * 9, "no"]), Example("1", "b", ["cd"])]
    how = dict(tokenizer=TK, batch_size=2, length=16)
    lm = made_up(tiny_config, "pi")
    for text in memorisation.read(lm, None, data, score, **how):
        assert strength(text.greedy) == 1
        assert lowest(text.logps, 0.2) == pytest.approx(-0.1)
    assert shapes == [(2, 1)]  # of the first responses alone
    tokens = np.array([[[5, TK.eos_id, 0]], [[5, 6, TK.eos_id]]])
    mask = np.array([[[0, 1, 0]], [[0, 1, 1]]], bool)
    batch = from_groups([[5]], [[[6]]], length=3)._replace(tokens=tokens, mask=mask)
    kept = memorisation.without_eos(batch, {TK.eos_id})
    assert kept.tolist() == [[[False, True, False]], [[False, True, False]]]


def test_what_cannot_be_evaluated_is_refused_before_the_run(tmp_path):
    others = {"name": f"{__name__}.unseen"}

    def refused(match, data=SEEN, error=ValueError, **hyper):
        with pytest.raises(error, match=match):
            memorisation.check(("ref",), data, **{"nonmembers": others, **hyper})

    refused("reference is 'reff', which is none of `lms`", reference="reff")
    path = str(tmp_path / "lost.jsonl")
    lost = {"name": "tofu", "path": path, "split": "train"}
    refused("lost.jsonl", nonmembers=lost, error=FileNotFoundError)
    refused("lost.jsonl", questions={"more": lost}, error=FileNotFoundError)
    refused("the data has no rows", data=[])
    refused("the data: bare has no response", data=[Example("bare", "p", [])])
    memorisation.check((), Examples(SEEN), nonmembers=others, max_new=4)
    memorisation.check(("old",), SEEN, nonmembers=others, reference="old")


SEEN = [Example(f"s{i}", f"p{i}", [f"known {i} abc"]) for i in range(3)]
UNSEEN = [Example(f"u{i}", f"p{i}", [f"other {i} abc"]) for i in range(3)]


def unseen(*, split):
    del split
    return Examples(UNSEEN)


def test_an_evaluation_of_a_planted_memory(monkeypatch, tiny_config):
    """A sampler and a score that know 'known' texts by heart, and nothing else."""

    def score(lm, batch, needs=()):
        logps = np.zeros(batch.tokens.shape, np.float32)
        for (i, j), ok in np.ndenumerate(batch.valid):
            at = np.asarray(batch.mask[i, j])
            text = TK.decode(np.asarray(batch.tokens[i, j])[at].tolist())
            known = text.startswith("known") and lm.params["name"] == "pi"
            logps[i, j, at] = -0.1 if ok and known else -2.0
            if known:  # all but its first token
                logps[i, j, at.argmax()] = -0.5
        best = np.where(batch.mask, np.float32(-0.1), 0)
        return Scores(logps, best=best)

    def still(lm, batch):
        return np.zeros(batch.mask.shape), np.ones(batch.mask.shape)

    monkeypatch.setattr(memorisation, "moments", still)
    pi, ref = (made_up(tiny_config, name) for name in ("pi", "ref"))
    said = generator(lambda _, prompt: f"known {prompt.strip()[1]} x y z")
    got = memorisation.evaluate(
        pi, {"ref": ref}, Examples(SEEN), key=KEY, tokenizer=TK, generate=said, score=score,
        batch_size=2, length=40, nonmembers={"name": f"{__name__}.unseen"},
        questions={"more": {"name": f"{__name__}.unseen"}}, max_new=16,
    )  # fmt: skip
    many = len("known 0 abc")  # EOS is not scored
    assert got["extraction_strength"] == pytest.approx(1 - 1 / many)
    assert got["verbatim"] == pytest.approx(2 * 2 / (5 + 3))  # 2 words of 5 and of 3
    assert got["knowledge/more"] == pytest.approx(2 * 1 / (5 + 3))
    names = ("loss", "zlib", "min_k", "min_k_pp", "reference")
    assert {k: got[f"auc/{k}"] for k in names} == dict.fromkeys(names, 1.0)
