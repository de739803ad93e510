"""Continuous batching beside `decode.generate`, prompt by prompt, with the same seeds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.decoders import contrastive
from alignax.models import sharding, transformer
from alignax.sampling import automaton, continuous, decode, guides, prefill

KEY = jax.random.key(5)
EOS = (3, 11)
NEW = 9
SIZES = (4, 27, 12, 7, 30, 9, 28, 5)  # of prompts: widths 16 and 32, rows of 64


@pytest.fixture(autouse=True, scope="module")
def narrow():
    """Narrow classes: fewer and smaller programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous, "SMALLEST", 16)
        patch.setattr(continuous, "TOGETHER", {"cpu": 32})
        yield


@pytest.fixture(scope="module")
def lm(make_lm, tiny_config):
    return make_lm(dataclasses.replace(tiny_config, num_layers=1))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(1, 37, size).tolist() for size in SIZES]


def answers(lm, prompts, chunk=3, **settings):
    """{prompt: (response ids, raw log-probabilities, sampled ones, truncated)} by group."""
    found = {}
    asked = {"rows": 4, "longest": 64, "max_new": NEW, "eos_ids": EOS, "group": 2}
    asked |= settings
    for places, out in continuous.generate(lm, prompts, KEY, chunk=chunk, **asked):
        assert out.batch.tokens.shape[0] == chunk
        for b, i in enumerate(places):
            assert i not in found
            found[i] = rows(out, b)
    assert {*found} == {*range(len(prompts))} - {*settings.get("skip", ())}
    return found


def rows(out, b):
    fields = out.batch.tokens, out.raw_logps, out.batch.old_logps
    return [
        (*(np.asarray(x)[b, g][np.asarray(out.batch.mask)[b, g]] for x in fields),
         bool(out.truncated[b, g]))
        for g in range(out.batch.tokens.shape[1])
    ]  # fmt: skip


def alone(lm, prompts, own=lambda places: {}, **settings):
    """The same by `decode.generate`, one prompt at a time."""
    found = {}
    for i, prompt in enumerate(prompts):
        tokens = np.zeros((1, 40), np.int32)
        tokens[0, : len(prompt)] = prompt
        asked = {"max_new": NEW, "eos_ids": EOS, "group": 2, **settings}
        asked |= {"seeds": np.array([i]), **own([i])}
        out = decode.generate(lm, tokens, np.array([len(prompt)]), KEY, **asked)
        found[i] = rows(jax.device_get(out), 0)
    return found


def assert_same(got, want):
    for i, group in want.items():
        for a, b in zip(got[i], group, strict=True):
            assert a[0].tolist() == b[0].tolist(), i
            np.testing.assert_allclose(a[1], b[1], atol=1e-5)
            np.testing.assert_allclose(a[2], b[2], atol=1e-5)
            assert a[3] == b[3]


def per_prompt(places):
    """Settings that differ from prompt to prompt."""
    places = np.array(places)
    forced = np.full((len(places), 2), -1)
    forced[:, 0] = np.where(places % 2, 8, -1)
    return {
        "limits": 2 + places % 5, "prefill": np.stack([places + 1, places + 2], 1),
        "prefill_lengths": 1 + places % 2, "forced": forced,
        "temperature": np.where(places % 3, 1.0, 0.0),
    }  # fmt: skip


SETTINGS = {
    "sampled": {},
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.3},
    "processors": {
        "stops": automaton.stop_sequences([[5, 6], [20]], 37), "min_new": 2,
        "logit_bias": {20: 1.0}, "frequency_penalty": 0.7, "top_k": 9, "top_p": 0.9,
    },
    "own": {"own": per_prompt, "temperature": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_responses_are_those_of_generate(lm, prompts, name):
    assert_same(
        answers(lm, prompts, **SETTINGS[name]), alone(lm, prompts, **SETTINGS[name])
    )


@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_a_guide_starts_anew_with_every_prompt(lm, make_lm, prompts, kind):
    if kind == "vector":
        guide = contrastive.guide({"amateur": make_lm(lm.config, 3)})
    else:
        guide = guides.Guide(_count, _odd, "scalar")
    settings = {"guide": guide, "candidates": 5}
    assert_same(answers(lm, prompts, **settings), alone(lm, prompts, **settings))


def test_a_guide_reads_the_prompts_that_it_is_given(lm, prompts):
    """Each response has a guide prompt of its own; the guide's model is the target."""
    guide = contrastive.guide({"amateur": lm}, weight=1.0, plausible=0.0)
    other = np.random.default_rng(4).integers(1, 37, (len(prompts), 6))

    def own(places):
        sizes = 3 + np.array(places) % 4
        return {"guide_prompts": other[places], "guide_lengths": sizes}

    settings = {"guide": guide, "own": own}
    assert_same(answers(lm, prompts, **settings), alone(lm, prompts, **settings))


def _count(tokens, lengths, length):
    del tokens, length
    return lengths * 0


def _odd(state, tokens, start, logits):
    """The number of odd tokens so far, the prompt's last one included."""
    del start, logits
    after = state[:, None] + (tokens % 2).cumsum(1)
    states = jnp.concatenate([state[:, None], after], 1)
    return after.astype(jnp.float32) / 2, states


def test_a_prefix_is_read_once(lm, prompts):
    prefix = [9, 8, 7, 6]
    longer = [[*prefix, *p] for p in prompts]
    reader = prefill.after(lm, prefix)
    got = answers(lm, longer, reader=reader, shared=4)
    assert_same(got, alone(lm, longer))


def test_a_response_does_not_depend_on_what_runs_beside_it(lm, prompts):
    """Bit for bit, whatever other prompts have their responses already."""
    whole = answers(lm, prompts)
    for some in ([6, 0, 3], [7, 2], [1], [5, 4, 3, 2, 1, 0]):
        skip = {*range(len(prompts))} - {*some}
        got = answers(lm, prompts, skip=skip)
        for i in some:
            for a, b in zip(got[i], whole[i], strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)), i


