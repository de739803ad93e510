"""LoRA and DoRA: low-rank adapters of frozen weights, as a parameter tree of their own.

  LoRA   y = x (W + s A B),                    A: [in, r],  B: [r, out],  s = α / r
  DoRA   y = x (W + s A B) m / |W + s A B|,    m: [out],  |.|: the norm of a column

A B is zero at the start and m = |W|. The base is frozen and serves as the reference: while
A B is zero, every log-probability is that of the base, bit for bit (with DoRA, if the norm
is rounded as it was at the start). The gradient does not pass through the norm (section 4.3
of the paper, and PEFT). Only the adapters have gradients and optimiser state.

Ranks and layers may differ: a module of a smaller rank has zeros in the columns of A and the
rows of B beyond it, and a layer without adapters has rank 0. The gradient of these zeros is
zero, so that every optimiser leaves them as they are.

Beside low-rank adapters a tree can hold leaves that replace the base's (`Lora.saved`, biases,
the value head).

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised scaling
s = α / √r: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732; DoRA: Liu et al. 2024,
https://arxiv.org/abs/2402.09353
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alignax.batch import LM, Params
from alignax.models import int8

# L ... r, L r ... and L ...: small, on every device (gain: of `attach`)
PARAM_RULES = ((r"/(a|b|magnitude|gain)$", P()),)
TARGETS = {  # name of a projection -> (its module, number of input axes)
    "q": ("attn", 1), "k": ("attn", 1), "v": ("attn", 1), "o": ("attn", 2),
    "gate": ("mlp", 1), "up": ("mlp", 1), "down": ("mlp", 1),
}  # fmt: skip
TABLES = ("embed", "head")  # matrices outside of the layers: V D and D V
BIASES = ("none", "all", "lora_only")  # which are trained; the names are PEFT's


@dataclasses.dataclass(frozen=True)
class Lora:
    """The static settings of adapters.

    Attributes:
      rank: r, of every target that `ranks` does not name.
      alpha: α, of every target that `alphas` does not name.
      targets: names of TARGETS and TABLES. The embedding of a tied model is its head too.
      rank_stabilised: s = α / √r instead of α / r.
      dora: a magnitude m beside A and B.
      layers: numbers of the layers with adapters, from 0; () is all.
      ranks: rank by target ('q'), or by target and layer ('q/3'); 0 is no adapters there.
      alphas: α by target, or by target and layer.
      saved: of TABLES and 'value_head', what is trained in full. A value head always is.
      bias: which biases of projections are trained: 'none', 'all', or 'lora_only', of
        those with adapters.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = tuple(TARGETS)
    rank_stabilised: bool = False
    dora: bool = False
    layers: tuple[int, ...] = ()
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    saved: tuple[str, ...] = ()
    bias: str = "none"

    def __post_init__(self):
        known = (*TARGETS, *TABLES)
        if set(self.targets) - set(known) or not self.targets:
            raise ValueError(
                f"lora.targets is {list(self.targets)}; it takes some of {list(known)}"
            )
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}, expected at least 1")
        full = (*TABLES, "value_head")
        if set(self.saved) - set(full):
            raise ValueError(
                f"lora.saved is {list(self.saved)}; it takes some of {list(full)}"
            )
        if both := sorted(set(self.saved) & set(self.targets)):
            raise ValueError(f"lora.saved and lora.targets both have {both[0]!r}")
        if self.bias not in BIASES:
            raise ValueError(
                f"lora.bias is {self.bias!r}, expected one of {list(BIASES)}"
            )
        for key, own in (("ranks", self.ranks), ("alphas", self.alphas)):
            for name, value in own.items():
                _check_own(f"lora.{key}", name, value, self.targets, key == "ranks")

    @property
    def scale(self) -> float:
        """s, of a target without a rank and an α of its own."""
        return self._scale(self.rank, self.alpha)

    def ranks_of(self, target: str, num_layers: int) -> tuple[int, ...]:
        """The rank of a target in every layer, 0 without adapters; one rank of a table."""
        if target in TABLES:
            return (self.ranks.get(target, self.rank),)
        return tuple(
            _own(self.ranks, target, i, self.rank)
            if not self.layers or i in self.layers
            else 0
            for i in range(num_layers)
        )

    def alphas_of(self, target: str, num_layers: int) -> tuple[float, ...]:
        """α of a target in every layer; one of a table."""
        if target in TABLES:
            return (self.alphas.get(target, self.alpha),)
        return tuple(
            _own(self.alphas, target, i, self.alpha) for i in range(num_layers)
        )

    def scales_of(self, target: str, num_layers: int) -> tuple[float, ...]:
        """s of a target in every layer, 0 without adapters; one of a table."""
        both = zip(
            self.ranks_of(target, num_layers), self.alphas_of(target, num_layers),
            strict=True,
        )  # fmt: skip
        return tuple(self._scale(r, alpha) if r else 0.0 for r, alpha in both)

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def init(base: LM, lora: Lora, key) -> Params:
    """Draws adapters for a model: A uniform in ±1/√in and B zero, as PEFT does.

    Of the embedding A is zero and B normal, as in PEFT.

    Args:
      base: the frozen model; its value head, if it has one, is trained in full.
      lora: the settings.
      key: `jax.random.key`.

    Returns:
      {'blocks': {'attn' | 'mlp': {name: node}}, name of a table: node}, float32; a node is
      {'a': [L, *in, r], 'b': [L, r, *out]} and with DoRA 'magnitude': [L, *out], without
      the axis L for a table. What is trained in full has the base's place and shape.

    Raises:
      ValueError: the base does not have what the settings name.
    """
    _check_base(base, lora)
    layers = base.config.num_layers
    out: Params = {"blocks": {}}
    for i, name in enumerate(sorted(lora.targets)):
        kernel, inputs = _kernel(base, name, whole=lora.dora)
        ranks = lora.ranks_of(name, layers)
        node = _draw(kernel, inputs, ranks, jax.random.fold_in(key, i), name)
        if lora.dora:
            norm = _norm(_stacked(kernel.astype(jnp.float32), inputs))
            norm = jnp.where(_column(ranks) > 0, norm, 0.0)
            node["magnitude"] = norm.reshape(
                kernel.shape[0], *kernel.shape[inputs + 1 :]
            )
        if name in TABLES:
            out[name] = {k: v[0] for k, v in node.items()}
        else:
            out["blocks"].setdefault(TARGETS[name][0], {})[name] = node
    for part, name, bias in _biases(base, lora):
        some = _column(lora.ranks_of(name, layers)) > 0
        bias = bias.astype(jnp.float32)
        if lora.bias == "lora_only":
            bias = jnp.where(some.reshape(-1, *[1] * (bias.ndim - 1)), bias, 0.0)
        out["blocks"].setdefault(part, {}).setdefault(name, {})["bias"] = bias
    for name in set(lora.saved) & set(TABLES):
        out[name] = int8.table(base.params, name).astype(jnp.float32)
    if "value_head" in base.params:
        out["value_head"] = base.params["value_head"]
    return out


