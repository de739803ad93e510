"""Proxy tuning against the plain twins, alone and with its expert as the draft."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import transformer as oracle

from alignax.batch import LM
from alignax.decoders import proxy
from alignax.sampling import decode
from alignax.sampling.speculate import speculate

V, P, NEW = 7, 4, 5
PROMPTS = np.array([[3, 1, 4, 1], [2, 6, 0, 0]])
LENGTHS = np.array([4, 2])
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def lms(tiny_config, make_lm):
    config = dataclasses.replace(tiny_config, vocab_size=V, num_layers=1)
    small = dataclasses.replace(config, width=8, num_heads=2, num_kv_heads=1)
    return {
        "target": make_lm(config),
        "policy": make_lm(small, 1),
        "ref": make_lm(small, 2),
    }


def run(function, *lms, **settings):
    settings = dict(max_new=NEW, group=2) | settings
    out = function(*lms, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), KEY, **settings)
    return jax.tree.map(np.asarray, out)


def logps(lm, ids):
    with jax.enable_x64(True):
        z = oracle.logits(lm.config, oracle.float64(lm.params), np.array(ids))[-1]
        return np.asarray(jax.nn.log_softmax(z))


def test_the_distribution_is_the_tilted_one_on_every_prefix(lms):
    guide = proxy.guide(lms, weight=0.8)
    out = run(decode.generate, lms["target"], guide=guide)
    for b in range(2):
        for t in range(LENGTHS[b], LENGTHS[b] + NEW):
            ids = out.batch.tokens[b, 0, :t]
            target, policy, ref = (
                logps(lms[k], ids) for k in ("target", "policy", "ref")
            )
            z = target + 0.8 * (policy - ref)
            want = (z - np.log(np.exp(z).sum()))[out.batch.tokens[b, 0, t]]
            assert out.batch.old_logps[b, 0, t] == pytest.approx(want, abs=1e-4)


def test_no_weight_leaves_the_target_alone_and_another_weight_compiles_nothing(lms):
    plain = run(decode.generate, lms["target"])
    tilted = run(decode.generate, lms["target"], guide=proxy.guide(lms, weight=0.8))
    before = decode._generate._cache_size()
    none = run(decode.generate, lms["target"], guide=proxy.guide(lms, weight=0.0))
    assert decode._generate._cache_size() == before
    np.testing.assert_array_equal(none.batch.tokens, plain.batch.tokens)
    assert (tilted.batch.tokens != plain.batch.tokens).any()


def test_greedy_with_the_expert_as_draft_is_plain_guided_greedy(lms):
    """The caches of the guide survive drafts that were rejected."""
    guide = proxy.guide(lms, weight=0.8)
    plain = run(decode.generate, lms["target"], guide=guide, temperature=0.0)
    fast = run(speculate, lms["target"], lms["policy"], guide=guide, temperature=0.0,
               draft_length=2)  # fmt: skip
    np.testing.assert_array_equal(fast.batch.tokens, plain.batch.tokens)
    assert fast.stats["accepted"][0] < 1, "some draft should be rejected"


def test_on_top_of_its_own_base_it_is_the_expert_and_every_draft_stays(lms):
    """p (expert / p) = expert: the draft is the guided target itself."""
    guide = proxy.guide(lms)
    out = run(speculate, lms["ref"], lms["policy"], guide=guide, draft_length=2)
    np.testing.assert_allclose(out.stats["accepted"], [1, 1])
    for b in range(2):
        n = LENGTHS[b]
        ids = out.batch.tokens[b, 1, : n + NEW]
        want = [logps(lms["policy"], ids[:t])[ids[t]] for t in range(n, n + NEW)]
        got = out.batch.old_logps[b, 1, n : n + NEW]
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_the_expert_drafts_better_than_its_base(lms, weight):
    """Of relatives, as a pair of a small model and its larger target are."""

    def child(lm, seed, size):
        leaves, tree = jax.tree.flatten(lm.params)
        rng = np.random.default_rng(seed)
        moved = [x + size * x.std() * rng.normal(size=x.shape) for x in leaves]
        moved = [jnp.asarray(x, jnp.float32) for x in moved]
        return LM(lm.config, jax.tree.unflatten(tree, moved))

    base = lms["ref"]
    family = {"ref": base, "policy": child(base, 0, 0.6)}
    guide, target = proxy.guide(family, weight=weight), child(base, 1, 0.1)
    kept = {}
    for name, draft in family.items():
        out = run(speculate, target, draft, guide=guide, draft_length=1, group=256)
        kept[name] = out.stats["accepted"][0]
    assert kept["policy"] > kept["ref"] + 0.05


def test_bad_models_are_named(lms):
    with pytest.raises(ValueError, match=r"no LM 'gpt'; there are \['policy', 'ref'"):
        proxy.guide(lms, base="gpt")
