"""What a config takes, parameter by parameter, before anything is read or compiled."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax.batch import LM
from alignax.models import lora, sharding, transformer
from alignax.reports.metrics import flops_per_token
from alignax.text import tokenizer
from alignax.training import loading, optim, ranges, stages


def explain(config) -> str:
    """Parameters, shapes, specs and bytes per device, without reading any weights."""
    if config.get("stages"):
        stages.check(config.stages)
        parts = []
        for name, stage in config.stages.items():
            c = stage.copy_and_resolve_references()
            *_, first = stages.lineage(c, config.stages)
            c.model.path, c.model.sizes = first.model.path, first.model.sizes
            c.tokenizer = c.tokenizer or first.tokenizer
            parts.append(f"== {name} ==\n{explain(c)}")
        return "\n".join(parts)
    ranges.check(config)
    mesh = sharding.make_mesh(config.mesh)
    if config.model.sizes:
        vocab_size = (
            config.model.sizes.get("vocab_size")
            or tokenizer.load(config.tokenizer).vocab_size
        )
        model = loading.model_config(config, vocab_size)
        shapes = jax.eval_shape(
            functools.partial(transformer.init, model), jax.random.key(0)
        )
    else:
        lm = loading.load_lm(config.model.path)
        model, shapes = lm.config, lm.params
    if adapters := loading.lora_settings(config):
        trained = jax.eval_shape(
            lambda params, key: lora.init(LM(model, params), adapters, key),
            shapes, jax.random.key(0),
        )  # fmt: skip
    else:
        trained = _cast(shapes, config.model.param_dtype)
    lines = []
    for tree in (shapes, trained) if adapters else (shapes,):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = sharding.path_string(path)
            spec = sharding.spec(name, leaf.shape, mesh)
            lines.append(f"  {name:<32} {tuple(leaf.shape)!s:<28} {spec}")
    total = transformer.num_params(shapes)
    lines.append(
        f"{total:,} parameters, {model.num_layers} layers, mesh {dict(mesh.shape)}"
    )
    others = {v for v in config.lms.values() if v != "average"}
    kept = ""
    if adapters:
        others -= {"init"}  # that is the base
        count = transformer.num_params(trained)
        flops = flops_per_token(count, "train", frozen=total)
        lines.append(
            f"{count:,} of adapters are trained ({count / total:.2%}), "
            f"{flops / (6 * total):.0%} of the FLOPs of training all"
        )
        kept = f"{_size(trained, mesh)} of adapters, "
    tx = optim.make_tx(
        0.0, **{k: v for k, v in config.optim.items() if k not in optim.RATE}
    )
    state = jax.eval_shape(tx.init, trained)
    # micro-batches are added up in float32
    gradient = _cast(trained, "float32") if config.accumulate > 1 else trained
    lines.append(
        f"per device: {_copies(config, shapes, len(others), mesh)}, "
        f"{kept}{_size(gradient, mesh)} of gradient, {_size(state, mesh)} of "
        f"{config.optim.name} state"
    )
    return "\n".join(lines)


def _copies(config, shapes, others: int, mesh: Mesh) -> str:
    """What the policy, or the base of adapters, and the other frozen LMs take."""
    whole = _size(_cast(shapes, config.model.param_dtype), mesh)
    adapters = bool(config.lora.rank)
    if not (dtype := config.model.frozen_dtype):
        first = "base" if adapters else "policy"
        return f"{whole} a copy; {1 + others} copies ({first}, frozen LMs)"
    frozen = jax.eval_shape(
        lambda x: loading.as_frozen(loading.cast(x, config.model.param_dtype), dtype),
        shapes,
    )
    small = f"{_size(frozen, mesh)} a frozen copy in {dtype}"
    if adapters:
        return f"{small}; {1 + others} copies (base, frozen LMs)"
    return f"{whole} of the policy, {small}; {others} copies (frozen LMs)"


def _cast(tree, dtype: str):
    """The shapes of a tree of parameters in another dtype."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), tree)


def _size(tree, mesh: Mesh) -> str:
    """What a tree takes on one device."""

    def one(x, place):
        return math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize

    sizes = jax.tree.map(one, tree, sharding.shardings(tree, mesh))
    size = sum(jax.tree.leaves(sizes))
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