def test_rows_of_similar_lengths_run_together():
    sizes = np.array([20, 150, 300, 600, 1200, 2500])
    assert continuous.together(sizes, 1) == [[5, 4], [3, 2, 1], [0]]
    assert continuous.together(sizes, 2) == [[5, 4], [3, 2, 1, 0]]
    assert continuous.together(sizes, 3) == [[5, 4, 3], [2, 1, 0]]
    assert continuous.together(sizes, 4) == [[5, 4, 3, 2, 1, 0]]
    assert continuous.together(np.array([7, 7, 9]), 8) == [[2, 0, 1]]


def test_a_group_shares_a_prefill(lm, prompts, monkeypatch):
    """Whatever the number of rows, each prompt is read once."""
    read, admit = [], continuous._admit
    monkeypatch.setattr(
        continuous, "_admit",
        lambda *a, **k: read.append(len(a[2].prompts)) or admit(*a, **k),
    )  # fmt: skip
    answers(lm, prompts)
    assert sum(read) == len(prompts)


def test_a_row_that_ended_does_not_wait_for_the_others(lm, prompts):
    """One response is long, 15 are short: the short ones take turns beside it."""
    many = [prompts[0]] * 16
    limits = np.array([24, *[3] * 15])
    for _, out in continuous.generate(
        lm, many, KEY, rows=4, longest=64, max_new=24, chunk=4,
        own=lambda places: {"limits": limits[places]},
    ):  # fmt: skip
        steps = int(out.stats["steps"])
    # batches of 4 would take 24 + 3 + 3 + 3; here 15 x 3 tokens in 3 rows are 15 steps
    assert steps == 24


def test_it_ends_when_asked_with_what_is_finished(lm, prompts):
    calls = []
    found = []
    for places, _ in continuous.generate(
        lm, prompts, KEY, rows=4, longest=64, max_new=NEW, chunk=1, eos_ids=EOS,
        group=2, halt=lambda: calls.append(1) or len(calls) == 5,
    ):  # fmt: skip
        found += places
    assert len(calls) == 5
    assert 0 < len(found) < len(prompts)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 2)])
def test_rows_may_lie_on_several_devices(lm, prompts, shape):
    mesh = sharding.make_mesh(shape)
    placed = lm._replace(params=sharding.placed(lm.params, mesh))
    assert_same(answers(placed, prompts, mesh=mesh), answers(lm, prompts))


def test_rows_are_no_longer_than_asked(lm, prompts):
    """The longest prompt is 30 tokens: it is padded to 31, and not to 32."""
    shapes = set()
    for _, out in continuous.generate(
        lm, prompts, KEY, rows=4, longest=40, max_new=NEW, eos_ids=EOS, group=2
    ):  # fmt: skip
        shapes.add(out.batch.tokens.shape[2])
    assert shapes == {40}


def test_no_prompts_have_no_responses(lm):
    assert answers(lm, []) == {}


def test_wrong_arguments_are_named(lm, prompts):
    with pytest.raises(ValueError, match=r"rows=4, group=5"):
        answers(lm, prompts, group=5)
    with pytest.raises(ValueError, match=r"top_p is 2"):
        answers(lm, prompts, top_p=2.0)
    with pytest.raises(ValueError, match=r"line 1 has no token to draw"):
        answers(lm, prompts, logit_bias=np.full(37, -np.inf), name="line {}".format)
    with pytest.raises(ValueError, match=r"guide.kind is 'block'"):
        answers(lm, prompts, guide=guides.Guide(_count, _odd, "block"))
    with pytest.raises(ValueError, match=r"candidates=0"):
        answers(lm, prompts, candidates=0)


def test_layers_are_taken_apart_once_and_tables_are_not_copied(tiny_lm):
    apart = continuous.unstacked(tiny_lm)
    assert isinstance(apart.params["blocks"], tuple)
    assert apart.params["embed"] is tiny_lm.params["embed"]
    assert continuous.unstacked(apart) is apart
    want = transformer.unstack(tiny_lm).params["blocks"]
    jax.tree.map(np.testing.assert_array_equal, apart.params["blocks"], want)
