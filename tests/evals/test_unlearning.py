"""Forget quality and utility against scipy, by hand, and of answers that are made up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from test_evals import KEY, TK, generator, logits, made_up, score_by

from alignax import logprob
from alignax.batch import Example
from alignax.data import Examples
from alignax.evals import unlearning

NAN = np.nan
LOSSES = np.array([[1.0, 2.0, 3.0, 1.0], [0.5, 0.5, 2.5, NAN]])


def truth_ratio(losses, **form):
    return np.exp(unlearning.log_ratio(losses, **form))


def test_truth_ratios_by_hand():
    by_mean = [(np.exp(-3) + np.exp(-1)) / 2 / np.exp(-2), np.exp(-2.5) / np.exp(-0.5)]
    np.testing.assert_allclose(truth_ratio(LOSSES), by_mean)
    # the mean of 3 and 1 is 2, as much as that of the answer in other words
    by_code = [1.0, np.exp(-2.0)]
    np.testing.assert_allclose(truth_ratio(LOSSES, geometric=True), by_code)


def test_the_geometric_truth_ratio_is_the_smaller_one():
    losses = np.random.default_rng(0).exponential(size=(50, 7))
    geometric = truth_ratio(losses, geometric=True)
    assert (geometric < truth_ratio(losses)).all()


def test_probability_by_hand():
    alone = unlearning.probability(LOSSES, options=False)
    np.testing.assert_allclose(alone, np.exp([-1.0, -0.5]))
    p = np.exp(-np.array([1.0, 3.0, 1.0]))
    q = np.exp(-np.array([0.5, 2.5]))
    shares = unlearning.probability(LOSSES, options=True)
    np.testing.assert_allclose(shares, [p[0] / p.sum(), q[0] / q.sum()])


def test_a_model_that_has_collapsed_has_finite_ratios_and_shares():
    """exp(-800) is 0 in float64: what depends on differences must not be 0 / 0."""
    low = np.array([[800.0, 1, 800, 802], [1, 800, 800, 798], [1, 1, 800, 800], [800, 800, 1, 1]])  # fmt: skip
    log_mean = np.log((1 + np.exp(-2)) / 2)
    with np.errstate(all="raise", under="ignore"):
        got = unlearning.log_ratio(low)
        shares = unlearning.probability(low, options=True)
        geometric = unlearning.log_ratio(low, geometric=True)
    np.testing.assert_allclose(got, [-799 + log_mean, 2 + log_mean, -799, 799])
    np.testing.assert_allclose(geometric, [-800, 1, -799, 799])
    np.testing.assert_allclose(shares, [1 / (2 + np.exp(-2)), 1, 1, 0], atol=1e-300)


def test_an_item_without_wrong_answers_is_refused():
    for losses in (LOSSES[:, :2], np.array([[1.0, 1.0, NAN], [1.0, 1.0, 1.0]])):
        with pytest.raises(ValueError, match="an item has no wrong answer"):
            truth_ratio(losses)


def test_equal_samples_have_quality_1_and_separate_ones_the_least():
    x = np.random.default_rng(0).normal(size=40)
    assert unlearning.forget_quality(x, x) == (1.0, 0.0)
    p, statistic = unlearning.forget_quality(x, x + 100)
    assert statistic == 1.0
    assert p < 1e-20


def test_the_statistic_is_the_largest_gap_of_the_distributions():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=30), rng.normal(0.4, 1, 50)
    at = np.concatenate([a, b])
    gap = np.abs((a <= at[:, None]).mean(1) - (b <= at[:, None]).mean(1)).max()
    p, statistic = unlearning.forget_quality(a, b)
    assert statistic == pytest.approx(gap)
    # by what it means: the share of divisions of all values with a gap as large
    many = [rng.permutation(at) for _ in range(4000)]
    gaps = [np.abs((x[:30] <= at[:, None]).mean(1) - (x[30:] <= at[:, None]).mean(1)).max() for x in many]  # fmt: skip
    share = np.mean(np.array(gaps) >= gap - 1e-9)
    assert abs(p - share) < 4 * np.sqrt(share * (1 - share) / 4000)


def test_quality_depends_on_the_kind_of_mean_but_not_on_the_inverse():
    rng = np.random.default_rng(2)
    ours, theirs = rng.exponential(size=(2, 40, 7))
    forms = [
        [unlearning.log_ratio(x, geometric=g) for x in (ours, theirs)]
        for g in (False, True)
    ]
    plain, geometric = (unlearning.forget_quality(*f) for f in forms)
    assert plain[1] != geometric[1]
    again = unlearning.forget_quality(*(np.exp(-x) for x in forms[1]))
    assert again == pytest.approx(geometric)


def test_the_harmonic_mean():
    x = np.random.default_rng(0).uniform(0.1, 1, 9).tolist()
    assert unlearning.harmonic(x) == pytest.approx(scipy.stats.hmean(x))
    assert unlearning.harmonic([1.0, 0.0, 1.0]) == 0
    assert unlearning.harmonic([1.0] * 8 + [1e-9]) < 1e-7


ITEMS = [
    Example("0", "p", ["right", "true one", "wrong", "odd"]),
    Example("1", "q", ["good", "true too", "bad", "poor"]),
]
NATS = {  # of a whole response; its tokens are the letters and EOS
    "right": 6.0, "true one": 9.0, "wrong": 12.0, "odd": 2.0,
    "good": 5.0, "true too": 18.0, "bad": 8.0, "poor": 20.0,
    "true fact": 4.0, "so": 1.5,
}  # fmt: skip


WORLD = [Example("2", "p", ["true fact", "so", "wrong", "odd"])]


def world(*, split):
    del split
    return Examples(WORLD)


def kept(*, split):
    del split
    return Examples(ITEMS[1:])


SAID = {"p": "right it is", "q": "bad"}


def run(config, names, said=SAID, **hyper):
    lms = {name: made_up(config, name) for name in names}

    def value(name, text):
        return -NATS[text] * (2 if name == "retrained" else 1)

    return unlearning.evaluate(
        lms.pop("pi"), lms, Examples(ITEMS), key=KEY, tokenizer=TK,
        generate=generator(lambda _, prompt: said[prompt.strip()[0]]),
        score=score_by(value), batch_size=2, length=32, max_new=12,
        retain={"name": f"{__name__}.kept"}, **hyper,
    )  # fmt: skip


def mean_nats(text):
    return NATS[text] / (len(text) + 1)


def ratio(item, geometric=False, times=1):
    _, other, *wrong = (np.exp(-times * mean_nats(t)) for t in item.responses)
    mean = np.sqrt(np.prod(wrong)) if geometric else np.mean(wrong)
    return mean / other


def test_an_evaluation_of_scores_that_are_made_up(tiny_config):
    general = {"world": {"name": f"{__name__}.kept"}}
    got = run(tiny_config, ("pi", "retrained"), general=general)
    ratios = np.array([ratio(x) for x in ITEMS])
    assert got["forget/truth_ratio"] == pytest.approx(np.minimum(ratios, 1 / ratios).mean())  # fmt: skip
    first, second = (np.exp(-mean_nats(x.responses[0])) for x in ITEMS)
    assert got["forget/probability"] == pytest.approx((first + second) / 2)
    assert got["retain/probability"] == pytest.approx(second)
    p = [np.exp(-mean_nats(t)) for t in ("good", "bad", "poor")]
    assert got["world/probability"] == pytest.approx(p[0] / sum(p))
    assert got["forget/rouge"] == pytest.approx(1 / 2)
    assert [got[f"{x}/items"] for x in ("forget", "retain", "world")] == [2, 1, 1]
    assert got["retain/rouge"] == 0
    assert got["model_utility"] == got["geometric/model_utility"] == 0  # by that factor
    assert got["retain/truth_ratio"] == pytest.approx(max(0, 1 - ratio(ITEMS[1])))
    lower = max(0, 1 - ratio(ITEMS[1], geometric=True))
    assert got["geometric/retain/truth_ratio"] == pytest.approx(lower)
    theirs = [ratio(x, times=2) for x in ITEMS]
    at = np.array([*ratios, *theirs])
    gaps = [np.mean(ratios <= x) - np.mean(np.array(theirs) <= x) for x in at]
    assert got["forget_ks"] == pytest.approx(np.abs(gaps).max())


def test_the_utility_is_the_harmonic_mean_of_all_its_parts(tiny_config):
    """Three parts of two sets, none of them 0, against scipy."""
    general = {"world": {"name": f"{__name__}.world"}}
    got = run(tiny_config, ("pi",), said={"p": "true it is", "q": "good"}, general=general)  # fmt: skip
    for form in ("", "geometric/"):
        parts = [
            got[f"{prefix}{name}"]
            for where in ("retain", "world")
            for prefix, name in (("", f"{where}/probability"), ("", f"{where}/rouge"), (form, f"{where}/truth_ratio"))
        ]  # fmt: skip
        assert min(parts) > 0
        assert len(set(parts)) == 6
        assert got[f"{form}model_utility"] == pytest.approx(scipy.stats.hmean(parts))
    assert got["model_utility"] != got["geometric/model_utility"]


def test_an_evaluation_of_a_collapsed_model_is_finite(tiny_config):
    lm = made_up(tiny_config, "pi")
    got = unlearning.evaluate(
        lm, {"retrained": lm}, Examples(ITEMS), key=KEY, tokenizer=TK, batch_size=2,
        score=score_by(lambda _, t: -800.0 * (len(t) + 1) * (t != "true too")), length=32,
        generate=generator(lambda *_: "x"), retain={"name": f"{__name__}.kept"},
        general={"world": {"name": f"{__name__}.world"}}, max_new=4,
    )  # fmt: skip
    assert not np.isnan([*got.values()]).any()
    assert got["world/probability"] == pytest.approx(1 / 3)
    assert got["forget/truth_ratio"] == pytest.approx(1 / 2)  # R of 1, and of e^-800


def test_a_model_has_the_quality_1_beside_itself(tiny_config):
    lm = made_up(tiny_config, "pi")
    how = dict(key=KEY, tokenizer=TK, generate=generator(lambda *_: "x"), batch_size=2)
    got = unlearning.evaluate(
        lm, {"old": lm}, Examples(ITEMS), score=score_by(lambda _, t: -NATS[t]), length=32,
        max_new=4, retain={"name": f"{__name__}.kept"}, retrained="old", **how,
    )  # fmt: skip
    for form in ("", "geometric/"):
        assert (got[f"{form}forget_quality"], got[f"{form}forget_ks"]) == (1, 0)


def test_without_a_retrained_model_there_is_no_forget_quality(tiny_config):
    assert "forget_quality" not in run(tiny_config, ("pi",))
    with pytest.raises(ValueError, match="general has a set 'retain'"):
        run(tiny_config, ("pi",), general={"retain": {"name": f"{__name__}.kept"}})
    assert "forget/rouge/lo" in run(tiny_config, ("pi",), size=1)


def test_what_cannot_be_evaluated_is_refused_before_the_run(tmp_path):
    def refused(match, lms=("retrained",), data=ITEMS, error=ValueError, **hyper):
        hyper = {"retain": {"name": f"{__name__}.kept"}, "max_new": 4, **hyper}
        with pytest.raises(error, match=match):
            unlearning.check(lms, Examples(data), **hyper)

    refused("retrained is 'retraind', which is none of `lms`", retrained="retraind")
    path = str(tmp_path / "lost.jsonl")
    lost = {"name": "tofu", "path": path, "split": "train"}
    refused("lost.jsonl", retain=lost, error=FileNotFoundError)
    refused("lost.jsonl", general={"world": lost}, error=FileNotFoundError)
    refused("general has a set 'retain'", general={"retain": lost})
    bare = [ITEMS[0], Example("bare", "p", ["a", "b"])]
    refused("forget: bare: an item has no wrong answer", data=bare)
    retain = {"name": f"{__name__}.kept"}
    unlearning.check((), Examples(ITEMS), retain=retain, max_new=4)
    unlearning.check(("old",), Examples(bare), retain=retain, retrained="old", size=1)


def test_nats_of_a_real_model_against_float64(make_lm, tiny_config):
    lm = make_lm(dataclasses.replace(tiny_config, vocab_size=TK.vocab_size))
    items = [Example("0", "a", ["b", "cd"]), Example("1", "ab", ["c", "d", "e"])]
    score = jax.jit(logprob.score, static_argnames="needs")

    def host(lm, batch, needs=()):
        return jax.device_get(score(lm, jax.tree.map(jnp.asarray, batch), needs=needs))

    got = unlearning.nats(lm, items, host, tokenizer=TK, batch_size=2, length=16)
    assert got.shape == (2, 3)
    found = sorted(got[~np.isnan(got)])
    want = []
    for e in items:
        prompt = TK.prompt(e)
        for ids in TK.tokenize(e).responses:
            z = logits(lm, prompt + ids)[len(prompt) - 1 : -1]
            p = z[np.arange(len(ids)), ids] - np.log(np.exp(z).sum(-1))
            want.append(-p.mean())
    np.testing.assert_allclose(found, sorted(want), atol=2e-5)  # float32 logits
