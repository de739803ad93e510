"""Rollouts: responses are sampled, scored, shaped and cut into steps, and a stop loses none."""

import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import plugin, rewards, shaping
from alignax.batch import LM, Example, from_groups
from alignax.inputs.detokenize import texts
from alignax.models.sharding import make_mesh
from alignax.rollouts import sampler as samplers
from alignax.rollouts import selection
from alignax.rollouts.source import rollout_source
from alignax.sampling import decode
from alignax.text import tokenizer
from alignax.training import loading, parallel

TK = tokenizer.load("bytes")
PROMPTS = [Example(f"p{i}", p, ()) for i, p in enumerate(("ab", "c", "def", "g", "hi"))]


def codes(batch, texts, lms) -> np.ndarray:
    """A number that differs between nearly all responses."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    return (np.where(mask, tokens, 0) * np.arange(1, mask.shape[-1] + 1)).sum(
        -1
    ) % 101.0


@pytest.fixture(scope="module")
def lm(make_lm):
    config = loading.model_config(tiny.config(), TK.vocab_size)
    return make_lm(config)


@pytest.fixture(scope="module")
def one():
    return make_mesh((1, 1, 1))


def sampler(mesh, reward=codes, lms=None, **more):
    generate = parallel.generator(TK, mesh)
    return samplers.Sampler(generate, plugin.bind(reward), lms or {}, TK, 5, **more)


def steps(*names, **hyper):
    return shaping.in_order(plugin.load("shaping", n, hyper.get(n)) for n in names)


def make(lm, mesh, sample=None, examples=PROMPTS, **more):
    settings = {
        "shaping": steps("rloo"), "batch_size": 2, "length": 16, "seed": 3, "group": 3,
        "needs": ("logps", "old_logps", "advantages"), **more,
    }  # fmt: skip
    return rollout_source(
        examples, sample or sampler(mesh), policy=lambda params: LM(lm.config, params),
        score=parallel.scorer(mesh), **settings,
    )  # fmt: skip


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_has_the_policys_responses_and_their_rewards(lm, one):
    source = make(lm, one, epochs=2)  # a second pass reads old_logps
    batch = source.next(lm.params, 0)
    assert batch.tokens.shape[:2] == (2, 3)
    np.testing.assert_array_equal(batch.feedback, codes(batch, None, None))
    scores = parallel.scorer(one)(lm, batch)
    np.testing.assert_allclose(scores.logps, batch.old_logps, atol=2e-5)
    rewarded = batch.feedback - batch.feedback.mean(1, keepdims=True)
    want = np.where(batch.mask, 1.5 * rewarded[..., None], 0)  # G / (G - 1)
    np.testing.assert_allclose(batch.advantages, want, rtol=1e-5, atol=1e-4)
    metrics = source.report()["metrics"]
    assert metrics["rollout/reward"] == pytest.approx(batch.feedback.mean(), rel=1e-5)
    assert metrics["rollout/logp_gap_max"] < 2e-5
    assert metrics["rollout/tokens"] == pytest.approx(batch.mask.sum(-1).mean())


def test_the_reference_itself_pays_nothing(lm, one):
    """Both sides are the kernel's: not even rounding is between them."""
    more = {"shaping": steps("kl", "rloo"), "epochs": 2}
    source = make(lm, one, sampler(one, lms={"ref": lm}), **more)
    batch = source.next(lm.params, 0)
    np.testing.assert_array_equal(batch.old_logps, batch.ref_logps)
    assert source.report()["metrics"]["rollout/kl"] == 0


def test_every_prompt_once_before_any_twice(lm, one):
    source = make(lm, one)
    ids = []
    for at in range(5):
        source.next(lm.params, at)
        ids += source.report()["ids"]
    assert sorted(ids[:5]) == sorted(ids[5:]) == [e.id for e in PROMPTS]
    assert ids[:5] != ids[5:]


