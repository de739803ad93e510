"""Evaluations against numbers worked out by hand, with scores and samplers that are made up."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob, rewards
from alignax.batch import LM, Batch, Example, Scores
from alignax.data import jsonl, pairing
from alignax.evals import perplexity, ranking_accuracy, sample, token_shift, win_rate
from alignax.inputs import forms
from alignax.models import transformer
from alignax.reports.metrics import Writer
from alignax.sampling import decode
from alignax.text import tokenizer

TK = tokenizer.load("bytes")
KEY = jax.random.key(0)


def examples(*texts):
    """(prompt, response, ...) -> Example."""
    return [Example(f"e{i}", p, rs) for i, (p, *rs) in enumerate(texts)]


def made_up(config, name):
    """An LM that is only a name: the fake score and the fake sampler read it."""
    return LM(config, {"name": name})


def score_by(value):
    """score(lm, batch): value(lm's name, response text) spread over its first token."""

    def score(lm, batch, needs=()):
        logps = np.zeros(batch.tokens.shape, np.float32)
        for (i, j), ok in np.ndenumerate(batch.valid):
            if ok:
                mask = np.asarray(batch.mask[i, j])
                text = TK.decode(np.asarray(batch.tokens[i, j])[mask].tolist())
                logps[i, j, mask.argmax()] = value(lm.params["name"], text)
        return Scores(logps)

    return score


def run(module, lm, lms, data, score, generate=None, **kwargs):
    return module.evaluate(
        lm, lms, data, key=KEY, tokenizer=TK, generate=generate, score=score,
        batch_size=2, length=32, **kwargs,
    )  # fmt: skip


# -- perplexity


def test_perplexity_is_exp_of_the_mean_over_scored_tokens(tiny_config):
    table = {"ab": -6.0, "c": -1.0, "defg": -4.0}  # nats of the whole response
    data = examples(("x", "ab"), ("yy", "c"), ("zzz", "defg"))
    got = run(
        perplexity,
        made_up(tiny_config, "pi"),
        {},
        data,
        score_by(lambda _, t: table[t]),
    )
    tokens = (2 + 1) + (1 + 1) + (4 + 1)  # EOS is scored, the prompt is not
    assert got["nll"] == pytest.approx(11.0 / tokens)
    assert got["perplexity"] == pytest.approx(math.exp(11.0 / tokens))
    assert got["log_prob"] == pytest.approx(-11.0 / 3)
    assert got["log_prob/lo"] <= got["log_prob"] <= got["log_prob/hi"]


@jax.jit
def _logits(lm, row):
    return transformer.unembed(lm, transformer.hidden(lm, row)[0])[0]


def logits(lm, ids):
    """[len(ids), V]; padded to one length, which no id in front of the padding sees."""
    row = np.array([ids + [0] * (8 - len(ids))])
    return np.asarray(_logits(lm, row), np.float64)[: len(ids)]


def test_perplexity_of_a_real_model_against_float64(make_lm, tiny_config):
    lm = make_lm(dataclasses.replace(tiny_config, vocab_size=TK.vocab_size))
    data = examples(("ab", "cde"), ("f", "gh"), ("ijk", "l"))
    score = jax.jit(logprob.score, static_argnames="needs")

    def host(lm, batch, needs=()):
        return jax.device_get(score(lm, jax.tree.map(jnp.asarray, batch), needs=needs))

    got = run(perplexity, lm, {}, data, host)
    total, count = 0.0, 0
    for e in data:
        prompt, ids = TK.prompt(e), TK.tokenize(e).responses[0]
        z = logits(lm, prompt + ids)
        for t, y in enumerate(ids, len(prompt)):
            row = z[t - 1]
            total += row[y] - row.max() - np.log(np.exp(row - row.max()).sum())
            count += 1
    # float32 logits below 10 in size, exact sums after them
    assert got["nll"] == pytest.approx(-total / count, abs=2e-5)


def test_perplexity_reads_the_chosen_side_of_pairs(tiny_config):
    data = examples(("x", "good", "bad"))
    got = run(perplexity, made_up(tiny_config, "pi"), {}, data, score_by(lambda _, t: {"good": -5.0, "bad": -99.0}[t]))  # fmt: skip
    assert got["log_prob"] == -5.0


# -- ranking accuracy


PAIRS = examples(("a", "up", "down"), ("b", "tie1", "tie2"), ("c", "low", "high"))
POLICY = {
    "up": -1.0,
    "down": -5.0,
    "tie1": -3.0,
    "tie2": -3.0,
    "low": -7.0,
    "high": -2.0,
}
REF = {"up": -1.0, "down": -1.0, "tie1": -2.0, "tie2": -4.0, "low": -9.0, "high": -1.0}


def test_ranking_by_hand_with_ties_wrong(tiny_config):
    score = score_by(lambda name, t: {"pi": POLICY, "ref": REF}[name][t])
    lm, ref = made_up(tiny_config, "pi"), made_up(tiny_config, "ref")
    got = run(ranking_accuracy, lm, {"ref": ref}, PAIRS, score)
    assert got["pairs"] == 3
    assert got["policy_accuracy"] == pytest.approx(1 / 3)  # right, tie, wrong
    # log-ratio gaps: (0 - -4) = 4, (-1 - 1) = -2, (2 - -1) = 3
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert got["log_ratio_gap"] == pytest.approx((4 - 2 + 3) / 3)
    assert got["accuracy/lo"] < got["accuracy"] < got["accuracy/hi"]


def test_identical_policy_and_reference_rank_nothing(tiny_config):
    """Log-ratios are all 0: all ties, so the accuracy is 0 and not a half."""
    score = score_by(lambda name, t: POLICY[t])
    lm = made_up(tiny_config, "pi")
    got = run(ranking_accuracy, lm, {"ref": lm}, PAIRS, score)
    assert got["accuracy"] == 0
    assert got["log_ratio_gap"] == 0


def test_without_a_reference_only_the_policys_ranking_is_reported(tiny_config):
    score = score_by(lambda name, t: POLICY[t])
    got = run(ranking_accuracy, made_up(tiny_config, "pi"), {}, PAIRS, score)
    assert set(got) == {"pairs", "policy_accuracy", "policy_accuracy/lo", "policy_accuracy/hi"}  # fmt: skip


def test_a_reward_model_ranks_by_its_last_scored_value(tiny_config):
    config = dataclasses.replace(tiny_config, value_head=True)
    rewards = {
        "up": 2.0,
        "down": 1.0,
        "tie1": 0.0,
        "tie2": 0.0,
        "low": -1.0,
        "high": 4.0,
    }

    def score(lm, batch, needs=()):
        assert needs == ("values",)
        values = np.full(batch.tokens.shape, 77.0, np.float32)  # masked
        for (i, j), ok in np.ndenumerate(batch.valid):
            mask = np.asarray(batch.mask[i, j])
            if ok:
                text = TK.decode(np.asarray(batch.tokens[i, j])[mask].tolist())
                values[i, j, np.flatnonzero(mask)[-1]] = rewards[text]
        return Scores(np.zeros_like(values), values=values)

    got = run(ranking_accuracy, made_up(config, "rm"), {}, PAIRS, score)
    assert got["accuracy"] == pytest.approx(1 / 3)
    assert got["margin"] == pytest.approx((1 + 0 - 5) / 3)
    assert "policy_accuracy" not in got


def test_ranking_single_responses_is_refused(tiny_config):
    with pytest.raises(ValueError, match="ranking_accuracy needs pairs"):
        run(ranking_accuracy, made_up(tiny_config, "pi"), {}, examples(("a", "b")), score_by(lambda *_: 0.0))  # fmt: skip


def test_a_wrongly_ordered_pair_is_no_agreement(tiny_config):
    """Scores say which side is chosen, not the order of the responses."""
    score = score_by(lambda _, text: {"good": -1.0, "bad": -2.0}[text])
    right = Example("a", "x", ("bad", "good"), (1.0, 9.0))
    wrong = Example("b", "x", ("good", "bad"), (0.2, 0.7))
    lm = made_up(tiny_config, "pi")
    for data, want in (([right], 1.0), ([wrong], 0.0), ([right, wrong, right], 2 / 3)):
        ranking_accuracy.check((), data, reference="ref")
        got = run(ranking_accuracy, lm, {}, data, score)
        assert got["policy_accuracy"] == pytest.approx(want)
        assert got["pairs"] == len(data)


@pytest.mark.parametrize(
    "responses, scores, text",
    [
        (("a", "b"), (3.0, 3.0), "a tie"),
        (("a", "b", "c"), (3.0, 2.0, 1.0), "data.pairing"),
        (("a", "b"), (), "without 'scores'"),
        (("a",), (1.0,), "no pair"),
    ],
)
def test_ranking_accuracy_of_other_rows_is_refused_before_a_run(
    responses, scores, text
):
    good = Example("a", "x", ("y", "n"), (1.0, 0.0))
    odd = Example("odd:7", "x", responses, scores)
    with pytest.raises(
        ValueError, match=f"odd:7: ranking_accuracy needs pairs.*{text}"
    ):
        ranking_accuracy.check((), [good, odd], reference="ref")


def test_perplexity_is_of_the_best_response_of_a_group(tiny_config):
    score = score_by(lambda _, text: {"good": -1.0, "bad": -2.0, "poor": -3.0}[text])
    data = [
        Example("a", "x", ("poor", "good", "bad"), (1.0, 9.0, 2.0)),
        Example("b", "x", ("bad", "good"), (1.0, 0.0)),  # a pair is in order
    ]
    got = run(perplexity, made_up(tiny_config, "pi"), {}, data, score)
    assert got["log_prob"] == pytest.approx(-1.5)


# -- win rate


def generator(text_of):
    """generate(lm, prompts, ...): text_of(name, prompt), one text or G, as responses."""

    def generate(lm, prompts, lengths, key, *, max_new, temperature, group=1):
        b, p = prompts.shape
        shape = (b, group, p + max_new)
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        ends, cut = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
        for i, n in enumerate(lengths):
            prompt = prompts[i, :n].tolist()
            texts = text_of(lm.params["name"], TK.decode(prompt))
            texts = [texts] if isinstance(texts, str) else texts
            for g, text in enumerate(texts):
                ids = [*TK.tokenize(Example("", "q", [text])).responses[0]]
                cut[i, g] = len(ids) > max_new
                ids = ids[:max_new]
                tokens[i, g, : n + len(ids)] = prompt + ids
                mask[i, g, n : n + len(ids)] = True
                ends[i, g] = n + len(ids)
        batch = Batch(
            tokens, mask, ends, np.zeros(shape[:2], np.float32), np.ones(shape[:2], bool),
            old_logps=np.zeros(shape, np.float32),
        )  # fmt: skip
        return decode.Generated(batch, np.zeros(shape, np.float32), cut, {})

    return generate


WORTH = {"a1": 1.0, "b1": 0.0, "a2": 2.0, "b2": 2.0, "a3": 0.0, "b3": 3.0, "a4": 5.0, "b4": 1.0, "a5": 1.0, "b5": 0.0}  # fmt: skip
PROMPTS = examples(*[(str(i), "x") for i in range(1, 6)])


def worth(text: str) -> float:
    """A judge by dotted name."""
    return WORTH[text]


def beat(tiny_config, policy="a", baseline="b", **kwargs):
    lm, base = made_up(tiny_config, policy), made_up(tiny_config, baseline)
    nats = {"a": -2.0, "b": -3.5}
    return run(
        win_rate, lm, {"ref": base}, PROMPTS, score_by(lambda name, t: nats[name]),
        generator(lambda name, prompt: name + prompt), reward=f"{__name__}.worth",
        max_new=4, **kwargs,
    )  # fmt: skip


def test_win_rate_by_hand_with_ties_half_and_strict_wins(tiny_config):
    got = beat(tiny_config)  # win, tie, loss, win, win: five prompts in batches of two
    assert got["win_rate"] == pytest.approx(3.5 / 5)
    assert got["strict_wins"] == pytest.approx(3 / 5)
    assert got["reward"] == pytest.approx(9 / 5)
    assert got["baseline_reward"] == pytest.approx(6 / 5)
    assert got["kl"] == pytest.approx(1.5)
    assert got["tokens"] == 3  # two letters and EOS
    assert got["ended"] == 1.0


def test_swapping_the_sides_gives_the_complement(tiny_config):
    one, other = beat(tiny_config), beat(tiny_config, "b", "a")
    assert one["win_rate"] + other["win_rate"] == pytest.approx(1)
    assert one["strict_wins"] + other["strict_wins"] == pytest.approx(4 / 5)  # a tie
    assert other["kl"] == pytest.approx(-1.5)


def test_samples_pair_prompt_and_both_sides(tiny_config):
    got = beat(tiny_config, show=3)
    assert [s["after"] for s in got["samples"]] == ["a1", "a2", "a3"]
    assert [s["before"] for s in got["samples"]] == ["b1", "b2", "b3"]
    assert got["samples"][2] == {
        "prompt": "3", "before": "b3", "after": "a3", "reward before": 3.0, "reward after": 0.0,
    }  # fmt: skip


def test_size_takes_prompts_from_the_start(tiny_config):
    assert beat(tiny_config, size=2)["win_rate"] == pytest.approx(0.75)


def test_kl_is_only_reported_at_temperature_one(tiny_config):
    assert "kl" not in beat(tiny_config, temperature=0.5)


def test_a_baseline_that_is_not_there_is_named(tiny_config):
    lm = made_up(tiny_config, "a")
    with pytest.raises(ValueError, match=r"win_rate needs an LM 'sft' to beat; there are \['ref'\]"):  # fmt: skip
        run(win_rate, lm, {"ref": lm}, PROMPTS, None, baseline="sft", reward=f"{__name__}.worth")  # fmt: skip


@pytest.fixture(scope="module")
def two_models(make_lm, tiny_config):
    config = dataclasses.replace(tiny_config, vocab_size=TK.vocab_size)
    return make_lm(config, 0), make_lm(config, 1)


def real(lm, base, data, *, reward, max_new):
    score = jax.jit(logprob.score)

    def generate(*args, **kwargs):
        return decode.generate(*args, eos_ids=sorted(TK.eos_ids), **kwargs)

    def host(lm, batch, needs=()):
        return jax.device_get(score(lm, jax.tree.map(jnp.asarray, batch)))

    return win_rate.evaluate(
        lm, {"ref": base}, data, key=KEY, tokenizer=TK, generate=generate, score=host,
        batch_size=64, length=16, reward=f"{__name__}.{reward}", max_new=max_new,
    )  # fmt: skip


def test_a_model_against_itself_has_no_kl_and_wins_half(two_models):
    lm, _ = two_models
    data = examples(*[(f"{i}", "x") for i in range(64)])
    got = real(lm, lm, data, reward="checksum", max_new=6)
    assert got["kl"] == got["kl/lo"] == got["kl/hi"] == 0
    # The two sides draw with keys of their own; 4 s.e. of 64 coin flips.
    assert abs(got["win_rate"] - 0.5) < 4 * 0.5 / 8
    assert got["strict_wins"] < 1
    assert any(s["before"] != s["after"] for s in got["samples"])


def checksum(text: str) -> float:
    """A judge with hardly a tie."""
    return float(sum(i * ord(c) for i, c in enumerate(text, 1)) % 9973)


def test_kl_is_unbiased_for_one_token(two_models):
    """One token after a prompt: the exact KL is a sum over the vocabulary."""
    lm, base = two_models
    data = examples(*[("q", "x")] * 512)
    got = real(lm, base, data, reward="checksum", max_new=1)
    logps = []
    for model in (lm, base):
        z = logits(model, TK.prompt(data[0]))[-1]
        logps.append(z - z.max() - np.log(np.exp(z - z.max()).sum()))
    p = np.exp(logps[0])
    kl = float((p * (logps[0] - logps[1])).sum())
    spread = math.sqrt(float((p * (logps[0] - logps[1] - kl) ** 2).sum()) / 512)
    assert kl > 0.1
    assert abs(got["kl"] - kl) < 4 * spread


# -- sample


def drawn(tiny_config, data=PROMPTS, **kwargs):
    """Groups of three: one letter, one worth reading, and one that does not end."""

    def texts(name, prompt):
        return [f"a{prompt}", f"b{prompt}", "endless"]

    reward = {"name": "constraints", "keywords": ("a1", "a2", "a3")}
    return run(
        sample, made_up(tiny_config, "a"), {}, data, None, generator(texts),
        reward=reward, group=3, max_new=4, **kwargs,
    )  # fmt: skip


def test_samples_are_groups_with_their_scores_and_say_what_does_not_end(tiny_config):
    got = drawn(tiny_config)
    assert got["samples"][1] == {
        "id": "e1", "prompt": "2", "responses": ["a2", "b2", "endl"],
        "scores": [pytest.approx(1 / 3), 0.0, 0.0], "truncated": [False, False, True],
    }  # fmt: skip


def test_what_does_not_end_is_left_out_of_rows_to_train_on(tiny_config):
    got = drawn(tiny_config, truncated="drop")
    assert got["samples"][1] == {
        "id": "e1", "prompt": "2", "responses": ["a2", "b2"],
        "scores": [pytest.approx(1 / 3), 0.0],
    }  # fmt: skip
    assert len(got["samples"]) == 5
    assert got["best"] == pytest.approx(3 / 3 / 5)
    assert got["reward"] == pytest.approx(3 / 9 / 5)
    assert got["ended"] == pytest.approx(2 / 3)


def test_the_given_response_beats_the_models_own(tiny_config):
    got = drawn(tiny_config, keep_given=True, truncated="drop")
    assert got["samples"][0]["responses"] == ["x", "a1", "b1"]
    assert got["samples"][0]["scores"] == [
        pytest.approx(4 / 3),
        pytest.approx(1 / 3),
        0.0,
    ]
    with pytest.raises(ValueError, match="e0: keep_given, but no response is given"):
        drawn(tiny_config, data=examples(("1",)), keep_given=True)


def test_samples_come_back_as_groups_and_become_pairs(tiny_config, tmp_path):
    """The whole way: samples.jsonl of a run, data.jsonl, data.pairing."""
    with Writer(tmp_path) as writer:
        writer.samples(0, drawn(tiny_config, truncated="drop")["samples"])
    source = {"name": "jsonl", "path": str(tmp_path / "samples.jsonl")}
    pairs = pairing.examples(split="all", source=source)
    assert [tuple(p.responses) for p in pairs] == [
        (f"a{i}", f"b{i}") for i in (1, 2, 3)
    ]
    assert len(pairs.report["dropped"]) == 2


def test_a_prompt_whose_samples_never_end_is_counted_and_in_no_row(
    tiny_config, tmp_path
):
    def texts(name, prompt):
        return ["endless"] * 2 if prompt == "2" else [" ", f"b{prompt}"]

    def got(**kwargs):
        return run(
            sample, made_up(tiny_config, "a"), {}, PROMPTS, None, generator(texts),
            reward={"name": "constraints", "keywords": ("b",)}, group=2, max_new=4,
            truncated="drop", **kwargs,
        )  # fmt: skip

    metrics = got()
    assert metrics["empty"] == 1
    assert [s["id"] for s in metrics["samples"]] == ["e0", "e2", "e3", "e4"]
    assert all(len(s["responses"]) == len(s["scores"]) == 1 for s in metrics["samples"])
    with Writer(tmp_path) as writer:
        writer.samples(0, metrics["samples"])
    rows = jsonl.examples(split="all", path=str(tmp_path / "samples.jsonl"))
    assert len(rows) == 4
    assert rows.report == {}
    assert got(keep_given=True)["empty"] == 0  # the given response is there


def test_a_reward_with_hyper_parameters_is_bound_by_name():
    with pytest.raises(ValueError, match="did you mean 'keywords'"):
        rewards.load({"name": "constraints", "keyword": ("a",)})
    with pytest.raises(ValueError, match="reward has no 'name'"):
        rewards.load({"keywords": ("a",)})


# -- token shift


def shift(tiny_config, kls, data, **kwargs):
    """KLs by position, the same in every response."""

    def score(lm, batch, needs=(), kl_to=None):
        assert needs == ("kl",)
        assert kl_to.params["name"] == "base"
        place = np.cumsum(batch.mask, -1)
        kl = np.where(batch.mask, np.asarray([0.0, *kls])[place], 0.0)
        return Scores(np.zeros_like(kl), kl=kl)

    base = {"ref": made_up(tiny_config, "base")}
    return run(token_shift, made_up(tiny_config, "a"), base, data, score, **kwargs)


def test_kl_by_position_and_its_early_share_by_hand(tiny_config):
    """Responses of 3 and 5 tokens with EOS; position k has its own KL in both."""
    data = examples(("q", "ab"), ("q", "abcd"))
    got = shift(tiny_config, [4.0, 2.0, 1.0, 0.5, 0.5], data, early=2)
    assert [got[f"position/0{k}"] for k in range(1, 6)] == [4.0, 2.0, 1.0, 0.5, 0.5]
    assert got["early"] == pytest.approx(6 / 8)
    assert got["kl"] == pytest.approx((7 + 8) / 8)
    assert "position/06" not in got


def test_token_shift_names_a_baseline_that_is_not_there(tiny_config):
    with pytest.raises(ValueError, match=r"token_shift needs an LM 'sft'.*\['ref'\]"):
        shift(tiny_config, [1.0] * 9, examples(("q", "a")), baseline="sft")


def test_a_model_has_not_shifted_from_itself(two_models):
    lm = two_models[0]

    def host(lm, batch, needs=(), **more):
        return jax.device_get(jax.jit(logprob.score, static_argnames="needs")(lm, batch, needs=needs, **more))  # fmt: skip

    got = run(token_shift, lm, {"ref": lm}, examples(("q", "ab"), ("q", "abcd")), host)
    assert got["kl"] == 0
    assert got["early"] == 0


# -- several rejected responses, and subsets (RewardBench 2)


def rows(folder, *given):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return jsonl.examples(split="all", path=str(path))


SEVERAL = (
    {"prompt": "a", "chosen": "p5", "rejected": ["p1", "p4"], "subset": "x"},
    {"prompt": "b", "chosen": ["p5"], "rejected": ["p1", "p5!", "p0"], "subset": "x"},
    {"prompt": "c", "chosen": ["p2"], "rejected": ["p3"], "subset": "x"},
    {"prompt": "d", "chosen": "p9", "rejected": "p1", "subset": "y"},
    {"prompt": "e", "chosen": "p7", "rejected": ["p1", "p2", "p8"]},
)


def of_text(_, text):
    """-10 to -1 by the digit, whatever follows it."""
    return float(text[1]) - 10


def test_chosen_has_to_beat_every_rejected_response(tiny_config, tmp_path):
    data = rows(tmp_path, *SEVERAL)
    score = score_by(lambda name, t: of_text(name, t) if name == "pi" else 0.0)
    lm, ref = made_up(tiny_config, "pi"), made_up(tiny_config, "ref")
    ranking_accuracy.check((), data)
    got = run(ranking_accuracy, lm, {"ref": ref}, data, score)
    assert got["pairs"] == 5
    # right: a and d; b is a tie, c below, e below one of three
    for name in ("accuracy", "policy_accuracy"):
        assert got[name] == pytest.approx(2 / 5)
        assert got[f"x/{name}"] == pytest.approx(1 / 3)
        assert got[f"y/{name}"] == 1.0
        assert got[f"mean_{name}"] == pytest.approx((1 / 3 + 1) / 2)
        for part in (name, f"x/{name}", f"y/{name}", f"mean_{name}"):
            assert 0 <= got[f"{part}/lo"] <= got[part] <= got[f"{part}/hi"] <= 1
    assert got["log_ratio_gap"] == pytest.approx((1 + 0 - 1 + 8 - 1) / 5)


def test_a_reward_model_ranks_several_rejected_responses(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, value_head=True)

    def score(lm, batch, needs=()):
        assert needs == ("values",)
        by_text = score_by(of_text)(lm, batch).logps.sum(-1)
        # a response that is not there has a value above all others
        values = np.where(batch.valid, by_text, 99.0)[..., None]
        return Scores(
            np.zeros(batch.tokens.shape, np.float32),
            values=np.broadcast_to(values, batch.tokens.shape),
        )

    got = run(ranking_accuracy, made_up(config, "rm"), {}, rows(tmp_path, SEVERAL[0], *SEVERAL[2:]), score)  # fmt: skip
    assert got["accuracy"] == pytest.approx(2 / 4)
    assert got["margin"] == pytest.approx((1 - 1 + 8 - 1) / 4)
    assert got["x/accuracy"] == 0.5
    assert "policy_accuracy" not in got


def test_rows_without_subsets_have_todays_names_alone(tiny_config, tmp_path):
    data = rows(tmp_path, {"prompt": "a", "chosen": "p5", "rejected": ["p1", "p4"]})
    got = run(ranking_accuracy, made_up(tiny_config, "pi"), {}, data, score_by(of_text))
    assert set(got) == {"pairs", "policy_accuracy", "policy_accuracy/lo", "policy_accuracy/hi"}  # fmt: skip


def test_subsets_may_have_another_column(tiny_config, tmp_path):
    data = rows(
        tmp_path, {"prompt": "a", "chosen": "p5", "rejected": "p1", "section": 3}
    )
    got = run(
        ranking_accuracy, made_up(tiny_config, "pi"), {}, data, score_by(of_text),
        subset="section",
    )  # fmt: skip
    assert got["3/policy_accuracy"] == got["mean_policy_accuracy"] == 1


def test_a_row_in_two_subsets_is_an_error(tiny_config):
    one = Example("a", "x", ("p5", "p1"), (1.0, 0.0), {"subset": "s"})
    with pytest.raises(ValueError, match="are in the subsets 's' and 't'"):
        run(ranking_accuracy, made_up(tiny_config, "pi"), {}, [one, one._replace(columns={"subset": "t"})], score_by(of_text))  # fmt: skip


def test_several_correct_responses_are_left_out_and_reported(tmp_path):
    ties = {"prompt": "a", "chosen": ["p5", "p6"], "rejected": ["p1"], "subset": "Ties"}
    data = rows(tmp_path, ties, SEVERAL[0])
    assert len(data) == 1
    assert "'chosen' holds 2 responses, expected one" in data.report["malformed"][0]


def test_a_loss_on_pairs_refuses_several_rejected_responses_by_name(tmp_path):
    data = rows(tmp_path, *SEVERAL[:2])
    with pytest.raises(
        ValueError, match=r"dpo reads pairs.* 2 groups .*'name': 'pairing'"
    ):
        forms.check(forms.tally(data), ("pairs",), "dpo", section={"name": "jsonl"})
    path = str(tmp_path / "rows.jsonl")
    pairs = pairing.examples(
        split="all", source={"name": "jsonl", "path": path}, strategy="all"
    )
    assert [tuple(p.responses) for p in pairs[:2]] == [("p5", "p1"), ("p5", "p4")]
