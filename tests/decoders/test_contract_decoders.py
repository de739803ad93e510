"""What every decoder owes, found by walking alignax/decoders: a new file needs a row here
only where it needs something special.

A guide is read as the engines read it: its state before the last token of a ragged prompt,
then a block of tokens. A search runs on a tiny model under a judge that weighs tokens.
"""

import dataclasses
import functools
import importlib
import inspect
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import batch as batches
from alignax import logprob, plugin
from alignax.batch import LM
from alignax.configs import generate
from alignax.models import transformer
from alignax.models.transformer import ModelConfig
from alignax.sampling import automaton, guides
from alignax.text import tokenizer
from alignax.text.encoder import FunctionEncoder

FOUND = {name: plugin.load("decoders", name) for name in plugin.available("decoders")}
GUIDES = [name for name, bound in FOUND.items() if bound.role == "guide"]
SEARCHES = [name for name, bound in FOUND.items() if bound.role == "search"]
V, P, NEW, K = 7, 8, 4, 3
PROMPTS = np.array([[3, 1, 4, 1, 5, 0, 0, 0], [1, 2, 1, 5, 0, 0, 0, 0]])
LENGTHS = np.array([5, 4])
OTHER_PROMPT = [1, 6, 1, 6, 0, 0, 0, 0]
BLOCK = np.array([[1, 6, 2], [4, 0, 5]])
EOS = (0,)
CONFIG = ModelConfig(
    vocab_size=V, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
    mlp_width=8, max_length=32, value_head=True,
)  # fmt: skip
TESTS = pathlib.Path(__file__).parents[1]
LETTERS = "$ abcde"  # of the ids, the first being EOS
TEXT = dataclasses.replace(
    tokenizer.load("bytes"), vocab_size=V, eos_ids=frozenset(EOS), eos_id=0, bos_id=None,
    encoder=FunctionEncoder(lambda text: [LETTERS.index(c) for c in text], {"\x00": 0}),
    _decode=lambda ids, keep: "".join(LETTERS[i] for i in ids if i or keep),
)  # fmt: skip

# -- what is special, by decoder

PAIR = ({"name": "proxy"}, {"name": "contrastive"})
SMALL = {  # hyper-parameters that keep a run small
    "chain": {"guides": PAIR},
    "best_of_n": {"n": 3},
    "conditional_beam": {"beams": 2, "top_k": 3},
    "controlled_blocks": {"n": 3, "block": 2},
    "deal": {"top_k": 2, "lookahead": 2},
    "gsi": {"n": 3, "step": 2},
    "nudging_words": {"chunk": 2, "rounds": 3},
    "pine": {"separator": LETTERS[1]},
    "rain": {
        "sizes": (2, 2),
        "sets": 3,
        "top_k": 3,
        "rollout": 2,
        "simulations": 6,
        "extra": 2,
    },
    "rsd": {"step": 2, "delta": 0.3},
    "transfer_q": {"candidates": 2, "rollouts": 2},
    "speculative_rejection": {"n": 4, "every": 2},
}
OTHER = {  # another value, where the default does not suggest one
    ("chain", "guides"): PAIR[::-1],
    ("best_of_n", "sampling"): {"top_k": 1},
    ("controlled_blocks", "sampling"): {"top_k": 1},
    ("best_of_n", "lam"): 1e-3,
    ("deal", "hi"): 1000.0,
    ("deal", "lo"): -1000.0,
    ("pine", "sampling"): {"top_k": 1},
    ("rain", "embed"): lambda batch: np.ones((*batch.tokens.shape[:2], 2)),
    ("gsi", "step_ids"): tuple(range(1, V)),
    ("rain", "clause_ids"): (1, 2, 4, 5, 6),
    ("rain", "settled_value"): 0.01,
    ("rain", "settled_visits"): 1,
    ("rain", "sizes"): (1, 2),
    ("rsd", "step_ids"): tuple(range(1, V)),
    ("speculative_rejection", "sampling"): {"top_k": 1},
    ("steering", "layers"): (1,),
    ("steering", "vectors"): ((1.0,) * 8,),
}
BESIDE = {  # where a hyper-parameter matters only beside another value of another one
    ("best_of_n", "lam"): {"select": "soft"},
    ("controlled", "reference"): {"head": "q"},
    ("controlled", "scale"): {"head": "q"},
    ("deal", "lo"): {"prune": True, "lam": 0.05},
    ("deal", "hi"): {"prune": True, "lam": 0.05},
    ("rain", "embed"): {"simulations": 30},
    ("rain", "settled_value"): {"settled_visits": 1, "simulations": 12, "extra": 9},
    ("rain", "settled_visits"): {"settled_value": 0.01, "simulations": 12, "extra": 9},
    ("steering", "layers"): {"model": "deep"},
    ("transfer_q", "beta"): {"variant": "indirect", "alpha": 0.02},
    ("transfer_q", "reference"): {"variant": "indirect", "alpha": 0.02},
}
GREEDY = {
    "conditional_beam",
    "deal",
    "nudging_words",
}  # searches that draw nothing by the key
UNJUDGED = {"nudging_words", "pine"}  # searches that need no judge
ELSEWHERE = {  # hyper-parameters that do nothing here, and what changes them elsewhere
    ("nudging_words", "gamma"): "gamma=0.0",  # these models say no two words
    ("nudging_words", "nudge_tokenizer"): 'nudge_tokenizer="bytes"',
    ("nudging_words", "repeats"): "repeats=9",
    ("pine", "separator"): '"separator": "and"',
    (
        "rain",
        "alike",
    ): "alike=",  # trees are made up in tests/search/test_tree_search.py
    ("rain", "exploration"): "exploration=exploration",
    ("rain", "most"): "Rules(most=most)",
    ("rain", "share"): "share",
    ("rain", "spread"): "spread",
    ("rain", "uniform"): "_mix(",
}
AFTER_STOPS = {  # what a search draws behind a stop decides too, if it goes on
    "conditional_beam": "log p of all tokens",
    "gsi": "log p of a whole step",
    "rain": "the embeddings of texts",
    "speculative_rejection": "who is rejected",
}
LONG = {  # guides that know where the response began: here they are far from its end
    "safe_decoding": {"first": 100},
}