def test_epochs_pass_over_the_same_responses_in_another_order(lm, one):
    source = make(lm, one, batches=2, epochs=2)
    batches = [source.next(lm.params, at) for at in range(5)]
    rows = [sorted(map(bytes, b.tokens)) for b in batches]
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3])
    assert rows[0] != rows[2]
    assert not set(rows[4]) & set(rows[0] + rows[1])


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_rollout_goes_on_where_it_stopped(lm, one, stop):
    def fresh():
        more = {"batches": 2, "epochs": 2, "needs": ("ref_logps",)}
        return make(lm, one, sampler(one, lms={"ref": lm}), **more)

    source = fresh()
    for at in range(stop):
        source.next(lm.params, at)
    saved = json.loads(json.dumps(source.state()))
    want = [source.next(lm.params, at) for at in range(stop, 6)]
    resumed = fresh()
    resumed.restore(saved)
    for at, batch in enumerate(want):
        equal(resumed.next(lm.params, stop + at), batch)
    assert resumed.report()["ids"] == source.report()["ids"]


def test_a_state_of_other_settings_is_refused(lm, one):
    state = make(lm, one).state()
    with pytest.raises(ValueError, match="other rollout settings"):
        make(lm, one, group=4).restore(state)


def test_hosts_share_the_rows_of_one_rollout(lm, one):
    whole = make(lm, one).next(lm.params, 0)
    parts = [make(lm, one, host=(i, 2)).next(lm.params, 0) for i in range(2)]
    equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), whole)
    with pytest.raises(ValueError, match="batch_size 2 does not divide over 3 hosts"):
        make(lm, one, host=(0, 3))


def test_a_rollout_does_not_depend_on_the_mesh(lm, one):
    mesh = make_mesh((2, 2, 2))
    settings = {"batch_size": 4, "needs": (), "epochs": 2}
    a = make(lm, one, **settings).next(lm.params, 0)
    b = make(lm, mesh, **settings).next(lm.params, 0)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.old_logps, b.old_logps, atol=2e-5)


def test_a_tempered_rollout_reports_the_distribution_it_sampled(lm, one):
    warm = sampler(one, temperature=2.0)
    source = make(lm, one, warm, needs=("advantages",), batches=2)
    batch = source.next(lm.params, 0)
    plain = parallel.scorer(one)(lm, batch).logps
    assert np.abs(plain - batch.old_logps).max() > 0.1
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            make(lm, one, sampler(one, temperature=temperature))


def test_a_kl_from_samples_of_another_policy_is_refused(lm, one):
    some = sampler(one, lms={"ref": lm})
    for more in (
        {"shaping": steps("kl", "rloo")},
        {"needs": ("old_logps", "ref_logps")},
    ):
        with pytest.raises(ValueError, match="samples of the policy itself"):
            make(lm, one, some, behaviour=lm, **more)
    make(lm, one, some, behaviour=lm, needs=("ref_logps",))  # a preference loss


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_a_tempered_rollout_is_scored_at_its_temperature(temperature, lm, one):
    """Ratios of fresh responses are 1, the sampler's numbers the kernel's, and so is the
    reference's column: that of softmax(logits / temperature)."""
    other = LM(lm.config, jax.tree.map(lambda x: x + 0.01, lm.params))
    warm = sampler(one, lms={"ref": other}, temperature=temperature)
    needs = ("old_logps", "advantages", "ref_logps")
    source = make(lm, one, warm, needs=needs, batches=2)
    batch = source.next(lm.params, 0)
    score = parallel.scorer(one)
    ours = score(lm, batch, temperature=temperature).logps
    np.testing.assert_array_equal(ours, batch.old_logps)
    theirs = score(other, batch, temperature=temperature).logps
    np.testing.assert_array_equal(theirs, batch.ref_logps)
    assert source.report()["metrics"]["rollout/logp_gap_max"] < 1e-4
    assert np.abs(score(lm, batch).logps - batch.old_logps).max() > 0.1


def test_pairs_are_scored_by_the_model_itself_whatever_their_temperature(lm, one):
    warm = sampler(one, lms={"ref": lm}, temperature=0.7)
    source = make(lm, one, warm, needs=("logps", "ref_logps"), keep="best_worst")
    batch = source.next(lm.params, 0)
    theirs = parallel.scorer(one)(lm, batch).logps
    np.testing.assert_allclose(theirs, batch.ref_logps, atol=2e-5)
    assert source.report()["metrics"]["rollout/logp_gap_max"] < 1e-4


