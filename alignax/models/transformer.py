"""One decoder-only transformer for Llama, SmolLM, Mistral, Qwen, Gemma and OLMo 2.

Flax Linen in a restricted dialect (only the `params` collection, the cache is an
argument, no `setup`) behind three pure functions: `hidden`, `unembed`, `init_cache`.
Layers are stacked on a leading axis L and scanned in training; with a cache they are
unrolled, because on CPU a scanned decode was measured 1.6 to 2.1 times slower.

Shape suffixes: n rows, t tokens, s keys, d width, h query heads, k kv heads,
g = h/k queries per kv head, e head size, f mlp width, v vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from alignax.batch import LM, Params
from alignax.models import int8, kernels, rope
from alignax.models.attention import Attend, attention, same_segment, with_tiles
from alignax.models.contract import KEPT, contract, keep
from alignax.models.rope import rotary, rotate

PARAM_RULES = (  # path regex -> spec; first match wins; no match is an error
    (r"embed$", P("model", "fsdp")),  # V D
    (r"(q|k|v)/kernel$", P(None, "fsdp", "model", None)),  # L D H K
    (r"o/kernel$", P(None, "model", None, "fsdp")),  # L H K D
    (r"(gate|up)/kernel$", P(None, "fsdp", "model")),  # L D F
    (r"down/kernel$", P(None, "model", "fsdp")),  # L F D
    (r"(q|k|v)/bias$", P(None, "model", None)),  # L H K
    (r"(gate|up)/bias$", P(None, "model")),  # L F
    (r"(o|down)/bias$", P()),  # L D
    (r"head$", P("fsdp", "model")),  # D V, untied
    # scales of int8 weights, one for an output channel
    (r"(q|k|v)/scale$", P(None, "model", None)),  # L H K
    (r"(gate|up)/scale$", P(None, "model")),  # L F
    (r"(o|down)/scale$", P()),  # L D
    (r"(embed|head)_scale$", P("model")),  # V
    (r"value_head/", P()),
    (r"norm/scale$", P()),
)

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
# What the backward pass computes again. none: nothing; elementwise: all but matrix products
# and attention, so norms and activations; block: a whole layer; dots: all but matrix products.
REMAT = ("none", "elementwise", "block", "dots")
POLICIES = {
    "elementwise": jax.checkpoint_policies.save_only_these_names(KEPT),
    "block": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# fields that decide how a model is computed, not what
HOW = ("dtype", "remat", "head_kernel", "attn_kernel", "attn_tile", "tokenizer")
# fields that came after caches of log-probabilities were first written
LATER = ("o_bias", "mlp_bias", "qk_norm_whole", "pre_norms", "rope_layers")
HEAD_KERNELS = (
    "xla",
    "pallas",
)  # pallas: on TPUs, if only log-probabilities are needed


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The static settings of a model. Sizes are in tokens, units or heads."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # need not be width / num_heads
    mlp_width: int
    max_length: int = 2048  # longest context the weights were made for
    family: str = "llama"  # names the weight table in models/families.py
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_offset: bool = False  # Gemma multiplies by 1 + scale
    embed_scale: bool = False  # Gemma multiplies embeddings by sqrt(width)
    tied: bool = True  # the head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False  # of the attention output
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False  # OLMo 2 normalises q and k over all heads at once
    pre_norms: bool = True  # OLMo 2 does not normalise what attention and MLP read
    post_norms: bool = False  # Gemma 2/3 and OLMo 2 normalise a branch before adding it
    rope_theta: float = 10_000.0
    rope_theta_local: float | None = None  # base of local layers; None = rope_theta
    rope_scaling: tuple | None = None  # (kind, *numbers), see rope.py
    rope_layers: tuple[bool, ...] = ()  # SmolLM3: which layers have RoPE; () = all
    query_scale: float | None = None  # scores are divided by its sqrt; None = head_dim
    attn_softcap: float | None = None
    final_softcap: float | None = None
    window: int | None = None  # tokens a local layer sees, itself included
    local_layers: tuple[
        bool, ...
    ] = ()  # one per layer; () = all local if window is set
    value_head: bool = False  # a scalar head: critic or reward model
    bos_id: int | None = None  # as the checkpoint states them; the tokenizer decides
    eos_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # of the computation; parameters keep theirs
    remat: str = "elementwise"  # what the backward pass recomputes: REMAT
    head_kernel: str = "xla"  # of the head's log-probabilities: HEAD_KERNELS
    attn_kernel: str = "xla"  # of attention without a cache: kernels.NAMES
    attn_tile: int = 0  # queries and keys of a tile of scores; 0: by platform
    tokenizer: str = ""  # path of the tokenizer of its ids, if it is not the run's

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}; known: {sorted(ACTIVATIONS)}"
            )
        if self.remat not in REMAT:
            raise ValueError(f"unknown remat {self.remat!r}; known: {REMAT}")
        if self.head_kernel not in HEAD_KERNELS:
            raise ValueError(
                f"unknown head_kernel {self.head_kernel!r}; known: {HEAD_KERNELS}"
            )
        if self.attn_kernel not in kernels.NAMES:
            raise ValueError(
                f"unknown attn_kernel {self.attn_kernel!r}; known: {kernels.NAMES}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        for name in ("local_layers", "rope_layers"):
            flags = getattr(self, name)
            if flags and len(flags) != self.num_layers:
                raise ValueError(
                    f"{name} has {len(flags)} entries, expected "
                    f"num_layers={self.num_layers}"
                )
        if self.qk_norm_whole and not self.qk_norm:
            raise ValueError("qk_norm_whole needs qk_norm")
        rope.check(self.rope_scaling, self.rope_theta)


class Cache(NamedTuple):
    """Keys and values of all layers for decoding; the slot of a token is its position.

    Right-padded prompts of different lengths need no other bookkeeping: a slot beyond the
    current position of a row is never attended, and is overwritten when the row reaches it.
    """

    k: tuple[Float[Array, "N k S e"], ...]  # one per layer
    v: tuple[Float[Array, "N k S e"], ...]


class Norm(nn.Module):
    """RMS norm over the last axis, in float32."""

    eps: float
    offset: bool

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        return (x32 * (scale.astype(jnp.float32) + float(self.offset))).astype(x.dtype)


class Project(nn.Module):
    """A linear map written as an einsum, with an optional bias on the output axes."""

    equation: str
    shape: tuple[int, ...]
    fan_in: int
    bias_shape: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.fan_in**-0.5)
        if self.has_variable("params", "left"):  # from sampling/weights.py
            y = self.from_left(x, cast(Any, self.get_variable("params", "left")))
        elif self.has_variable("params", "scale"):  # of an int8 kernel
            kernel = cast(Any, self.get_variable("params", "kernel"))
            y = contract(self.equation, x, kernel, jnp.float32)
            y = (y * self.get_variable("params", "scale")).astype(x.dtype)
        else:
            kernel = self.param("kernel", init, self.shape)
            y = contract(self.equation, x, kernel, x.dtype)
        if self.has_variable("params", "a"):  # from lora.attach
            y = y + self.low_rank(x)
        if self.has_variable("params", "gain"):  # of DoRA, on the output axes
            y = (y * self.get_variable("params", "gain")).astype(x.dtype)
        if self.bias_shape:
            bias = self.param("bias", nn.initializers.zeros, self.bias_shape)
            y = y + bias.astype(x.dtype)
        return y

    def from_left(self, x, kernel):
        """The product with a kernel that has the output axes first, its left operand."""
        inputs, out = self.equation.split("->")
        left, right = inputs.split(",")
        inner = "".join(c for c in right if c in left)
        first = right.removeprefix(inner) + inner
        return contract(f"{first},{left}->{out}", kernel.astype(x.dtype), x, x.dtype)

    def low_rank(self, x):
        """(x A) B, through one narrow axis r."""
        inputs, out = self.equation.split("->")
        left, right = inputs.split(",")
        inner = "".join(c for c in right if c in left)
        outer = "".join(c for c in right if c not in left)
        narrow = "".join(c for c in left if c not in inner) + "r"
        a, b = cast(Any, [self.get_variable("params", name) for name in "ab"])
        y = keep(contract(f"{left},{inner}r->{narrow}", x, a, x.dtype))
        return contract(f"{narrow},r{outer}->{out}", y, b, x.dtype)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_ntd, rope, positions, attend, local, kv, in_order):
        c = self.config
        d, e = c.width, c.head_dim
        fused = self.has_variable("params", "qkv")
        q, k, v = heads(c, "ntd,dhe->nthe", x_ntd, fused)
        q, k = rotate(q, rope), rotate(k, rope)
        if kv is None:
            key_positions = positions
        else:
            at = None if in_order else positions
            kv = k, v = written(kv[0], k, at), written(kv[1], v, at)
            key_positions = jnp.arange(k.shape[2])[None]
        y = None
        if c.attn_kernel != "xla":
            cached = kv is not None
            y = kernels.attend(q, k, v, positions, attend, local, c, in_order, cached)
        if y is None:
            if kv is None:
                k, v = jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)
            y = attention(q, k, v, positions, key_positions, attend, local, c, in_order)
        shape, bias = (c.num_heads, e, d), (d,) if c.o_bias else None
        y = Project("nthe,hed->ntd", shape, c.num_heads * e, bias, name="o")(y)
        return y, kv


def heads(c: ModelConfig, equation: str, x, fused: bool):
    """Queries, keys and values [..., H, E] before RoPE, inside a module of attention.

    Args:
      c: the settings.
      equation: of the projections.
      x: what attention reads, [..., D].
      fused: whether one kernel 'qkv' has all heads (see sampling/weights.py).
    """

    def projected(name, many):
        bias = (many, c.head_dim) if c.qkv_bias else None
        shape = c.width, many, c.head_dim
        return keep(Project(equation, shape, c.width, bias, name=name)(x))

    def normed(name, y):
        norm = Norm(c.norm_eps, c.norm_offset, name=f"{name}_norm")
        if c.qk_norm_whole:
            return norm(y.reshape(*y.shape[:-2], -1)).reshape(y.shape)
        return norm(y)

    h, k = c.num_heads, c.num_kv_heads
    if fused:
        parts = jnp.split(projected("qkv", h + 2 * k), (h, h + k), axis=-2)
    else:
        parts = [projected(name, m) for name, m in zip("qkv", (h, k, k), strict=True)]
    if c.qk_norm:
        parts[:2] = [normed(name, y) for name, y in zip("qk", parts[:2], strict=True)]
    return parts


def written(cache, new, positions):
    """A layer's keys or values [N, K, S, E], with those of new tokens [N, T, K, E].

    Args:
      cache: what is there.
      new: of these tokens.
      positions: their slots [N, T]; None for the first T.
    """
    new = new.astype(cache.dtype)
    if positions is None:
        return cache.at[:, :, : new.shape[1]].set(jnp.moveaxis(new, 1, 2))
    row = jnp.arange(len(new))[:, None]
    return cache.at[row, :, positions].set(new)


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_ntd):
        c = self.config
        d, f = c.width, c.mlp_width

        def wide(name, f):
            bias = (f,) if c.mlp_bias else None
            return keep(Project("ntd,df->ntf", (d, f), d, bias, name=name)(x_ntd))

        if self.has_variable("params", "gate_up"):  # from sampling/weights.py
            gate, up = jnp.split(wide("gate_up", 2 * f), 2, -1)
        else:
            gate, up = wide("gate", f), wide("up", f)
        y = ACTIVATIONS[c.activation](gate) * up
        bias = (d,) if c.mlp_bias else None
        return Project("ntf,fd->ntd", (f, d), f, bias, name="down")(y)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_ntd, rope, positions, attend, local, kv, in_order=False):
        c = self.config
        y, kv = Attention(c, name="attn")(
            before(c, "attn", x_ntd), rope, positions, attend, local, kv, in_order
        )
        x_ntd = keep(x_ntd + after(c, "attn", y))
        y = MLP(c, name="mlp")(before(c, "mlp", x_ntd))
        return x_ntd + after(c, "mlp", y), kv


def before(c: ModelConfig, branch: str, x):
    """What the branch 'attn' or 'mlp' reads of the residual stream, inside a block."""
    if not c.pre_norms:
        return x
    return Norm(c.norm_eps, c.norm_offset, name=f"{branch}_norm")(x)


def after(c: ModelConfig, branch: str, y):
    """What the branch 'attn' or 'mlp' adds to the residual stream, inside a block."""
    if not c.post_norms:
        return y
    return Norm(c.norm_eps, c.norm_offset, name=f"post_{branch}_norm")(keep(y))


class _Kind(NamedTuple):
    """What differs from layer to layer: bools, or arrays of them while scanning."""

    local: Any  # attention sees a window
    turned: Any  # queries and keys have RoPE

    def rope(self, ropes):
        """Of (cos, sin) of the other layers and of the local ones, those of this layer."""
        cos, sin = jax.tree.map(lambda a, b: jnp.where(self.local, b, a), *ropes)
        if self.turned is True:
            return cos, sin
        return jnp.where(self.turned, cos, 1.0), jnp.where(self.turned, sin, 0.0)


def _kinds(config: ModelConfig) -> list[_Kind]:
    many = config.num_layers
    local = config.local_layers or (config.window is not None,) * many
    turned = config.rope_layers or (True,) * many
    return [_Kind(bool(a), bool(b)) for a, b in zip(local, turned, strict=True)]


def init(config: ModelConfig, key) -> Params:
    """Draws parameters: float32, every layer stacked on a leading axis L.

    Args:
      config: sizes of the model.
      key: `jax.random.key`.

    Returns:
      A nested dict of parameters, with the paths of PARAM_RULES.
    """
    keys = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.width))
    position = jnp.zeros((1, 1), jnp.int32)
    turns = rotary(position, config.head_dim, 1.0, None)

    def block(key):
        args = (x, turns, position, None, False, None)
        return Block(config).init(key, *args)["params"]

    normal = jax.random.normal
    params = {
        "embed": 0.02 * normal(keys[0], (config.vocab_size, config.width)),
        "blocks": jax.vmap(block)(jax.random.split(keys[1], config.num_layers)),
        "norm": {
            "scale": jnp.full(
                (config.width,), 0.0 if config.norm_offset else 1.0, jnp.float32
            )
        },
    }
    if not config.tied:
        shape = (config.width, config.vocab_size)
        params["head"] = normal(keys[2], shape) * config.width**-0.5
    if config.value_head:
        params["value_head"] = {"kernel": jnp.zeros((config.width,))}
    return params


def tree_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter that `init` would make, without making it."""
    tree = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(k.key) for k in keys): leaf.shape for keys, leaf in flat}