@functools.cache
def model(name: str) -> LM:
    """An LM with a scalar head, every parameter random; another name is another LM.

    It has one layer, as decoding compiles each; the one named "deep" has two.
    """
    config = dataclasses.replace(CONFIG, num_layers=1 + (name == "deep"))
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    rng = np.random.default_rng(zlib.crc32(name.encode()))

    def one(path, leaf):
        mean = path[-1].key == "scale"
        return jnp.asarray(rng.normal(mean, 0.5, leaf.shape), leaf.dtype)

    return LM(config, jax.tree_util.tree_map_with_path(one, shapes))


class Models(dict):
    """Whatever name a decoder asks for."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return model(name)


LMS = Models()


def module(name):
    return importlib.import_module(f"alignax.decoders.{name}")


def hyper(name, **changes):
    return SMALL.get(name, {}) | changes


def alternatives(name, key):
    """Other values of a hyper-parameter that it allows."""
    if (name, key) in OTHER:
        return [OTHER[name, key]]
    default = {**FOUND[name].hyper, **SMALL.get(name, {})}[key]
    choices = getattr(module(name), f"{key.upper()}S", None)
    if isinstance(default, bool):
        found = [not default]
    elif isinstance(default, str):
        found = [x for x in choices if x != default] if choices else LETTERS[2:]
        found = list(found)  # or the name of another LM
    elif isinstance(default, int | float):
        found = [default + 1, default - 1, 2 * default, default / 2, 0.3, 0.7]
        found = [type(default)(x) for x in found if np.isfinite(x)]
    else:
        raise AssertionError(f"{name}: OTHER needs a value for {key}")

    def allowed(value):
        try:
            plugin.load("decoders", name, {key: value})
        except ValueError:
            return False
        return value != default

    return [x for x in dict.fromkeys(found) if allowed(x)]


def differ(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) != len(b) or any(
        np.shape(x) != np.shape(y)
        or not np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def changes_something(name, run):
    """Every hyper-parameter of a decoder, one at a time, in `run(**hyper)`."""
    found = {}

    def plain(beside):
        if repr(beside) not in found:
            found[repr(beside)] = run(**beside)
        return found[repr(beside)]

    for key in FOUND[name].hyper:
        if text := ELSEWHERE.get((name, key)):
            own = (TESTS / f"decoders/test_{name}.py").read_text()
            if name == "rain":
                own += (TESTS / "search" / "test_tree_search.py").read_text()
            assert text in own, f"{name}: no test changes {key}"
            continue
        beside = hyper(name) | BESIDE.get((name, key), {})
        assert any(
            differ(run(**(beside | {key: value})), plain(beside))
            for value in alternatives(name, key)
        ), f"{name}: {key} changes nothing"


# -- guides


@functools.partial(jax.jit, static_argnames="length")
def start(init, tokens, lengths, length=P + NEW):
    return init(tokens, lengths, length)


@jax.jit
def step(update, state, tokens, at, logits):
    return update(state, tokens, at, logits)


@jax.jit
def kept(keep, states, accepted):
    return keep(states, accepted)


def made(name, **changes):
    """(guide, its three functions as the engines call them)."""
    guide = FOUND[name].function(LMS, **hyper(name, **changes))
    return guide, guides.traced(guide)


def logits_of(kind, seed=0):
    """Logits [N, K, V] after the logits processors, with holes; None for a scalar guide."""
    if kind != "vector":
        return None
    rng = np.random.default_rng(seed)
    z = jax.nn.log_softmax(jnp.float32(rng.normal(size=(2, K, V))))
    return z.at[:, :, 1].set(-jnp.inf).at[0, 1, 4].set(-jnp.inf)


def last(tokens, lengths):
    return np.take_along_axis(tokens, lengths[:, None] - 1, 1)


def block():
    """The last token of each prompt and what follows it: what an engine hands in."""
    return np.concatenate([last(PROMPTS, LENGTHS), BLOCK[:, : K - 1]], 1)


def read(name, **changes):
    """(kind, out, states, functions) of one block."""
    guide, (init, update, keep) = made(name, **changes)
    state = start(init, PROMPTS, LENGTHS)
    logits = logits_of(guide.kind)
    out, states = step(update, state, block(), LENGTHS - 1, logits)
    return guide, out, states, (init, update, keep)


each_guide = pytest.mark.parametrize("name", GUIDES)
each_search = pytest.mark.parametrize("name", SEARCHES)


def test_the_walk_finds_the_decoders():
    assert "proxy" in GUIDES
    assert "best_of_n" in SEARCHES
    named = {
        *SMALL,
        *GREEDY,
        *UNJUDGED,
        *LONG,
        *(name for name, _ in (*OTHER, *BESIDE)),
    }
    assert named <= set(FOUND), "a special row of a decoder that is not there"


@each_guide
def test_the_distribution_sums_to_one_and_what_is_masked_stays_masked(name):
    guide, out, _, _ = read(name)
    out = np.asarray(out)
    if guide.kind == "scalar":
        assert out.shape == (2, K)
        assert np.isfinite(out).all()
        return
    assert guide.kind == "vector"
    assert out.shape == (2, K, V)
    assert not np.isnan(out).any()
    assert not np.isposinf(out).any()
    assert np.isneginf(out[np.isneginf(logits_of("vector"))]).all()
    distribution = np.exp(out.astype(np.float64) - out.max(-1, keepdims=True))
    distribution /= distribution.sum(-1, keepdims=True)
    np.testing.assert_allclose(distribution.sum(-1), 1, rtol=1e-12)
    assert (distribution[:, :, 1] == 0).all()


@each_guide
def test_its_bounds_hold(name):
    guide, out, _, _ = read(name)
    out = np.asarray(out)
    if guide.kind == "scalar":
        assert (out >= guide.lo).all()
        assert (out <= guide.hi).all()
        return
    given = np.asarray(logits_of("vector"))
    real = np.isfinite(given) & np.isfinite(out)
    tilt = (out - np.where(real, given, 0))[real]
    assert (tilt >= guide.lo - 1e-5).all()
    assert (tilt <= guide.hi + 1e-5).all()


@each_guide
def test_a_block_is_its_tokens_one_by_one(name):
    guide, want, _, (init, update, keep) = read(name)
    state, logits = start(init, PROMPTS, LENGTHS), logits_of(guide.kind)
    for i in range(K):
        one = None if logits is None else logits[:, i : i + 1]
        out, states = step(update, state, block()[:, i : i + 1], LENGTHS - 1 + i, one)
        np.testing.assert_allclose(out[:, 0], want[:, i], rtol=1e-4, atol=1e-5)
        state = kept(keep, states, np.ones(2, int))


@each_guide
def test_the_state_of_an_accepted_prefix_is_that_of_its_own_prompt(name):
    """Rows accept as many tokens as they do; a rejected one must leave no trace."""
    guide, _, states, (init, update, keep) = read(name, **LONG.get(name, {}))
    accepted = np.array([1, K])
    state = kept(keep, states, accepted)
    lengths = LENGTHS + accepted
    prompts = PROMPTS.copy()
    for row, (n, many) in enumerate(zip(LENGTHS, accepted, strict=True)):
        prompts[row, n : n + many] = BLOCK[row, :many]
    fresh = start(init, prompts, lengths)
    logits = logits_of(guide.kind, seed=1)
    after = np.concatenate([last(prompts, lengths), [[2, 3], [6, 1]]], 1)
    got, _ = step(update, state, after, lengths - 1, logits)
    want, _ = step(update, fresh, after, lengths - 1, logits)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@each_guide
def test_a_row_does_not_see_its_neighbour(name):
    guide, want, _, (init, update, _) = read(name)
    prompts = PROMPTS.copy()
    prompts[1] = OTHER_PROMPT
    tokens = block()
    tokens[1] = [6, 3, 3]
    state = start(init, prompts, LENGTHS)
    out, _ = step(update, state, tokens, LENGTHS - 1, logits_of(guide.kind))
    np.testing.assert_allclose(out[0], want[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(out[1], want[1])


@each_guide
def test_every_hyper_parameter_changes_a_guide(name):
    def run(**changes):
        guide, out, _, _ = read(name, **changes)
        return np.asarray(out), guide.lo, guide.hi

    changes_something(name, run)


# -- searches


WEIGHTS = np.linspace(0, 1, V) ** 2  # a judge may have to be a probability


class Judge:
    """The mean weight of a response's tokens; counts what it is asked."""

    def __init__(self):
        self.responses = 0

    def __call__(self, batch):
        mask, tokens = np.asarray(batch.mask), np.asarray(batch.tokens)
        real = np.asarray(batch.valid)
        batches.check(batch._replace(valid=real & mask.any(-1)))
        self.responses += int(real.sum())
        return (WEIGHTS[tokens] * mask).sum(-1) / np.maximum(mask.sum(-1), 1)