def test_every_rollout_has_one_length(lm, one):
    source = make(lm, one, batch_size=1)
    assert {source.next(lm.params, at).tokens.shape for at in range(5)} == {(1, 3, 16)}


def test_truncated_responses_by_rule(lm, one):
    ends = list(range(0, TK.vocab_size, 6))  # so many that most responses have an end

    def rolled(**more):
        def generate(lm, prompts, lengths, key, **settings):
            prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths)
            return decode.generate(lm, prompts, lengths, key, eos_ids=ends, **settings)

        sample = sampler(one, **more)._replace(generate=generate)
        return make(lm, one, sample).next(lm.params, 0)

    kept = rolled()
    cut = ~(np.isin(kept.tokens, ends) & kept.mask).any(-1)
    assert cut.any()
    assert not cut.all()
    assert kept.valid.all()
    batch = rolled(truncated="punish", punishment=-7.0)
    np.testing.assert_array_equal(batch.feedback, np.where(cut, -7, kept.feedback))
    batch = rolled(truncated="drop")
    np.testing.assert_array_equal(batch.valid, ~cut)
    assert not batch.advantages[cut].any()


def endless(lm, prompts, lengths, key, **settings):
    return decode.generate(
        lm, jnp.asarray(prompts), jnp.asarray(lengths), key, **settings
    )


def test_a_rollout_without_a_valid_response_is_an_empty_step_ten_in_a_row_the_end(
    lm, one
):
    never = sampler(one, truncated="drop")._replace(generate=endless)
    source = make(lm, one, never)
    for _ in range(9):
        batch = source.next(lm.params, 0)
        assert not batch.valid.any()
        assert not batch.advantages.any()
        metrics = source.report()["metrics"]
        assert metrics["rollout/empty"] == 1
        assert "rollout/reward" not in metrics
        assert all(map(np.isfinite, metrics.values()))
    saved = json.loads(json.dumps(source.state()))
    with pytest.raises(
        ValueError, match=r"10 rollouts in a row have no valid response: 0% of"
    ):
        source.next(lm.params, 0)
    again = make(lm, one, never)
    again.restore(saved)  # the count is part of the place
    with pytest.raises(ValueError, match="10 rollouts in a row"):
        again.next(lm.params, 0)
    # one with a valid response begins anew
    now = [0]

    def mostly(*args, **more):
        now[0] += 1
        out = endless(*args, **more)
        return out._replace(truncated=out.truncated & bool(now[0] % 6))

    source = make(lm, one, never._replace(generate=mostly, truncated="drop"))
    for _ in range(20):
        source.next(lm.params, 0)


def fails_sometimes(text):
    if len(text) % 2:
        raise KeyError(text)
    return len(text)


def test_responses_whose_reward_fails_are_counted_and_not_valid(lm, one):
    some = sampler(one, fails_sometimes, invalid_rewards=0.9)
    source = make(lm, one, some, shaping=(), needs=())
    plain = make(lm, one, sampler(one, codes), shaping=(), needs=())
    batch, whole = source.next(lm.params, 0), plain.next(lm.params, 0)
    odd = np.array([[len(t) % 2 for t in g] for g in texts(whole, TK)], bool)
    assert odd.any()
    np.testing.assert_array_equal(batch.valid, whole.valid & ~odd)
    assert not batch.feedback[odd].any()
    assert source.report()["metrics"]["rollout/failed_rewards"] == odd.mean()
    with pytest.raises(ValueError, match=r"raised KeyError.*on the response"):
        make(lm, one, sampler(one, fails_sometimes)).next(lm.params, 0)


def always(text):
    return 0.25


def test_a_constant_reward_is_said_once(lm, one, caplog):
    source = make(lm, one, sampler(one, always))
    for at in range(3):
        source.next(lm.params, at)
    assert caplog.text.count("THE REWARD IS THE SAME, 0.25") == 1


