"""The decoder again, from the papers: plain trees, plain loops, one row at a time.

Reads the same parameter tree as `alignax.models.transformer` and shares no code with
it. Rotary embeddings are complex multiplications, heads and layers are Python loops,
and the whole [T, T] score matrix of every head exists. In the dtype of the parameters:
under `jax.enable_x64` and with float64 parameters, values and gradients are float64.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def float64(tree):
    """The same tree in float64; call inside `jax.enable_x64()`."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)


def frequencies(config, local):
    """Radians per token of every complex coordinate, in Python floats."""
    base = config.rope_theta
    scaling = config.rope_scaling
    if local and config.rope_theta_local:
        base, scaling = config.rope_theta_local, None
    out = []
    for i in range(config.head_dim // 2):  # 'dynamic' is plain up to the context
        f = 1 / base ** (2 * i / config.head_dim)
        if scaling and scaling[0] == "linear":
            f /= scaling[1]
        if scaling and scaling[0] == "llama3":
            _, factor, low, high, length = scaling
            wavelength = 2 * math.pi / f
            if wavelength > length / low:
                f /= factor
            elif wavelength > length / high:
                s = (length / wavelength - low) / (high - low)
                f = (1 - s) * f / factor + s * f
        if scaling and scaling[0] == "yarn":
            f = yarn(config.head_dim, base, i, f, *scaling[1:])
        out.append(f)
    return out


def yarn(size, base, i, f, factor, length, _, fast, slow, truncate):
    """Coordinate i of YaRN, section 3.2 of https://arxiv.org/abs/2309.00071."""

    def coordinate(turns):  # of which base^(-2 i / size) * length is so many turns
        return size / 2 * math.log(length / (2 * math.pi * turns), base)

    low, high = coordinate(fast), coordinate(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return (1 - ramp) * f + ramp * f / factor


def norm(config, x, scale):
    if config.norm_offset:
        scale = 1 + scale
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale


def rope(x, freq):
    """x is [T, K]; coordinate i and i + K/2 are one complex number."""
    half = x.shape[1] // 2
    z = x[:, :half] + 1j * x[:, half:]
    angle = np.outer(np.arange(x.shape[0]), freq)
    z = z * jnp.asarray(np.exp(1j * angle), z.dtype)
    return jnp.concatenate([z.real, z.imag], 1)


def cap(x, bound):
    return x if bound is None else bound * jnp.tanh(x / bound)


def activation(name, x):
    if name == "silu":
        return x / (1 + jnp.exp(-x))
    if name == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return x / 2 * (1 + jnp.tanh(inner))
    return x / 2 * (1 + jax.scipy.special.erf(x / math.sqrt(2)))


def allowed(t, window):
    """[T, T] booleans: row sees column."""
    return np.array(
        [[j <= i and (window is None or i - j < window) for j in range(t)]
         for i in range(t)]
    )  # fmt: skip


def attention(config, p, x, local, turned):
    t = x.shape[0]
    group = config.num_heads // config.num_kv_heads
    freq = frequencies(config, local)
    scaling = config.rope_scaling
    longer = 1.0  # q and k: YaRN scales cos and sin
    if turned and scaling and scaling[0] == "yarn":
        longer = scaling[3]
    sees = allowed(t, config.window if local else None)

    def linear(name, head):
        y = x @ p[name]["kernel"][:, head, :]
        return y + p[name]["bias"][head] if config.qkv_bias else y

    def normed(name, head):
        scale = p[f"{name}_norm"]["scale"]
        if not config.qk_norm_whole:
            return norm(config, linear(name, head), scale)
        many = config.num_heads if name == "q" else config.num_kv_heads
        heads = jnp.concatenate([linear(name, h) for h in range(many)], 1)
        whole = norm(config, heads, scale)
        return whole[:, head * config.head_dim : (head + 1) * config.head_dim]

    def project(name, head):
        if name == "v":
            return linear(name, head)
        y = normed(name, head) if config.qk_norm else linear(name, head)
        return rope(y, freq) * longer if turned else y

    out = 0
    for head in range(config.num_heads):
        q, k = project("q", head), project("k", head // group)
        s = q @ k.T / math.sqrt(config.query_scale or config.head_dim)
        s = jnp.where(sees, cap(s, config.attn_softcap), -jnp.inf)
        w = jnp.exp(s - s.max(1, keepdims=True))
        w = w / w.sum(1, keepdims=True)
        out = out + w @ project("v", head // group) @ p["o"]["kernel"][head]
    return out + p["o"]["bias"] if config.o_bias else out


def mlp(config, p, x):
    def linear(name, x):
        y = x @ p[name]["kernel"]
        return y + p[name]["bias"] if config.mlp_bias else y

    gate = activation(config.activation, linear("gate", x))
    return linear("down", gate * linear("up", x))


def hidden(config, params, tokens):
    """Hidden states [T, D] of one row of ids [T], after the final norm."""
    local = config.local_layers or [config.window is not None] * config.num_layers
    turned = config.rope_layers or [True] * config.num_layers
    x = params["embed"][jnp.asarray(tokens)]
    if config.embed_scale:
        x = x * math.sqrt(config.width)
    for layer in range(config.num_layers):
        p = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        y = norm(config, x, p["attn_norm"]["scale"]) if config.pre_norms else x
        y = attention(config, p["attn"], y, local[layer], turned[layer])
        if config.post_norms:
            y = norm(config, y, p["post_attn_norm"]["scale"])
        x = x + y
        y = norm(config, x, p["mlp_norm"]["scale"]) if config.pre_norms else x
        y = mlp(config, p["mlp"], y)
        if config.post_norms:
            y = norm(config, y, p["post_mlp_norm"]["scale"])
        x = x + y
    return norm(config, x, params["norm"]["scale"])


def logits(config, params, tokens):
    """[T, V] of one row."""
    h = hidden(config, params, tokens)
    head = params["embed"].T if config.tied else params["head"]
    return cap(h @ head, config.final_softcap)


def row_logps(logits_tv, tokens):
    """[T]: log p(tokens[t] | tokens[<t]); 0 at t = 0."""
    z = logits_tv - logits_tv.max(-1, keepdims=True)
    z = z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))
    picked = z[np.arange(len(tokens) - 1), jnp.asarray(tokens)[1:]]
    return jnp.concatenate([jnp.zeros(1, z.dtype), picked])


def logps(config, params, tokens):
    """[N, T] of rows of ids [N, T], every token but the first scored."""
    return jax.vmap(lambda row: row_logps(logits(config, params, row), row))(tokens)
