"""The decoder and the loader against transformers and TRL, by fixtures (tests/golden/)."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob
from alignax.batch import LM, Batch
from alignax.losses import dpo
from alignax.models.load import load
from alignax.models.transformer import hidden, unembed

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FAMILIES = [
    "llama_tied", "llama_untied", "llama3_rope", "mistral", "qwen2", "qwen3", "gemma",
    "gemma2", "gemma3", "llama_biases", "yarn", "olmo2", "smollm3",
]  # fmt: skip


@jax.jit
def run(lm, ids):
    return unembed(lm, hidden(lm, ids)[0])


def logits_of(lm, ids):
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(lm, jnp.asarray(ids)))


def log_softmax64(logits):
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def token_logps(lm, tokens, mask):
    """log p(tokens[t] | tokens[<t]) in float64, 0 off the mask, for rows [N, T]."""
    rows = log_softmax64(logits_of(lm, tokens)[:, :-1])
    picked = np.take_along_axis(rows, tokens[:, 1:, None], -1)[..., 0]
    return np.pad(picked, ((0, 0), (1, 0))) * mask


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    golden = np.load(GOLDEN / name / "golden.npz")
    lm = load(GOLDEN / name)
    assert lm.config.head_dim * lm.config.num_heads != lm.config.width
    # float32 against float32 in another order of sums: 2e-5 at logits of order 5
    np.testing.assert_allclose(
        logits_of(lm, golden["ids"]), golden["logits"], atol=1e-4
    )


def test_gguf_logits_are_those_of_transformers():
    pytest.importorskip("gguf")
    golden = np.load(GOLDEN / "llama_gguf" / "golden.npz")
    lm = load(GOLDEN / "llama_gguf" / "model.gguf")
    np.testing.assert_allclose(
        logits_of(lm, golden["ids"]), golden["logits"], atol=1e-4
    )


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama_tied", {"rope_theta": 10_000.0}),
        ("llama_tied", {"norm_eps": 1e-6}),
        ("llama3_rope", {"rope_scaling": None}),
        ("llama3_rope", {"rope_scaling": ("llama3", 8.0, 1.0, 4.0, 64.0)}),
        ("mistral", {"window": 7}),
        ("qwen2", {"qkv_bias": False}),
        ("qwen3", {"qk_norm": False}),
        ("gemma", {"norm_offset": False}),
        ("gemma", {"embed_scale": False}),
        ("gemma", {"activation": "gelu"}),
        ("gemma2", {"query_scale": None}),
        ("gemma2", {"attn_softcap": None}),
        ("gemma2", {"final_softcap": None}),
        ("gemma2", {"post_norms": False}),
        ("gemma2", {"local_layers": (False, True, False)}),
        ("gemma3", {"local_layers": (True, True, True, False)}),
        ("gemma3", {"rope_theta": 100.0}),
        ("gemma3", {"rope_theta_local": 2000.0}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"qk_norm": False}),
        ("llama_biases", {"qkv_bias": False}),
        ("llama_biases", {"o_bias": False}),
        ("llama_biases", {"mlp_bias": False}),
        ("llama_biases", {"rope_scaling": ("linear", 4.0)}),
        ("yarn", {"rope_scaling": None}),
        ("yarn", {"rope_scaling": ("yarn", 4.0, 32.0, 1.3, 4.0, 0.5, False)}),
        ("yarn", {"rope_scaling": ("yarn", 8.0, 64.0, 1.3, 4.0, 0.5, False)}),
        ("yarn", {"rope_scaling": ("yarn", 8.0, 32.0, 1.2, 4.0, 0.5, False)}),
        ("yarn", {"rope_scaling": ("yarn", 8.0, 32.0, 1.3, 32.0, 0.5, False)}),
        ("yarn", {"rope_scaling": ("yarn", 8.0, 32.0, 1.3, 4.0, 1.0, False)}),
        ("yarn", {"rope_scaling": ("yarn", 8.0, 32.0, 1.3, 4.0, 0.5, True)}),
        ("olmo2", {"qk_norm": False, "qk_norm_whole": False}),
        ("olmo2", {"post_norms": False}),
        ("smollm3", {"rope_layers": ()}),
        ("smollm3", {"rope_layers": (True, True, True, False)}),
        ("smollm3", {"window": 7}),
        ("smollm3", {"local_layers": (False, True, False, True)}),
    ],
    ids=str,
)
def test_the_fixture_sees_every_feature_of_its_family(name, change):
    # A golden test is worth what it can notice: each of these must miss by 2x its bound.
    golden = np.load(GOLDEN / name / "golden.npz")
    lm = load(GOLDEN / name)
    wrong = lm._replace(config=dataclasses.replace(lm.config, **change))
    assert np.abs(logits_of(wrong, golden["ids"]) - golden["logits"]).max() > 2e-4


def test_per_token_logps_and_dpo_loss_are_those_of_trl():
    g = np.load(GOLDEN / "trl_dpo.npz")
    b, two, t = g["tokens"].shape
    tokens, mask = g["tokens"].reshape(-1, t), g["mask"].reshape(-1, t)
    logps = token_logps(load(GOLDEN / "llama_tied"), tokens, mask).reshape(b, two, t)
    ref = token_logps(load(GOLDEN / "llama_ref"), tokens, mask).reshape(b, two, t)
    np.testing.assert_allclose(logps, g["logps"], atol=2e-5)
    np.testing.assert_allclose(ref, g["ref_logps"], atol=2e-5)
    rewards = g["beta"] * (logps - ref).sum(-1)
    np.testing.assert_allclose(rewards[:, 0], g["chosen_rewards"], atol=1e-5)
    np.testing.assert_allclose(rewards[:, 1], g["rejected_rewards"], atol=1e-5)
    losses = np.log1p(np.exp(rewards[:, 1] - rewards[:, 0]))
    np.testing.assert_allclose(losses, g["losses"], atol=1e-5)
    np.testing.assert_allclose(losses.mean(), g["loss"], atol=1e-5)


def test_dpo_loss_and_its_gradient_through_the_kernel_are_those_of_trl():
    g = np.load(GOLDEN / "trl_dpo.npz")
    policy, ref = load(GOLDEN / "llama_tied"), load(GOLDEN / "llama_ref")
    rows = (g["mask"].shape[0], 2)
    feedback, valid = np.tile([1.0, 0.0], (rows[0], 1)), np.ones(rows, bool)
    batch = Batch(
        *map(jnp.asarray, (g["tokens"], g["mask"], g["lengths"])),
        jnp.asarray(feedback, jnp.float32),
        jnp.asarray(valid),
    )

    def mean_loss(params):
        scores = logprob.score(LM(policy.config, params), batch)
        return dpo.loss(scores, batch, beta=float(g["beta"]))[0].mean()

    with jax.default_matmul_precision("highest"):
        batch = batch._replace(ref_logps=logprob.score(ref, batch).logps)
        value, grads = jax.jit(jax.value_and_grad(mean_loss))(policy.params)
    np.testing.assert_allclose(value, g["loss"], atol=1e-5)
    norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, g["grad_norm"], rtol=1e-5)
    q = np.asarray(grads["blocks"]["attn"]["q"]["kernel"][0])
    np.testing.assert_allclose(q.reshape(len(q), -1).T, g["grad_q"], atol=1e-5)
    np.testing.assert_allclose(grads["norm"]["scale"], g["grad_final_norm"], atol=1e-5)


def test_value_head_reads_the_last_real_token_as_the_reward_of_trl():
    g = np.load(GOLDEN / "trl_reward.npz")
    lm = load(GOLDEN / "llama_reward")
    assert lm.config.value_head
    b, two, t = g["tokens"].shape
    with jax.default_matmul_precision("highest"):
        h, _ = hidden(lm, jnp.asarray(g["tokens"].reshape(-1, t)))
    values = np.asarray(h) @ np.asarray(lm.params["value_head"]["kernel"])
    last = values[np.arange(b * two), g["lengths"].ravel() - 1].reshape(b, two)
    np.testing.assert_allclose(last, g["rewards"], atol=1e-5)
    losses = np.log1p(np.exp(last[:, 1] - last[:, 0]))
    np.testing.assert_allclose(losses, g["losses"], atol=1e-5)


def test_smollm2_logps_on_preference_pairs_are_those_of_transformers():
    path = os.environ.get("ALIGNAX_SMOLLM2")
    if not path:
        pytest.skip("set ALIGNAX_SMOLLM2 to SmolLM2-135M-Instruct.Q4_1.gguf")
    g = np.load(GOLDEN / "smollm2_hh.npz")
    lm = load(path)
    t = g["tokens"].shape[-1]
    tokens, wants = g["tokens"].reshape(-1, t), g["logps"].reshape(-1, t)
    errors = []
    for ids, n, want in zip(tokens, g["lengths"].ravel(), wants, strict=True):
        rows = log_softmax64(logits_of(lm, ids[None])[0, : n - 1])
        errors.append(np.abs(rows[np.arange(n - 1), ids[1:n]] - want[1:n]))
    errors = np.concatenate(errors)
    assert errors.size == g["lengths"].sum() - g["lengths"].size
    print(f"median {np.median(errors):.2e}, p99 {np.quantile(errors, 0.99):.2e} nats")
    assert np.median(errors) < 5e-5
    assert np.quantile(errors, 0.99) < 5e-4