ROWS = [
    e._replace(columns={"answer": f"a{i}", "level": float(i)})
    for i, e in enumerate(PROMPTS)
]
SEEN: list = []


def of_rows(texts, prompts, answer, level):
    SEEN.append((prompts, answer, level))
    return [[x + g for g in range(len(t))] for t, x in zip(texts, level, strict=True)]


def test_a_reward_reads_the_rows_that_its_prompts_came_from(lm, one):
    SEEN.clear()
    source = make(lm, one, sampler(one, of_rows), ROWS, dynamic_sampling=True)
    batch = source.next(lm.params, 0)
    ids = source.report()["ids"]
    known = {e.id: e for e in ROWS}
    for row, example in zip(batch.feedback, (known[i] for i in ids), strict=True):
        level = example.columns["level"]
        assert row.tolist() == [level, level + 1, level + 2]
    for prompts, answer, level in SEEN:
        mine = [next(e for e in ROWS if e.prompt == p) for p in prompts]
        assert answer == [e.columns["answer"] for e in mine]
        assert level == [e.columns["level"] for e in mine]
    # a batch of the step holds numbers that were carried before, and no places
    assert set(batch.extra or {}) <= {"level", "sampler_logps"}


def test_only_columns_that_the_reward_reads_are_part_of_the_data(lm, one):
    def state(reward, examples):
        return make(lm, one, sampler(one, reward), examples).state()["data"]

    other = [e._replace(columns={**e.columns, "answer": "?"}) for e in ROWS]
    assert state(codes, ROWS) == state(codes, other)
    assert state(of_rows, ROWS) != state(of_rows, other)
    with pytest.raises(ValueError, match=r"takes 'answer'.*which have none"):
        make(lm, one, sampler(one, of_rows))
    lacking = [*ROWS[:2], PROMPTS[2]]
    with pytest.raises(ValueError, match="reads the column 'answer', which p2 lacks"):
        rewards.check(plugin.bind(of_rows), lacking)


def test_rollouts_are_shown_as_text(lm, one):
    members = {
        "rows": {"name": f"{__name__}.of_rows"},
        "same": {"name": f"{__name__}.always"},
    }
    judge = rewards.load({"name": "ensemble", "members": members, "rule": "min"})
    both = sampler(one)._replace(reward=judge, truncated="drop")
    source = make(lm, one, both, ROWS, show=1, show_every=4, batches=2)
    shown = []
    for at in range(10):
        batch = source.next(lm.params, at)
        shown += [(at, source.report()["samples"])] * bool(source.report()["samples"])
    assert [at for at, _ in shown] == [0, 4, 8]
    (row,) = shown[-1][1]
    example = next(e for e in ROWS if e.id == row["id"])
    assert row["prompt"] == example.prompt
    assert row["column answer"] == example.columns["answer"]
    assert row["reward rows"][0] in (example.columns["level"], 0)
    assert len(row["responses"]) == len(row["scores"]) == len(row["advantages"]) == 3
    assert row["valid"] == [not t for t in row["truncated"]]
    del batch


def test_what_was_sampled_is_counted_and_its_entropy_estimated(lm, one):
    source = make(lm, one, epochs=1)
    total = 0
    for at in range(3):
        batch = source.next(lm.params, at)
        total += batch.mask.sum()
        metrics = source.report()["metrics"]
        assert metrics["rollout/total_tokens"] == total
        sizes = batch.mask.sum(-1).ravel()
        assert metrics["rollout/tokens_p50"] == np.median(sizes)
    logps = parallel.scorer(one)(lm, batch).logps
    want = -np.asarray(logps)[batch.mask].mean()
    assert metrics["rollout/entropy"] == pytest.approx(want, rel=1e-4)


def group(feedback, valid=None):
    batch = from_groups([[1, 2]] * len(feedback), [[[3 + g] for g in range(len(f))] for f in feedback], length=4, feedback=feedback)  # fmt: skip
    return batch if valid is None else batch._replace(valid=np.array(valid))