def search(name, prompts=PROMPTS, lengths=LENGTHS, seed=0, judge=None, **changes):
    """A run of a search, on the host."""
    function = FOUND[name].function
    takes = inspect.signature(function).parameters
    handed = {
        "judge": judge or Judge(), "eos_ids": EOS, "temperature": 1.0, "tokenizer": TEXT,
    }  # fmt: skip
    handed = {k: v for k, v in handed.items() if k in takes}
    out = function(
        model("target"), LMS, prompts, lengths, jax.random.key(seed), max_new=NEW,
        **handed, **hyper(name, **changes),
    )  # fmt: skip
    return jax.device_get(out)


plain = functools.cache(search)


@each_search
def test_a_search_gives_a_batch_of_responses(name):
    out = plain(name)
    batch = batches.check(out.batch)
    b, g, t = batch.tokens.shape
    assert (b, t) == (2, P + NEW)
    assert g >= 1
    for field in (batch.mask, out.raw_logps):
        assert field.shape == (2, g, t)
    assert out.truncated.shape == batch.valid.shape == (2, g)
    assert ((batch.tokens >= 0) & (batch.tokens < V)).all()
    at = np.arange(t)
    begins = LENGTHS[:, None, None]
    np.testing.assert_array_equal(
        batch.mask, (at >= begins) & (at < batch.lengths[..., None])
    )
    sizes = batch.mask.sum(-1)
    assert ((sizes >= 1) & (sizes <= NEW)).all()
    for row in range(2):
        n = LENGTHS[row]
        want = np.broadcast_to(PROMPTS[row, :n], (g, n))
        np.testing.assert_array_equal(batch.tokens[row, :, :n], want)
    # what does not end in EOS is as long as it may be
    ends = np.take_along_axis(batch.tokens, batch.lengths[..., None] - 1, -1)[..., 0]
    assert (np.isin(ends, EOS) | (sizes == NEW)).all()
    np.testing.assert_array_equal(out.truncated, ~np.isin(ends, EOS))
    inner = batch.mask & (at < batch.lengths[..., None] - 1)
    assert not np.isin(batch.tokens[inner], EOS).any()