def init_cache(config: ModelConfig, rows: int, length: int) -> Cache:
    """An empty cache for `rows` rows of up to `length` tokens, in config.dtype."""
    shape = (rows, config.num_kv_heads, length, config.head_dim)
    zeros = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
    return Cache(zeros, tuple(jnp.zeros_like(z) for z in zeros))


def unstack(lms: Any) -> Any:
    """Splits the stacked layers of every LM of a tree into a tuple, once for many steps."""

    def one(lm):
        if not isinstance(lm, LM) or isinstance(lm.params["blocks"], tuple):
            return lm
        blocks = lm.params["blocks"]
        layers = tuple(
            jax.tree.map(lambda p, i=i: p[i], blocks)
            for i in range(lm.config.num_layers)
        )
        return LM(lm.config, {**lm.params, "blocks": layers})

    return jax.tree.map(one, lms, is_leaf=lambda x: isinstance(x, LM))


def hidden(
    lm: LM,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"] | None = None,
    attend: Int[Array, "N T"] | Attend | None = None,
    cache: Cache | None = None,
    edit: Callable | None = None,
) -> tuple[Float[Array, "N T D"], Cache | None]:
    """Runs the decoder up to and including the final norm.

    Args:
      lm: config and parameters (stacked layers, or the tuple that `unstack` gives).
      tokens: ids; right padding needs no mask, since no real token sees a later one.
      positions: position of each token, default 0..T-1. With a cache it is also the
        slot that is written.
      attend: a mask besides the causal one; an array holds segment ids, and a token sees
        its own segment. None = one segment. Not with a cache.
      cache: from `init_cache`; None in training.
      edit: `edit(x, layer) -> x` on the residual stream after each layer.

    Returns:
      Hidden states in the computation's dtype, and the updated cache (None without).

    Raises:
      ValueError: rows that are longer than `rope_scaling` is defined for.
    """
    c, params = lm.config, lm.params
    in_order = positions is None  # then a token's position is its column
    if cache is not None or in_order:  # rows of several texts may be longer than each
        slots = tokens.shape[1] if cache is None else cache.k[0].shape[2]
        rope.check_length(c.rope_scaling, slots, c.max_length)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    if attend is not None and not isinstance(attend, Attend):
        attend = Attend((attend,), same_segment)
    if attend is not None and cache is None:
        attend = with_tiles(attend, positions, c)
    x = embedded(lm, tokens)
    ropes = (
        rotary(positions, c.head_dim, c.rope_theta, c.rope_scaling),
        rotary(positions, c.head_dim, c.rope_theta_local, None)
        if c.rope_theta_local
        else rotary(positions, c.head_dim, c.rope_theta, c.rope_scaling),
    )

    def block(x, layer_params, layer, kind, kv) -> tuple[Any, Any]:
        args = (x, kind.rope(ropes), positions, attend, kind.local, kv, in_order)
        x, kv = cast(Any, Block(c).apply({"params": layer_params}, *args))
        return (x if edit is None else edit(x, layer)), kv

    blocks: Any = params["blocks"]
    kinds = _kinds(c)
    # what all layers share is known while tracing
    shared = [len({*flags}) == 1 for flags in zip(*kinds, strict=True)]
    if cache is None and not isinstance(blocks, tuple):

        def body(x, xs):
            layer_params, layer, flags = xs
            flags = [a if s else b for s, a, b in zip(shared, kinds[0], flags, strict=True)]  # fmt: skip
            return block(x, layer_params, layer, _Kind(*flags), None)[0], None

        if c.remat != "none":
            body = jax.checkpoint(body, policy=POLICIES[c.remat])
        layers = jnp.arange(c.num_layers)
        flags = [jnp.asarray(column) for column in zip(*kinds, strict=True)]
        x, _ = jax.lax.scan(body, x, (blocks, layers, flags))
    else:
        unrolled = blocks if isinstance(blocks, tuple) else unstack(lm).params["blocks"]
        kvs = []
        for i, layer_params in enumerate(unrolled):
            kv = None if cache is None else (cache.k[i], cache.v[i])
            x, kv = block(x, layer_params, i, kinds[i], kv)
            kvs.append(kv)
        if cache is not None:
            cache = Cache(tuple(kv[0] for kv in kvs), tuple(kv[1] for kv in kvs))
    norm = Norm(c.norm_eps, c.norm_offset)
    return cast(Array, norm.apply({"params": params["norm"]}, x)), cache