def attach(base: LM, adapters: Params, lora: Lora) -> LM:
    """The adapted model: the base's tree, with A and s·B beside each target's kernel.

    With DoRA the node of a kernel has 'gain' [L, *out] too, m / |W + s A B|. The adapters of
    a table are added to it, in float32.
    """

    def beside(kernel, inputs, node, ranks, scales):
        new = {"a": node["a"], "b": _scaled(node["b"], scales)}
        if "magnitude" in node:
            norm = _norm_of_sum(_stacked(kernel, inputs), new)
            gain = _gain(node, norm, ranks)
            new["gain"] = gain.reshape(kernel.shape[0], *kernel.shape[inputs + 1 :])
        return new

    return _put(base, adapters, lora, beside, lambda old, new: new)


def merge(base: LM, adapters: Params, lora: Lora) -> LM:
    """The adapters merged into the weights, computed in float32, in the base's dtypes.

    Those of a base in int8 are merged into the weights that it stands for.
    """
    base = LM(base.config, int8.dequantize(base.params))

    def merged(kernel, inputs, node, ranks, scales):
        whole = _sum(kernel, inputs, node, ranks, scales)
        return {"kernel": whole.astype(kernel.dtype)}

    def replaced(old, new):
        return new.astype((base.params["embed"] if old is None else old).dtype)

    return _put(base, adapters, lora, merged, replaced)


def table(base: LM, name: str, node: Params | None, lora: Lora):
    """The embedding [V, D] or the head [D, V] of a model with adapters, float32."""
    kernel, inputs = _kernel(base, name, whole=True)
    if node is None:
        return kernel[0].astype(jnp.float32)
    node = jax.tree.map(lambda x: jnp.asarray(x)[None], node)
    how = lora.ranks_of(name, 1), lora.scales_of(name, 1)
    return _sum(kernel, inputs, node, *how)[0]


def is_adapters(params: Params) -> bool:
    """Whether a tree is adapters alone: it lacks the final norm."""
    return "norm" not in params


def targets_of(adapters: Params) -> Iterator[tuple[str, Params]]:
    """(name of a target, its node) of the low-rank adapters in a tree."""
    for part in ("attn", "mlp"):
        for name, node in sorted(adapters["blocks"].get(part, {}).items()):
            if "a" in node:
                yield name, node
    for name in TABLES:
        if isinstance(adapters.get(name), dict):
            yield name, adapters[name]