@each_search
def test_log_probabilities_are_finite_and_on_the_response_alone(name):
    out = plain(name)
    for logps in (out.raw_logps, out.batch.old_logps):
        if logps is not None:
            assert np.isfinite(logps).all()
            assert (logps <= 1e-6).all()
            assert not logps[~out.batch.mask].any()


@each_search
def test_raw_log_probabilities_are_those_of_the_policy(name):
    out = plain(name)
    want = logprob.score(model("target"), jax.tree.map(jnp.asarray, out.batch)).logps
    np.testing.assert_allclose(out.raw_logps, want, atol=1e-4)


@each_search
def test_a_search_counts_what_it_costs(name):
    stats = plain(name).stats
    assert stats["tokens_sampled"] >= 0
    assert stats["judge_calls"] >= 0
    assert stats["tokens_sampled"] + stats["judge_calls"] > 0
    assert all(np.isfinite(np.asarray(x, float)).all() for x in stats.values())


@each_search
def test_a_key_decides_a_search(name):
    again = search(name)
    assert not differ(again, plain(name))


@each_search
def test_the_other_key_is_another_draw(name):
    def made(out):
        return out.batch.tokens, out.stats

    others = [made(search(name, seed=seed)) for seed in (1, 2, 3)]
    changed = [differ(x, made(plain(name))) for x in others]
    assert any(changed) == (name not in GREEDY)