def test_the_best_and_the_worst_are_a_pair_unless_they_tie():
    got = selection.select(group([(2.0, 9.0, -1.0), (4.0, 4.0, 4.0)]), "best_worst")
    assert got.tokens[0, :, 2].tolist() == [4, 5]
    assert got.feedback[0].tolist() == [9, -1]
    assert got.valid.tolist() == [[True, True], [False, False]]


def test_what_is_not_valid_is_neither_best_nor_worst():
    batch = group([(2.0, 9.0, -1.0)], [[True, False, True]])
    got = selection.select(batch, "best_worst")
    assert got.feedback.tolist() == [[2, -1]]
    assert selection.select(batch, "best").feedback.tolist() == [[2]]


def test_the_greedy_baseline_is_that_of_the_greedy_response(lm, one):
    source = make(lm, one, shaping=steps("remax"))
    batch = source.next(lm.params, 0)
    ids = source.report()["ids"]
    greedy = []
    for e in (next(e for e in PROMPTS if e.id == i) for i in ids):
        p = TK.prompt(e)
        out = decode.generate(lm, jnp.array([p]), jnp.array([len(p)]), jax.random.key(0), max_new=5, temperature=0.0, eos_ids=sorted(TK.eos_ids))  # fmt: skip
        row = jax.device_get(out.batch)
        # places count from the end of the prompt that this rollout was padded to
        tokens = np.zeros(batch.tokens.shape[-1], int)
        mask = np.zeros(batch.tokens.shape[-1], bool)
        n = row.tokens.shape[-1]
        tokens[:n], mask[:n] = row.tokens[0, 0], row.mask[0, 0]
        weights = np.arange(1, len(tokens) + 1)
        greedy.append((np.where(mask, tokens, 0) * weights).sum() % 101)
    first = batch.advantages[batch.mask][0]
    assert first == pytest.approx(batch.feedback[0, 0] - greedy[0], abs=1e-3)


# -- chunks: never more than a step's worth at once


def test_a_step_worth_of_prompts_is_drawn_and_scored_at_once(lm, one):
    calls = []

    def counted(batch, texts, lms) -> np.ndarray:
        calls.append(len(texts))
        return codes(batch, texts, lms)

    make(lm, one, sampler(one, counted), batches=3).next(lm.params, 0)
    assert calls == [2, 2, 2]


def test_samples_do_not_depend_on_the_size_of_a_rollout(lm, one):
    small, large = make(lm, one), make(lm, one, batches=2)
    want = joined([small.next(lm.params, at) for at in range(2)])
    ids, got, found = [], [], []
    for at in range(2):
        got.append(large.next(lm.params, at))
        found += large.report()["ids"]
    small = make(lm, one)
    for at in range(2):
        small.next(lm.params, at)
        ids += small.report()["ids"]
    rows = [found.index(i) for i in ids]
    bare = joined([b._replace(old_logps=None) for b in got])
    equal(jax.tree.map(lambda x: x[rows], bare), want._replace(extra=None))


def joined(batches):
    return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def test_the_order_of_prompts_and_that_of_rows_are_two_draws(lm, one):
    source = make(lm, one, batch_size=5, epochs=2)
    source.next(lm.params, 0)
    order = np.array(selection.order(5, 5, 3)(0))
    twice = [PROMPTS[i].id for i in order[order]]
    assert source.report()["ids"] != twice


# -- dynamic sampling


def drawn(*differs):
    """A batch of groups of two, whose tokens number them."""
    drawn.number += 1
    n = len(differs)
    batch = group([(float(d), 0.0) for d in differs])
    batch.tokens[:, :, 0] = 10 * drawn.number + np.arange(n)[:, None]
    zeros = np.zeros(batch.mask.shape, np.float32)
    none = np.zeros((n, 2), bool)
    return samplers.Drawn(batch, zeros, none, np.array(differs), none, {})


def collect(plan, many, most):
    drawn.number = 0
    asked = []

    def answer(i):
        asked.append(i)
        return drawn(*plan[i])

    rows, got, tally = selection.differing(answer, many, most)
    assert asked == list(range(len(asked)))
    return rows.tolist(), got, tally