def _put(base: LM, adapters: Params, lora: Lora, one, replaced) -> LM:
    """The base with adapters in their places.

    Args:
      base: the frozen model.
      adapters: the tree.
      lora: its settings.
      one: (kernel [L, ...], input axes, node, ranks, scales) -> what takes its place.
      replaced: (leaf of the base or None, leaf of the adapters) -> what takes its place.
    """
    layers = base.config.num_layers
    tree = {k: v for k, v in adapters.items() if k not in TABLES}
    tree = jax.tree.map(lambda x: x, tree)  # dictionaries of its own
    for name, node in targets_of(adapters):
        kernel, inputs = _kernel(base, name, whole=lora.dora)
        how = lora.ranks_of(name, layers), lora.scales_of(name, layers)
        if name in TABLES:
            whole = table(base, name, node, lora)
            tree[name] = replaced(base.params.get(name, base.params["embed"]), whole)
        else:
            rest = {k: v for k, v in node.items() if k not in ("a", "b", "magnitude")}
            new = {**rest, **one(kernel, inputs, node, *how)}
            tree["blocks"][TARGETS[name][0]][name] = new
    if lora.bias == "lora_only":
        for part, name, bias in _biases(base, lora):
            some = np.array(lora.ranks_of(name, layers)).reshape(
                -1, *[1] * (bias.ndim - 1)
            )
            node = tree["blocks"].get(part, {}).get(name, {})
            if "bias" in node:
                node["bias"] = jnp.where(some > 0, node["bias"], bias)
    tree |= {k: adapters[k] for k in TABLES if k in adapters and k not in tree}
    params = _update(base.params, tree, replaced)
    for name in TABLES:  # what takes the place of int8 has no scale
        if name in tree:
            params.pop(f"{name}_scale", None)
    config = dataclasses.replace(
        base.config, tied=base.config.tied and "head" not in params,
        value_head="value_head" in params,
    )  # fmt: skip
    if params["embed"].shape[0] != base.params["embed"].shape[0]:  # other tokens
        config = dataclasses.replace(config, vocab_size=params["embed"].shape[0])
    return LM(config, params)


def _draw(kernel, inputs: int, ranks: tuple[int, ...], key, name: str) -> Params:
    """A and B of a kernel [L, *in, *out], with zeros beyond the rank of each layer."""
    layers, *shape = kernel.shape
    rank = max(ranks)
    a_shape = (layers, *shape[:inputs], rank)
    b_shape = (layers, rank, *shape[inputs:])
    if name == "embed":
        return {"a": jnp.zeros(a_shape), "b": jax.random.normal(key, b_shape)}
    bound = math.prod(shape[:inputs]) ** -0.5
    a = jax.random.uniform(key, a_shape, minval=-bound, maxval=bound)
    if len(set(ranks)) > 1:
        some = np.arange(rank) < np.array(ranks)[:, None]  # L r
        a = jnp.where(some.reshape(layers, *[1] * inputs, rank), a, 0.0)
    return {"a": a, "b": jnp.zeros(b_shape)}


def _sum(kernel, inputs: int, node: Params, ranks, scales):
    """W + s A B, and with DoRA that with columns of norm m, float32."""
    new = {"a": node["a"], "b": _scaled(node["b"], scales)}
    a, b = _pair(new)
    product = jnp.matmul(a, b, precision="highest")
    whole = _stacked(kernel.astype(jnp.float32), inputs) + product
    if "magnitude" in node:
        whole = whole * _gain(node, _norm(whole), ranks)[:, None]
    return whole.reshape(kernel.shape)


def _gain(node: Params, norm, ranks):
    """m / |W + s A B| [L, out], 1 in layers without adapters."""
    norm = jax.lax.stop_gradient(jnp.where(norm > 0, norm, 1.0))
    gain = node["magnitude"].reshape(norm.shape) / norm
    return gain if all(ranks) else jnp.where(_column(ranks) > 0, gain, 1.0)


def _norm(matrix):
    """The norms of the columns of [L, in, out]."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix), 1))


def _norm_of_sum(kernel, node: Params):
    """The norms of the columns of W + A B, [L, out]; no other matrix of W's size is made."""
    a, b = _pair(node)
    kernel = kernel.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        mixed = jnp.einsum("lio,lir->lro", kernel, a)
        inner = jnp.einsum("lir,lis->lrs", a, a)
        square = jnp.sum(jnp.square(kernel), 1)
        square += jnp.sum((2 * mixed + jnp.einsum("lrs,lso->lro", inner, b)) * b, 1)
    return jnp.sqrt(jnp.maximum(square, 0.0))