@each_search
def test_a_response_does_not_depend_on_the_other_prompt(name):
    prompts = PROMPTS.copy()
    prompts[1] = OTHER_PROMPT
    other = search(name, prompts=prompts)
    alone = search(name, prompts=PROMPTS[:1], lengths=LENGTHS[:1])
    for out in (other, alone):
        assert not differ(out.batch.tokens[0], plain(name).batch.tokens[0])
        np.testing.assert_allclose(
            out.raw_logps[0], plain(name).raw_logps[0], atol=1e-5
        )


def completed(ids, sequences):
    """Tokens up to the first that completes a sequence, or all, and whether one does."""
    for n in range(1, len(ids) + 1):
        if any(tuple(ids[n - len(x) : n]) == x for x in sequences if len(x) <= n):
            return n, True
    return len(ids), False


def cut(batch, sequences):
    """The responses of a Batch as tuples, each up to the stop that is completed first."""
    rows = zip(np.asarray(batch.tokens), np.asarray(batch.mask), strict=True)
    found = [[t[m].tolist() for t, m in zip(*row, strict=True)] for row in rows]
    return [
        [tuple(ids[: completed(ids, sequences)[0]]) for ids in row] for row in found
    ]


@each_search
def test_a_search_ends_where_a_stop_completes(name):
    """The same text as that of a search that goes on, whose judge reads what is kept."""
    free = cut(plain(name).batch, ())
    sequences = {row[0][1:3] for row in free if len(row[0]) > 2} or {free[0][0][:1]}
    sequences = {x for x in sequences if EOS[0] not in x} or {free[0][0][:1]}

    class Kept(Judge):
        def __call__(self, batch):
            mask = np.array(batch.mask)
            for place in np.ndindex(mask.shape[:2]):
                at = np.flatnonzero(mask[place])
                ids = np.asarray(batch.tokens)[place][at].tolist()
                mask[place][at[completed(ids, sequences)[0] :]] = False
            return super().__call__(batch._replace(mask=mask))

    table = automaton.stop_sequences(sorted(sequences), V)
    got, want = search(name, judge=Kept(), stops=table), search(name, judge=Kept())
    responses = cut(got.batch, ())
    assert any(completed(ids, sequences)[1] for row in responses for ids in row)
    if name not in AFTER_STOPS:
        assert cut(got.batch, sequences) == cut(want.batch, sequences)
        fewer = want.stats["tokens_sampled"] - got.stats["tokens_sampled"]
        # the stop is in the last block of the one, and ends a round of the other
        assert fewer > 0 or name in ("controlled_blocks", "nudging_words")
    if name == "nudging_words":  # the round of a stop is completed
        return
    assert responses == cut(got.batch, sequences)
    for row, truncated in zip(responses, got.truncated, strict=True):
        for ids, more in zip(row, truncated, strict=True):
            assert more == (not completed(ids, sequences)[1] and ids[-1] not in EOS)
    logps = logprob.score(model("target"), jax.tree.map(jnp.asarray, got.batch)).logps
    np.testing.assert_allclose(got.raw_logps, logps, atol=1e-4)