def test_groups_without_a_difference_are_replaced_until_there_are_enough():
    plan = [(True, False), (False, False), (True, True), (True, True)]
    rows, got, tally = collect(plan, 2, 9)
    assert rows == [0, 4]  # the sixth group is left over, the last two are not drawn
    assert got.batch.tokens[:, 0, 0].tolist() == [10, 30]
    assert got.batch.valid.all()
    assert tally == {"prompts": 6, "ties_dropped": 3, "surplus": 1, "unfilled": 0}


def test_at_the_bound_what_is_missing_is_not_valid():
    plan = [(True, False), (False, True), (False, False)]
    rows, got, tally = collect(plan, 4, 3)
    assert rows == [0, 3, 1, 2]
    assert got.batch.valid.all(1).tolist() == [True, True, False, False]
    assert tally == {"prompts": 6, "ties_dropped": 2, "surplus": 0, "unfilled": 2}


def test_without_any_difference_nothing_is_valid():
    _, drawn, counts = collect([(False, False)] * 3, 2, 2)
    assert not drawn.batch.valid.any()
    assert (counts["prompts"], counts["unfilled"]) == (4, 2)


def rare(batch, texts, lms) -> np.ndarray:
    """Most groups of two tie."""
    return (codes(batch, texts, lms) > 85).astype(np.float32)


def dynamic(lm, one, **more):
    more = {"group": 2, "dynamic_sampling": True, "max_draws": 50, **more}
    return make(lm, one, sampler(one, rare), **more)


def test_dynamic_sampling_skips_ties_and_nothing_else(lm, one):
    """Without it the same prompts get the same responses: leave out what ties."""
    source, plain = dynamic(lm, one), make(lm, one, sampler(one, rare), group=2)
    rows, ids = [], []
    for at in range(40):
        batch = plain.next(lm.params, at)
        differs = batch.feedback[:, 0] != batch.feedback[:, 1]
        rows.append(jax.tree.map(lambda x, d=differs: x[d], batch))
        ids.append(
            [i for i, d in zip(plain.report()["ids"], differs, strict=True) if d]
        )
    first = source.next(lm.params, 0)
    metrics = source.report()["metrics"]
    places = int(metrics["rollout/prompts"]) // 2
    assert places > 1
    equal(first, jax.tree.map(lambda x: x[:2], joined(rows[:places])))
    assert source.report()["ids"] == list(itertools.chain(*ids[:places]))[:2]
    assert sum(map(len, ids[: places - 1])) < 2  # no draw too many
    assert metrics["rollout/ties"] == 0
    thrown = metrics["rollout/ties_dropped"] + metrics["rollout/surplus"]
    assert thrown == metrics["rollout/prompts"] - 2
    equal(  # the next rollout begins where this one ended
        source.next(lm.params, 1), jax.tree.map(lambda x: x[:2], joined(rows[places:]))
    )


def test_dynamic_sampling_resumes_bit_for_bit(lm, one):
    for stop in (1, 2, 3):
        source = dynamic(lm, one, batches=2)
        for at in range(stop):
            source.next(lm.params, at)
        resumed = dynamic(lm, one, batches=2)
        resumed.restore(json.loads(json.dumps(source.state())))
        for at in range(stop, 5):
            equal(resumed.next(lm.params, at), source.next(lm.params, at))
            assert resumed.report()["ids"] == source.report()["ids"]


# -- an anchor's best response beside the group


@pytest.fixture(scope="module")
def teacher(make_lm, lm):
    return make_lm(lm.config, 7)


