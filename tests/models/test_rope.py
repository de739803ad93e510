"""models/rope.py: scalings against transformers' own frequencies, and what is refused."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.models import rope, transformer
from alignax.models.transformer import ModelConfig

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "rope.json").read_text())
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_scaling": ("dynamic", 4.0), "max_length": 8}


def read(scaling, **more):
    return rope.from_hf(
        {"rope_parameters": scaling, "max_position_embeddings": 256, **more}
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c["rope_parameters"]))
def test_frequencies_and_factor_are_those_of_transformers(case):
    theta, local, scaling = read(case["rope_parameters"])
    assert (theta, local) == (case["rope_parameters"]["rope_theta"], None)
    freq, factor = rope.frequencies(case["head_dim"], theta, scaling)
    # transformers computes them in float32
    np.testing.assert_allclose(freq, case["frequencies"], rtol=1e-6)
    assert factor == case["factor"]
    assert hash(scaling)
    written = rope.to_hf(theta, scaling)
    assert read(written) == (theta, local, scaling)
    assert json.loads(json.dumps(written)) == written


def test_usual_settings_of_yarn_are_written_as_they_are_published():
    published = {**YARN, "rope_theta": 1e6}
    assert rope.to_hf(*read(published)[::2]) == published
    ours = read({**YARN, "mscale": 0.7, "mscale_all_dim": 1.2})
    assert rope.to_hf(*ours[::2])["attention_factor"] == ours[2][3] != 1.0


def test_a_context_of_pretraining_beside_the_rope_settings_wins():
    assert read(YARN, original_max_position_embeddings=32)[2][2] == 32.0
    assert read({"rope_type": "yarn", "factor": 2.0})[2][2] == 256.0


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "yarn"}, "lacks factor"),
        ({"rope_type": "dynamic"}, "lacks factor"),
        ({**YARN, "factor": -1.0}, "factor is -1.0"),
        ({**YARN, "mscale": -1.0, "mscale_all_dim": 1.0}, "mscale is -1.0"),
        ({**YARN, "truncate": 2}, "truncate is 2.0, expected true or false"),
        ({**YARN, "beta_fast": 1, "beta_slow": 2}, "beta_fast >= beta_slow"),
        ({**YARN, "rope_theta": 1.0}, "rope_theta > 1"),
        ({**YARN, "mrope_section": [16, 24, 24]}, r"mrope_section=\[16, 24, 24\].*remove"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 8}, "beta_fast=8"),
        ({"rope_type": "default", "factor": 2.0}, "factor=2.0"),
        (
            {"full_attention": {**YARN, "truncate": False}, "sliding_attention": {}},
            "truncate with RoPE by layer type",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_not_computed_are_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        read(scaling)


def test_settings_without_an_effect_are_accepted():
    assert read({**YARN, "finetuned": True, "mscale": 0.7})[2] == read(YARN)[2]
    linear = {"rope_type": "linear", "factor": 2.0, "beta_fast": None}
    long = {**linear, "original_max_position_embeddings": 64}
    assert read(linear) == read(long) == (10_000.0, None, ("linear", 2.0))
    assert read({"rope_type": "default", "factor": 1.0})[2] is None


@pytest.mark.parametrize(
    "scaling, message",
    [
        (("ntk", 2.0), "unknown rope_scaling 'ntk'; known: linear, dynamic"),
        (("yarn", 2.0), "'yarn' has 1 numbers, expected 6: factor, original"),
        (("linear", 0), "factor is 0, expected"),
        (("llama3", 8.0, 4.0, 1.0, 64.0), "low_freq_factor >= high_freq_factor"),
    ],
    ids=str,
)
def test_a_config_checks_its_scaling(tiny_config, scaling, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config, rope_scaling=scaling)


def test_dynamic_rope_is_plain_up_to_the_context(tiny_config, make_lm):
    lm = make_lm(dataclasses.replace(tiny_config, **DYNAMIC))
    plain = make_lm(dataclasses.replace(tiny_config, max_length=8))
    tokens = jnp.arange(16).reshape(2, 8)
    cache = transformer.init_cache(lm.config, 2, 8)
    for more in ({}, {"cache": cache}):
        got, want = (transformer.hidden(x, tokens, **more)[0] for x in (lm, plain))
        np.testing.assert_array_equal(got, want)


def test_dynamic_rope_refuses_what_is_longer_than_the_context(tiny_config, make_lm):
    lm = make_lm(dataclasses.replace(tiny_config, **DYNAMIC))
    tokens = jnp.zeros((1, 9), jnp.int32)
    message = "rows of 9 tokens, but rope type 'dynamic' is supported up to .*=8"
    with pytest.raises(ValueError, match=message):
        transformer.hidden(lm, tokens)
    cache = transformer.init_cache(lm.config, 1, 9)
    with pytest.raises(ValueError, match=message):
        transformer.hidden(lm, tokens[:, :1], tokens[:, :1], cache=cache)


def test_a_packed_row_may_be_longer_than_the_texts_in_it(tiny_config, make_lm):
    lm = make_lm(dataclasses.replace(tiny_config, **DYNAMIC))
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 37)
    positions = jnp.arange(12)[None] % 6
    packed, _ = transformer.hidden(lm, tokens, positions, jnp.arange(12)[None] // 6)
    alone, _ = transformer.hidden(lm, tokens.reshape(2, 6))
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=1e-5)


def test_a_layer_without_rope_does_not_see_the_order(tiny_config, make_lm):
    """The last token's state is that of a set of earlier tokens."""
    config = dataclasses.replace(tiny_config, num_layers=1, rope_layers=(False,))
    lm = make_lm(config)
    last = [
        transformer.hidden(lm, jnp.asarray([ids]))[0][0, -1]
        for ids in ([3, 5, 7, 2], [7, 3, 5, 2])
    ]
    np.testing.assert_allclose(*last, atol=1e-5)
    plain = lm._replace(config=dataclasses.replace(config, rope_layers=()))
    other = transformer.hidden(plain, jnp.asarray([[7, 3, 5, 2]]))[0][0, -1]
    assert np.abs(other - last[0]).max() > 1e-2


def test_flags_need_one_entry_per_layer():
    sizes = dict(vocab_size=7, width=8, num_layers=2, num_heads=2, num_kv_heads=1,
                 head_dim=4, mlp_width=8)  # fmt: skip
    with pytest.raises(ValueError, match="rope_layers has 1 entries, expected num_layers=2"):  # fmt: skip
        ModelConfig(**sizes, rope_layers=(True,))
    with pytest.raises(ValueError, match="qk_norm_whole needs qk_norm"):
        ModelConfig(**sizes, qk_norm_whole=True)
