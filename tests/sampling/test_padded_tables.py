"""One tokenizer, tables padded to different sizes: only common ids are drawn, exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import chi_square, decoding
from oracles import transformer as oracle

from alignax import logprob
from alignax.batch import LM
from alignax.decoders import contrastive, nudging, proxy, safe_decoding
from alignax.models import transformer
from alignax.sampling import decode, drafts
from alignax.sampling.speculate import speculate
from alignax.search import hypotheses

pytestmark = pytest.mark.slow

IDS, V, NEW = 5, 7, 3  # ids of the tokenizer, rows of the target's table
PROMPT = np.array([[3, 1, 4]])
EOS = (0,)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def make(tiny_config, make_lm):
    """make(size, seed): an LM whose table has `size` rows."""

    def one(size, seed=0):
        config = dataclasses.replace(tiny_config, vocab_size=size, num_layers=1)
        return make_lm(config, seed)

    return one


def run(function, *lms, many=4096, **settings):
    settings = dict(max_new=NEW, eos_ids=EOS, group=many) | settings
    out = function(*lms, jnp.asarray(PROMPT), jnp.array([3]), KEY, **settings)
    return jax.tree.map(np.asarray, out)


def exact(lm):
    """ids -> log-probabilities of the next one, float64 [size], of the whole table."""
    with jax.enable_x64(True):
        params = oracle.float64(lm.params)
        rows = jax.jit(
            lambda ids: jax.nn.log_softmax(oracle.logits(lm.config, params, ids))
        )

    @functools.cache
    def call(ids):
        padded = np.zeros(PROMPT.size + NEW, int)
        padded[: len(ids)] = ids
        with jax.enable_x64(True):
            return np.asarray(rows(padded))[len(ids) - 1]

    return lambda ids: call(tuple(map(int, ids)))


def follows(out, logits):
    """The p-value of the responses under the exact distribution of next-token logits."""
    want = decoding.distribution(logits, PROMPT[0].tolist(), max_new=NEW, eos_ids=EOS)
    want = {y: mass for y, mass in want.items() if mass}
    counts = dict.fromkeys(want, 0)
    for tokens, mask in zip(out.batch.tokens[0], out.batch.mask[0], strict=True):
        counts[tuple(tokens[mask].tolist())] += 1  # KeyError: impossible
    return chi_square.p_value(
        list(counts.values()), [mass * len(out.batch.mask[0]) for mass in want.values()]
    )


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 3}, {"repetition_penalty": 1.3}, {"temperature": 0.0}]
)
def test_what_pads_the_table_is_never_drawn(make, settings):
    lm = make(V)
    # the rows that pad the table are the most likely by far
    out = run(decode.generate, transformer.limit_ids(louder(lm), IDS), **settings)
    assert out.batch.tokens.max() < IDS
    plain = run(decode.generate, louder(lm), **settings)
    assert plain.batch.tokens.max() >= IDS


def louder(lm):
    """The LM with a head in which the last rows have large weights."""
    name, axis = ("embed", 0) if lm.config.tied else ("head", 1)
    scale = np.where(np.arange(V) < IDS, 1.0, 4.0)
    table = lm.params[name] * jnp.expand_dims(jnp.asarray(scale), 1 - axis)
    return LM(lm.config, {**lm.params, name: table})


def test_old_logps_are_renormalised_and_raw_logps_are_not(make):
    """The distribution of the draw; and the unmodified policy, as the kernel reads it."""
    lm = make(V)
    next_logps = exact(lm)
    out = run(decode.generate, transformer.limit_ids(lm, IDS), many=8)
    for g in range(8):
        tokens, mask = out.batch.tokens[0, g], out.batch.mask[0, g]
        for t in np.flatnonzero(mask):
            whole = next_logps(tokens[:t])
            known = whole[:IDS] - np.log(np.exp(whole[:IDS]).sum())
            got = out.batch.old_logps[0, g, t], out.raw_logps[0, g, t]
            want = known[tokens[t]], whole[tokens[t]]
            np.testing.assert_allclose(got, want, atol=1e-4)
    again = logprob.score(lm, jax.tree.map(jnp.asarray, out.batch)).logps
    np.testing.assert_allclose(out.raw_logps, again, atol=1e-5)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("size", [4, 9])
def test_a_draft_of_another_size_changes_no_distribution(make, size, rule):
    """Every response: also with ids that the draft lacks, and none of its own."""
    lm, draft = make(V), make(size, 1)
    out = run(speculate, lm, draft, rule=rule, draft_length=2)
    assert follows(out, exact(lm)) > 1e-3
    assert out.batch.tokens.max() == V - 1
    assert 0 < out.stats["accepted"][0] < 1


def test_a_draft_is_limited_to_what_the_target_draws(make):
    lm, next_logps = transformer.limit_ids(make(V), IDS), exact(make(V))
    for draft in (make(V, 1), make(9, 1), drafts.model(make(4, 1))):
        out = run(speculate, lm, draft, draft_length=2)
        assert out.batch.tokens.max() < IDS
        assert follows(out, lambda ids: next_logps(ids)[:IDS]) > 1e-3


def test_a_greedy_draft_of_another_size_says_what_plain_greedy_says(make):
    lm = make(V)
    plain = run(decode.generate, lm, many=1, temperature=0.0)
    for size in (4, 9):
        fast = run(speculate, lm, make(size, 1), many=1, temperature=0.0)
        np.testing.assert_array_equal(fast.batch.tokens, plain.batch.tokens)


GUIDES = {
    "proxy": lambda lms: proxy.guide(lms, expert="a", base="b", weight=0.8),
    "contrastive": lambda lms: contrastive.guide(lms, amateur="a", plausible=0.01),
    "nudging": lambda lms: nudging.guide(lms, nudge="a", gamma=0.6),
    "safe_decoding": lambda lms: safe_decoding.guide(lms, expert="a", common=3),
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("sizes", [(V, 9, 8), (V, 9, 5), (V, 5, V), (5, V, 9)])
def test_a_guide_of_other_sizes_is_the_guide_of_the_common_ids(make, name, sizes):
    """Against LMs whose tables were cut to those ids, with the same key."""
    lms = {k: make(s, i) for i, (k, s) in enumerate(zip("tab", sizes, strict=True))}
    used = [lms[k].config.vocab_size for k in ("tab" if name == "proxy" else "ta")]
    cut = {
        k: cut_table(lms[k], min(used)) for k in ("tab" if name == "proxy" else "ta")
    }
    got = run(decode.generate, lms["t"], guide=GUIDES[name](lms), many=64)
    tokens, mask = got.batch.tokens[0], got.batch.mask[0]
    assert tokens.max() < min(used)
    want = np.asarray(tilted(cut, GUIDES[name](cut)[:2], tokens))
    np.testing.assert_allclose(got.batch.old_logps[0][mask], want[mask], atol=1e-4)


def cut_table(lm, size):
    axes = {"embed": 0} if lm.config.tied else {"embed": 0, "head": 1}
    tables = {
        k: jax.lax.slice_in_dim(lm.params[k], 0, size, axis=a) for k, a in axes.items()
    }
    config = dataclasses.replace(lm.config, vocab_size=size)
    return LM(config, {**lm.params, **tables})


@jax.jit
def tilted(lms, guide, tokens):
    """[N, T] log-probabilities of the given responses, guided, in one block."""
    lm, start = lms["t"], jnp.full(len(tokens), PROMPT.size)
    block = tokens[:, PROMPT.size - 1 : -1]
    logits = logprob.rows(lm, transformer.hidden(lm, tokens)[0])[
        :, PROMPT.size - 1 : -1
    ]
    init, update = guide
    state = init(tokens[:, : PROMPT.size], start, tokens.shape[1])
    logps = jax.nn.log_softmax(update(state, block, start - 1, logits)[0])
    new = tokens[:, PROMPT.size :, None]
    found = jnp.take_along_axis(logps, new, -1)[..., 0]
    return jnp.pad(found, ((0, 0), (PROMPT.size, 0)))


def test_a_search_with_a_draft_draws_common_ids(make):
    lm, draft = hypotheses.with_draft(make(V), {"d": make(5, 1)}, "d")[::-1]
    assert lm.config.vocab_size == draft.config.vocab_size == 5
    h = hypotheses.start(PROMPT, np.array([3]), NEW)
    wide, _ = hypotheses.extend(lm, h, KEY, tokens=NEW, group=64)
    assert wide.tokens.max() < 5
    assert hypotheses.next_best(lm, h, 9)[1].shape == (1, 1, 5)


def test_no_limit_is_the_same_model(make):
    lm = make(V)
    assert transformer.limit_ids(lm, V) is lm
    assert transformer.limit_ids(lm, 99) is lm
    assert transformer.limit_ids(lm, IDS).params is lm.params