def test_the_last_slot_is_the_best_of_the_anchors_responses(lm, one, teacher):
    sample = sampler(one, lms={"ref": lm})
    more = {"shaping": steps("kl", "rloo"), "needs": ("ref_logps", "advantages")}
    plain = make(lm, one, sample, **more)
    source = make(lm, one, sample, anchor=lambda _: teacher, anchor_samples=4, **more)
    for at in range(2):
        want, batch = plain.next(lm.params, at), source.next(lm.params, at)
        assert batch.tokens.shape[:2] == (2, 4)
        bare = batch._replace(old_logps=None)  # only an anchor's batch has them
        own = jax.tree.leaves(want._replace(extra=None))
        for x, y in zip(jax.tree.leaves(bare), own, strict=True):
            np.testing.assert_allclose(x[:, :3], y, atol=2e-5)  # no shaping saw it
        last = jax.tree.map(lambda x: x[:, 3:], batch)
        assert not last.advantages.any()
        own = parallel.scorer(one)(teacher, last).logps
        np.testing.assert_allclose(last.old_logps, own, atol=2e-5)
        ref = parallel.scorer(one)(lm, last).logps
        np.testing.assert_allclose(last.ref_logps, ref, atol=2e-5)
        np.testing.assert_array_equal(last.feedback, codes(last, None, None))
        metrics = source.report()["metrics"]
        assert metrics["rollout/anchor_reward"] == pytest.approx(last.feedback.mean())
        assert metrics["rollout/reward"] == pytest.approx(want.feedback.mean())


def off(mesh, by):
    """A sampler whose log-probabilities are off by so many nats per token."""

    def generate(*args, **settings):
        out = parallel.generator(TK, mesh)(*args, **settings)
        return out._replace(raw_logps=out.raw_logps + by)

    return sampler(mesh)._replace(generate=generate)


def test_the_behaviour_policy_is_compared_with_the_kernel(lm, one, teacher):
    names = [
        f"rollout/{who}logp_gap{of}" for who in ("", "anchor_") for of in ("", "_max")
    ]
    for more in ({"anchor": lambda _: teacher}, {"behaviour": teacher, "needs": ()}):
        for by, low, high in ((0.0, -1.0, 2e-5), (0.25, 0.2499, 0.2501)):
            source = make(lm, one, off(one, by), **more)
            source.next(lm.params, 0)
            metrics = source.report()["metrics"]
            found = [metrics[n] for n in names if n in metrics]
            assert len(found) == (4 if "anchor" in more else 2)
            assert all(low < x < high for x in found)


def test_the_time_between_two_rollouts_is_that_of_the_updates(lm, one):
    source = make(lm, one, epochs=2)
    for at, slept in enumerate((0.0, 0.2, 0.3)):
        time.sleep(slept)
        source.next(lm.params, at)
        metrics = source.report()["metrics"]
        assert ("rollout/updating" in metrics) == (at == 2)
        assert ("rollout/sampling" in metrics) == (at != 1)
    assert metrics["rollout/updating"] >= 0.5


def test_the_best_of_more_is_better(lm, one, teacher):
    """Of 1 and of 16 of some hundred nearly distinct numbers: means 50 and 94."""

    def mean(n):
        source = make(
            lm, one, batch_size=20, anchor=lambda _: teacher, anchor_samples=n
        )
        return source.next(lm.params, 0).feedback[:, -1].mean()

    few, most = mean(1), mean(16)
    assert few < 75  # four standard errors of 29 / √20
    assert most > 85


def test_an_unfilled_place_is_empty_also_of_the_anchor(lm, one, teacher):
    source = dynamic(lm, one, batch_size=5, max_draws=1, anchor=lambda _: teacher)
    batch = source.next(lm.params, 0)
    unfilled = int(source.report()["metrics"]["rollout/unfilled"])
    assert 0 < unfilled < 5
    assert batch.valid.tolist() == [[i < 5 - unfilled] * 3 for i in range(5)]


def test_the_anchor_may_be_the_policys_average(lm, one, teacher):
    fixed = make(lm, one, anchor=lambda _: teacher)
    moving = make(lm, one, anchor=lambda average: LM(lm.config, average))
    equal(moving.next(lm.params, 0, teacher.params), fixed.next(lm.params, 0))
    other = moving.next(lm.params, 1, lm.params)
    assert (other.tokens != fixed.next(lm.params, 1).tokens).any()


def test_an_anchor_beside_part_of_a_group_or_a_critic_is_refused(lm, one, teacher):
    for more in ({"keep": "best"}, {"needs": ("old_values",)}):
        with pytest.raises(ValueError, match=r"rollout\.anchor is a slot beside"):
            make(lm, one, anchor=lambda _: teacher, **more)


