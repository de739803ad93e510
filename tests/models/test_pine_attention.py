"""One document is the ordinary model; more are read the same in every order."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.models import pine, transformer

pytestmark = pytest.mark.slow

PREFIX, SUFFIX = [3, 1, 4], [1, 5]
DOCUMENTS = [[9, 2, 6, 5], [3, 5], [8, 9, 7]]


def states(lm, documents, prefix=PREFIX, suffix=SUFFIX, length=None):
    tokens, layout = pine.lay(prefix, documents, suffix, length)
    return np.asarray(pine.hidden(lm, jnp.asarray(tokens), layout))


@pytest.mark.parametrize("document", [[9], [9, 2, 6, 5]])
@pytest.mark.parametrize("prefix", [PREFIX, []])
def test_one_document_is_the_ordinary_model(tiny_lm, document, prefix):
    ids = jnp.array([prefix + document + SUFFIX])
    want, _ = transformer.hidden(tiny_lm, ids)
    np.testing.assert_allclose(
        states(tiny_lm, [document], prefix), want[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "more",
    [
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True},
        {"rope_scaling": ("yarn", 8.0, 32.0, 1.3, 8.0, 0.5, False), "rope_theta": 100.0},
    ],
    ids=str,
)  # fmt: skip
def test_one_document_is_the_ordinary_model_of_other_families(
    tiny_config, make_lm, more
):
    lm = make_lm(dataclasses.replace(tiny_config, **more))
    want, _ = transformer.hidden(lm, jnp.array([[*PREFIX, 9, 2, 6, 5, *SUFFIX]]))
    got = states(lm, [[9, 2, 6, 5]])
    np.testing.assert_allclose(got, want[0], rtol=1e-4, atol=1e-5)


def test_every_order_gives_the_suffix_the_same_states(tiny_lm):
    orders = list(itertools.permutations(DOCUMENTS))
    ends = np.stack([states(tiny_lm, order)[-2:] for order in orders])
    np.testing.assert_allclose(ends, ends[:1].repeat(6, 0), rtol=1e-4, atol=1e-5)
    plain = []
    for order in orders:
        ids = jnp.array([[*PREFIX, *itertools.chain(*order), *SUFFIX]])
        plain.append(np.asarray(transformer.hidden(tiny_lm, ids)[0])[0, -2:])
    assert np.ptp(np.stack(plain), axis=0).max() > 1e-2


def test_a_documents_own_tokens_move_with_it(tiny_lm):
    a, b, c = DOCUMENTS
    one, other = states(tiny_lm, [a, b, c]), states(tiny_lm, [c, a, b])
    np.testing.assert_allclose(one[3:7], other[6:10], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[9:12], other[3:6], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[:3], other[:3], atol=1e-6)


def test_the_definition_in_float64(tiny_config, make_lm):
    """One layer by loops over tokens: heads that share keys, each with its own order."""
    config = dataclasses.replace(
        tiny_config, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4,
        attn_softcap=0.8, query_scale=2.0, rope_scaling=("linear", 3.0),
        embed_scale=True,
    )  # fmt: skip
    lm = make_lm(config)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params)
    block = jax.tree.map(lambda x: x[0], p["blocks"])
    scale = 2.0**-0.5

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turned(x, position):
        angle = position / 3 * config.rope_theta ** (-np.arange(0, 4, 2) / 4)
        a, b = x[:2], x[2:]
        return np.r_[a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]  # fmt: skip

    parts = [PREFIX, *DOCUMENTS, SUFFIX]
    flat = [
        (s, i, token) for s, part in enumerate(parts) for i, token in enumerate(part)
    ]
    x = p["embed"][[token for *_, token in flat]] * config.width**0.5
    normed = norm(x, block["attn_norm"]["scale"])
    documents, end = (1, 2, 3), 3 + 9
    sizes = {j: len(parts[j]) for j in documents}
    orders = set()

    def one(head):
        kernels = (block["attn"][n]["kernel"] for n in "qkv")
        places = head, head // 2, head // 2
        q, k, v = (normed @ w[:, h] for w, h in zip(kernels, places, strict=True))

        def importance(t, among):
            use = [u for u, (s, *_) in enumerate(flat) if s in among]
            z = np.array([q[t] @ k[u] * scale for u in use])
            a = np.exp(z - z.max())
            a = dict(zip(use, a / a.sum(), strict=True))
            return {j: sum(a[u] for u, (s, *_) in enumerate(flat) if s == j) / sizes[j] for j in among}  # fmt: skip

        out = np.zeros((len(flat), 4))
        for t, (s, i, _) in enumerate(flat):
            if s in documents:
                others = [j for j in documents if j != s]
                rows = [
                    importance(r, others) for r, (z, *_) in enumerate(flat) if z == s
                ]
                value = {j: sum(row[j] for row in rows) for j in others}
                order = [s, *sorted(others, key=lambda j, v=value: -v[j])]
                position = end - sizes[s] + i
            else:
                value = importance(t, documents)
                order = sorted(documents, key=lambda j, v=value: -v[j])
                position = i if s == 0 else end + i
            orders.add((t, *order))
            shift = {
                j: sum(sizes[o] for o in order[: order.index(j)]) for j in documents
            }
            at = [
                n if z == 0 else end + n if z == 4 else end - shift[z] - sizes[z] + n
                for z, n, _ in flat
            ]
            use = [u for u in range(len(flat)) if at[u] <= position]
            z = [turned(q[t], position) @ turned(k[u], at[u]) * scale for u in use]
            z = 0.8 * np.tanh(np.array(z) / 0.8)
            a = np.exp(z - z.max())
            out[t] = (a / a.sum()) @ v[use]
        return out @ block["attn"]["o"]["kernel"][head]

    x = x + sum(map(one, range(4)))
    assert len(orders) > len(flat) + 3  # heads do not agree
    g = norm(x, block["mlp_norm"]["scale"])
    gate, up = (g @ block["mlp"][n]["kernel"] for n in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
    want = norm(x, p["norm"]["scale"])
    np.testing.assert_allclose(states(lm, DOCUMENTS), want, rtol=1e-3, atol=1e-4)


def test_documents_of_one_importance_are_ordered_by_what_they_say():
    zeros, shifts = jnp.zeros((14, 1, 4)), []
    for order in itertools.permutations(DOCUMENTS):
        _, layout = pine.lay(PREFIX, order, SUFFIX)
        got = pine._shifts(zeros, zeros, layout, 0, 1.0)[-1, 0]
        shifts.append(dict(zip(map(tuple, order), got.tolist(), strict=True)))
    assert shifts == [shifts[0]] * 6
    assert len(set(shifts[0].values())) == 3


def test_a_response_is_read_token_by_token_as_with_the_whole_row(tiny_lm):
    response = [7, 8, 9, 2]
    want = states(tiny_lm, DOCUMENTS, suffix=[*SUFFIX, *response])[-4:]
    tokens, layout = pine.lay(PREFIX, DOCUMENTS, SUFFIX, length=16, count=4)
    layout = pine.lengthen(layout, 20)
    _, cache = pine.read(
        tiny_lm, jnp.asarray(tokens), layout, pine.empty(tiny_lm.config, 20)
    )
    first, cache = pine.read(tiny_lm, jnp.array(response[:1]), layout, cache, 14)
    # what is written again is what was written last
    _, cache = pine.read(tiny_lm, jnp.array([1, 1, 1]), layout, cache, 15)
    others, _ = pine.read(tiny_lm, jnp.array(response[1:]), layout, cache, 15)
    np.testing.assert_allclose(
        jnp.concatenate([first, others]), want, rtol=1e-4, atol=1e-5
    )


def test_padding_is_never_seen(tiny_lm):
    long = states(tiny_lm, DOCUMENTS, length=20)
    np.testing.assert_allclose(
        long[:14], states(tiny_lm, DOCUMENTS), rtol=1e-4, atol=1e-5
    )


def test_what_cannot_be_laid_out_is_named(tiny_lm):
    with pytest.raises(ValueError, match=r"documents have \[2, 0\] tokens"):
        pine.lay(PREFIX, [[1, 2], []], SUFFIX)
    with pytest.raises(ValueError, match="the row has 14 tokens, but length is 13"):
        pine.lay(PREFIX, DOCUMENTS, SUFFIX, 13)
    local = tiny_lm._replace(config=dataclasses.replace(tiny_lm.config, window=4))
    with pytest.raises(ValueError, match="all see everything"):
        states(local, DOCUMENTS)


def test_layers_without_rope_and_long_rows_of_dynamic_rope_are_refused(
    tiny_config, make_lm
):
    lm = make_lm(dataclasses.replace(tiny_config, rope_layers=(True, False)))
    with pytest.raises(ValueError, match="whose layers all have RoPE"):
        states(lm, DOCUMENTS)
    dynamic = {"rope_scaling": ("dynamic", 2.0), "max_length": 13}
    lm = make_lm(dataclasses.replace(tiny_config, **dynamic))
    with pytest.raises(ValueError, match="rows of 14 tokens"):
        states(lm, DOCUMENTS)