def embedded(lm: LM, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """The embeddings of ids, as the first layer reads them."""
    c, table = lm.config, lm.params["embed"]
    if "embed_scale" in lm.params:  # int8
        rows = table[tokens].astype(jnp.float32)
        x = (rows * lm.params["embed_scale"][tokens][..., None]).astype(c.dtype)
    else:
        x = look_up(table, tokens).astype(c.dtype)
    return x * jnp.asarray(c.width**0.5, x.dtype) if c.embed_scale else x


@jax.custom_vjp
def look_up(
    table: Float[Array, "V D"], ids: Int[Array, "..."]
) -> Float[Array, "... D"]:
    """Rows of a table. Its gradient is added up in float32, whatever its dtype.

    In bfloat16 a sum over many tokens would stop at 256 times what is added to it.
    """
    return table[ids]


def _look_up(table, ids):
    return table[ids], (ids, table.shape[0], jnp.zeros((), table.dtype))


def _look_up_backward(kept, g):
    ids, size, like = kept
    total = jnp.zeros((size, g.shape[-1]), jnp.float32)
    return total.at[ids].add(g.astype(jnp.float32)).astype(like.dtype), None


look_up.defvjp(_look_up, _look_up_backward)


_HEADS = {
    True: ("embed", 0),
    False: ("head", 1),
}  # tied -> the leaf, and its axis of ids


def head(lm: LM) -> tuple[Array, int]:
    """The output matrix as stored, and which of its axes is the vocabulary.

    Of int8 weights it is their product with the scales, in the dtype of the computation.
    """
    name, axis = _HEADS[lm.config.tied]
    weight = int8.table(lm.params, name)
    if f"{name}_scale" in lm.params:
        weight = weight.astype(lm.config.dtype)
    return weight, axis


def softcap(logits: Array, cap: float | None) -> Array:
    """Gemma 2's soft-cap of logits, cap * tanh(logits / cap); None changes nothing."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def limit_ids(lm: LM, ids: int) -> LM:
    """The LM with its first `ids` ids alone to decode; itself if it has no more.

    For a table that is padded beyond the ids of a tokenizer. The parameters are the same
    arrays. Log-probabilities stay those of the whole table; `unembed` and all that samples
    knows the first ids only, so that no other is ever drawn.
    """
    if ids >= lm.config.vocab_size:
        return lm
    return LM(dataclasses.replace(lm.config, vocab_size=ids), lm.params)


def unembed(
    lm: LM, h: Float[Array, "... D"], *, whole: bool = False
) -> Float[Array, "... V"]:
    """Logits in float32, accumulated in float32 whatever the model's dtype.

    Args:
      lm: the model.
      h: hidden states.
      whole: of every row of the table, also of those that `limit_ids` leaves out.
    """
    name, axis = _HEADS[lm.config.tied]
    logits = jax.lax.dot_general(
        lm.params[name].astype(h.dtype), h,
        (((1 - axis,), (h.ndim - 1,)), ((), ())),
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip
    logits = jnp.moveaxis(logits, 0, -1)
    if f"{name}_scale" in lm.params:  # of int8 weights, exact after the product
        logits = logits * lm.params[f"{name}_scale"]
    logits = softcap(logits, lm.config.final_softcap)
    return logits if whole else logits[..., : lm.config.vocab_size]


def num_params(params: Params) -> int:
    """Number of parameters in a tree."""
    return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params))