def test_examples_with_other_columns_are_named(lm, one):
    some = [PROMPTS[0]._replace(columns={"gold": 1.0}), *PROMPTS[1:]]
    with pytest.raises(ValueError, match=r"p1 has columns \[\], p0 has \['gold'\]"):
        make(lm, one, examples=some)


# -- samples of the reference


def test_a_greedy_baseline_of_another_reward_is_refused(lm, one):
    baseline = lambda: {e.id: np.zeros(2, np.float32) for e in PROMPTS}  # noqa: E731
    with pytest.raises(ValueError, match=r"remax compares with the raw reward.*ctrl"):
        make(lm, one, shaping=steps("ctrl", "remax"), baseline=baseline)


def test_two_prompts_of_one_id_are_refused(lm, one):
    twice = [PROMPTS[0], PROMPTS[0]]
    with pytest.raises(ValueError, match="one id"):
        samplers.reference_rewards(twice, sampler(one), lm, samples=2, rows=4, length=16, seed=0)  # fmt: skip


def test_prompts_that_a_run_does_not_meet_are_not_sampled():
    assert len(selection.visited(PROMPTS, 2, 0, 1)) == 2
    assert len(selection.visited(PROMPTS, 2, 0, 3)) == 5


# -- rewards that break


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda text: 1 / 0, r"ZeroDivisionError.*on the response '.+'"),
        (lambda text: float("nan"), r"gave nan for the response '.+'"),
        (lambda batch, texts, lms: np.zeros(3), r"gave shape \(3,\), expected .* = \(2, 3\)"),
    ],
)  # fmt: skip
def test_a_reward_that_breaks_names_the_text(lm, one, reward, message):
    source = make(lm, one, sampler(one, reward))
    with pytest.raises(ValueError, match=message):
        source.next(lm.params, 0)


@pytest.mark.parametrize("break_down", [lambda: float("nan"), lambda: 1 / 0])
def test_a_reward_that_breaks_on_an_invalid_response_does_no_harm(break_down):
    batch = group([(1.0, 2.0)], [[True, False]])
    bound = plugin.bind(lambda text: break_down() if text == "b" else 1.0)
    assert rewards.call(bound, batch, [["a", "b"]], {}).tolist() == [[1.0, 0.0]]


def test_dynamic_sampling_that_finds_no_difference_is_an_empty_rollout(lm, one):
    source = make(lm, one, sampler(one, always), dynamic_sampling=True, max_draws=2)
    batch = source.next(lm.params, 0)
    assert not batch.valid.any()
    metrics = source.report()["metrics"]
    assert (metrics["rollout/empty"], metrics["rollout/unfilled"]) == (1, 2)
    for _ in range(8):
        source.next(lm.params, 0)
    with pytest.raises(ValueError, match="or no group has a difference in its rewards"):
        source.next(lm.params, 0)


def test_the_best_of_more_responses_than_there_are_is_refused(lm, one):
    with pytest.raises(
        ValueError, match=r"the best of k=4 cannot be taken of rollout\.group=3"
    ):
        make(lm, one, shaping=steps("pass_at_k", pass_at_k={"k": 4}))
    make(lm, one, shaping=steps("pass_at_k", pass_at_k={"k": 3}))


def test_a_prompt_without_a_greedy_reward_has_no_advantage(lm, one):
    """Its baseline is not known, and 0 is none."""
    fails = []

    def but_greedy(texts, rows):
        if len(texts[0]) == 1:  # the greedy response
            fails.append(1)
            return [[None] if b == 0 else [5.0] for b in range(len(texts))]
        return [[5.0 + g for g in range(len(t))] for t in texts]

    some = sampler(one, but_greedy, invalid_rewards=0.5)
    batch = make(lm, one, some, shaping=steps("remax")).next(lm.params, 0)
    assert fails
    assert batch.valid.tolist() == [[False] * 3, [True] * 3]
    assert not batch.advantages[0].any()
    np.testing.assert_allclose(batch.advantages[1].max(-1), [0, 1, 2])