def _pair(node: Params) -> tuple[Any, Any]:
    """A [L, in, r] and B [L, r, out], their axes merged."""
    layers, rank = node["a"].shape[0], node["a"].shape[-1]
    return node["a"].reshape(layers, -1, rank), node["b"].reshape(layers, rank, -1)


def _scaled(b, scales: tuple[float, ...]):
    """s·B for a scale of each layer."""
    if len(set(scales)) == 1:
        return b * scales[0]
    return b * np.array(scales, np.float32).reshape(-1, *[1] * (b.ndim - 1))


def _stacked(kernel, inputs: int):
    """A kernel [L, *in, *out] as [L, in, out]."""
    return kernel.reshape(kernel.shape[0], math.prod(kernel.shape[1 : inputs + 1]), -1)


def _kernel(base: LM, target: str, *, whole: bool) -> tuple[Any, int]:
    """The matrix of a target with an axis L, and its number of input axes.

    Args:
      base: the model.
      target: a projection or a table.
      whole: multiplied with its scales if it is in int8; otherwise for its shape alone.
    """
    if target in TARGETS:
        part, inputs = TARGETS[target]
        node = base.params["blocks"][part][target]
        return int8.kernel(target, node) if whole else node["kernel"], inputs
    name = "embed" if target == "head" and "head" not in base.params else target
    matrix = int8.table(base.params, name) if whole else base.params[name]
    return (matrix if name == target else matrix.T)[None], 1


def _biases(base: LM, lora: Lora) -> Iterator[tuple[str, str, Any]]:
    """(module, projection, bias [L, *out]) of the biases that are trained."""
    for name, (part, _) in TARGETS.items():
        wanted = lora.bias == "all" or (
            lora.bias == "lora_only" and name in lora.targets
        )
        node = base.params["blocks"][part][name]
        if wanted and "bias" in node:
            yield part, name, node["bias"]


def _column(ranks: tuple[int, ...]) -> np.ndarray:
    return np.array(ranks)[:, None]


def _own(values: Mapping[str, Any], target: str, layer: int, default: Any) -> Any:
    """The value of a target in a layer: its own, its target's, or the default."""
    return values.get(f"{target}/{layer}", values.get(target, default))


def _check_own(key: str, name: str, value: Any, targets, whole: bool) -> None:
    """Raises ValueError for a rank or an alpha of its own that means nothing."""
    target, _, layer = name.partition("/")
    table = target in TABLES and "/" in name
    if target not in targets or table or ("/" in name and not layer.isdecimal()):
        raise ValueError(
            f"{key} has {name!r}, expected one of lora.targets, or with a layer, as 'q/3'"
        )
    kinds = int if whole else int | float
    low = 0 if whole and target not in TABLES else 1 if whole else 1e-6
    if (
        not isinstance(value, kinds)
        or isinstance(value, bool)
        or not low <= value < 2**31
    ):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{key}.{name} is {value!r}, expected {kind} from {low}")


def _check_base(base: LM, lora: Lora) -> None:
    """Raises ValueError for settings that name what a model does not have."""
    c, named = base.config, {*lora.targets, *lora.saved}
    if c.tied and "head" in named:
        raise ValueError(
            "lora: the head of this model is its embedding (tied): name 'embed', which is "
            "adapted for both"
        )
    if c.tied and lora.dora and "embed" in lora.targets:
        raise ValueError(
            "lora.dora of an embedding that is the head too (tied) is not supported: its "
            "columns and those of the head are not the same; name it in lora.saved"
        )
    if "value_head" in named and not c.value_head:
        raise ValueError("lora.saved has 'value_head', and the model has none")
    layers = {*lora.layers}
    layers |= {int(x.split("/")[1]) for x in (*lora.ranks, *lora.alphas) if "/" in x}
    if beyond := sorted(x for x in layers if not 0 <= x < c.num_layers):
        raise ValueError(
            f"lora: there is no layer {beyond[0]}, the model has {c.num_layers}, from 0"
        )
    if empty := [x for x in lora.targets if not any(lora.ranks_of(x, c.num_layers))]:
        raise ValueError(f"lora.targets has {empty[0]!r}, of rank 0 in every layer")
    if lora.bias != "none" and not list(_biases(base, lora)):
        raise ValueError(f"lora.bias is {lora.bias!r}, and there are no such biases")


def _update(tree: Params, other: Params, replaced) -> Params:
    """A nested dict with the leaves of another put into it; neither is changed."""
    out = dict(tree)
    for key, value in other.items():
        if isinstance(value, dict):
            out[key] = _update(out.get(key, {}), value, replaced)
        else:
            out[key] = replaced(out.get(key), value)
    return out