@each_search
def test_every_hyper_parameter_changes_a_search(name):
    def run(**changes):
        out = search(name, **changes)
        return (*out.batch[:4], out.batch.old_logps, out.raw_logps, out.stats)

    changes_something(name, run)


@each_search
def test_a_count_below_one_is_refused(name):
    counts = [
        key
        for key, interval in getattr(module(name), "RANGES", {}).items()
        if interval.startswith("[1,")
    ]
    assert counts, f"{name} states no count in RANGES"
    for key in counts:
        with pytest.raises(ValueError, match=key):
            plugin.load("decoders", name, {key: 0})
        with pytest.raises(ValueError, match=rf"\b{key}\b.*0"):
            search(name, **{key: 0})


@each_search
def test_a_search_without_what_it_needs_says_so(name):
    function = FOUND[name].function
    run = functools.partial(
        function, model("target"), LMS, PROMPTS, LENGTHS, jax.random.key(0)
    )
    if "tokenizer" in inspect.signature(function).parameters:
        with pytest.raises(ValueError, match="tokenizer"):
            run(max_new=NEW, judge=Judge(), **hyper(name))
        run = functools.partial(run, tokenizer=TEXT)
    with pytest.raises(ValueError, match=r"max_new"):
        run(max_new=0, judge=Judge(), **hyper(name))
    if name not in UNJUDGED:
        with pytest.raises(ValueError, match=r"judge"):
            run(max_new=NEW, judge=None, **hyper(name))


# -- both


each = pytest.mark.parametrize("name", FOUND)


@each
def test_hyper_parameters_are_keywords_with_defaults(name):
    bound = FOUND[name]
    first = {"guide": 1, "search": 5}[bound.role]
    names = ["lms"] if first == 1 else ["lm", "lms", "prompts", "lengths", "key"]
    parameters = list(inspect.signature(bound.function).parameters.values())
    assert [p.name for p in parameters[:first]] == names
    for p in parameters[first:]:
        assert p.kind is p.KEYWORD_ONLY, p.name
        assert p.name == "max_new" or p.default is not p.empty, p.name
    if first == 5:
        assert "max_new" in [p.name for p in parameters]


@each
def test_a_range_is_that_of_a_hyper_parameter_and_holds_its_default(name):
    assert set(getattr(module(name), "RANGES", {})) <= set(FOUND[name].hyper)
    plugin.load("decoders", name, FOUND[name].hyper)


@each
def test_a_decoder_says_whether_it_is_exact_and_states_its_source(name):
    text = inspect.getdoc(FOUND[name].function) or ""
    head = text.split("\n\n")[0]
    assert re.search(r"\*(exact|approximate)\b", head, re.IGNORECASE), head
    assert "Args:" in text
    assert "Returns:" in text
    for parameter in inspect.signature(FOUND[name].function).parameters:
        assert re.search(rf"\b{parameter}\b.*:", text), f"{parameter} is not described"
    said = module(name).__doc__ or ""
    assert re.search(r"https?://arxiv.org/abs/\S+", said), "no URL"
    assert re.search(r"^Differs from the papers?: \S", said, re.MULTILINE)


@each
def test_every_decoder_has_its_own_tests_and_its_variant_of_the_config(name, request):
    assert (request.path.parent / f"test_{name}.py").exists()
    assert name in generate.METHODS
