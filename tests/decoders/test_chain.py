"""Guides one after another, from a config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import plugin
from alignax.batch import LM
from alignax.decoders import chain
from alignax.models import transformer
from alignax.respond import respond
from alignax.sampling import decode

PROXY = {"name": "proxy", "expert": "tuned", "base": "plain", "weight": 0.7}
CONTRAST = {"name": "contrastive", "amateur": "plain", "weight": 0.4, "plausible": 0.3}
PROMPT = np.array([[3, 1, 4, 1, 5]])


@pytest.fixture
def lms(tiny_config):
    def made(seed):
        params = transformer.init(tiny_config, jax.random.key(seed))
        return LM(tiny_config, jax.tree.map(lambda x: 3 * x, params))

    return {"target": made(0), "tuned": made(1), "plain": made(2)}


def logps(lm, tokens):
    """log p of each next token, [T, V] in float64."""
    h, _ = transformer.hidden(lm, jnp.asarray(tokens)[None])
    z = np.float64(transformer.unembed(lm, h))[0]
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def tilted(z, lms, section, tokens):
    plain = logps(lms["plain"], tokens)
    if section["name"] == "proxy":
        return z + 0.7 * (logps(lms["tuned"], tokens) - plain)
    keep = z >= z.max(-1, keepdims=True) + np.log(0.3)
    return np.where(keep, 1.4 * z - 0.4 * plain, -np.inf)


@pytest.mark.parametrize("order", [(PROXY, CONTRAST), (CONTRAST, PROXY), (PROXY,) * 2])
def test_each_guide_tilts_what_the_one_before_it_gives(lms, order):
    """Sampled log-probabilities, against those of the models read anew in float64."""
    guide = plugin.load_section("decoders", {"name": "chain", "guides": order})(lms)
    out = decode.generate(
        lms["target"], PROMPT, np.array([5]), jax.random.key(0), max_new=4, group=3,
        guide=guide,
    )  # fmt: skip
    for tokens, given in zip(out.batch.tokens[0], out.batch.old_logps[0], strict=True):
        z = logps(lms["target"], tokens)
        for section in order:
            z = tilted(z, lms, section, tokens)
            top = z.max(-1, keepdims=True)
            z = z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))
        want = z[np.arange(4, 8), tokens[5:]]
        np.testing.assert_allclose(given[5:], want, atol=2e-4)


@pytest.mark.parametrize(
    ("guides", "told"),
    [
        ((), r"has no guides"),
        (("proxy",), r"guides\[0\]: 'proxy' is no section"),
        (
            (PROXY, {"name": "rain"}),
            r"guides\[1\]: decoders.rain is a search, expected",
        ),
        ((PROXY, {"name": "proxy", "bas": "x"}), r"guides\[1\]: .*did you mean 'base'"),
        (({"name": "contrastive", "amateur": "gone"},), r"guides\[0\]: .*gone"),
        ((PROXY, {"name": "controlled"}), r"guides of kinds \['scalar', 'vector'\]"),
    ],
)
def test_what_is_no_chain_is_refused(lms, tiny_config, guides, told):
    scored = transformer.init(tiny_config, jax.random.key(3))
    config = dataclasses.replace(tiny_config, value_head=True)
    lms["value"] = LM(config, scored | {"value_head": {"kernel": jnp.ones(16)}})
    with pytest.raises(ValueError, match=told):
        chain.guide(lms, guides=guides)


def test_a_config_names_the_guides_and_layers_of_the_model(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Say a word"}\n')
    c = tiny.to_respond(tmp_path)
    c.prompts = {"name": "prompts", "path": str(path), "size": 0}
    first = {"name": "contrastive", "amateur": "layers:1", "plausible": 0.0}
    c.decoder = {"name": "chain", "guides": (first, {**first, "weight": 0.2})}
    assert respond.respond(c, str(tmp_path / "run"))
    c.decoder = {"name": "chain", "guides": (first, {**first, "amateur": "layers:9"})}
    with pytest.raises(ValueError, match=r"expected layers of 0..\d"):
        respond.respond(c, str(tmp_path / "other"))
