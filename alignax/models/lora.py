"""LoRA: low-rank adapters of frozen weights, as a parameter tree of their own.

  y = x W + s (x A) B,   A: [in, r],   B: [r, out], zero at the start,   s = α / r

The base is frozen and serves as the reference: while B is zero, every log-probability is
that of the base, bit for bit. Only the adapters have gradients and optimiser state.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised scaling
s = α / √r: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alignax.batch import LM, Params
from alignax.models import families, json_object, sizes
from alignax.models.save import at_once, check_target
from alignax.models.stored import safetensors
from alignax.models.transformer import ModelConfig

PARAM_RULES = ((r"/(a|b)$", P()),)  # L ... r and L r ...: small, on every device
TARGETS = {  # name of a projection -> (its module, number of input axes)
    "q": ("attn", 1), "k": ("attn", 1), "v": ("attn", 1), "o": ("attn", 2),
    "gate": ("mlp", 1), "up": ("mlp", 1), "down": ("mlp", 1),
}  # fmt: skip
# PEFT_FREE: settings of PEFT that are read here, or that do not change what trained
# adapters compute. PEFT_VALUES: settings of which some values are plain LoRA. Any other
# setting must be off.
PEFT_FREE = (
    "r", "lora_alpha", "target_modules", "use_rslora", "exclude_modules", "task_type",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "inference_mode", "lora_dropout", "megatron_config", "megatron_core",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
)  # fmt: skip
PEFT_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # other values (PiSSA, CorDA, LoftQ, ...) change the base
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """The static settings of adapters."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = tuple(TARGETS)
    rank_stabilised: bool = False

    def __post_init__(self):
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise ValueError(
                f"lora.targets is {list(self.targets)}; it takes some of {list(TARGETS)}"
            )
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}, expected at least 1")

    @property
    def scale(self) -> float:
        """s, the factor of the product A B."""
        return self.alpha / (
            math.sqrt(self.rank) if self.rank_stabilised else self.rank
        )


def init(base: LM, lora: Lora, key) -> Params:
    """Draws adapters for a model: A uniform in ±1/√in, as PEFT does, B zero.

    Args:
      base: the frozen model; its value head, if it has one, is trained in full.
      lora: rank and targets.
      key: `jax.random.key`.

    Returns:
      {'blocks': {'attn' | 'mlp': {name: {'a': [L, *in, r], 'b': [L, r, *out]}}}}.
    """
    blocks: Params = {}
    for i, name in enumerate(sorted(lora.targets)):
        part, inputs = TARGETS[name]
        layers, *shape = base.params["blocks"][part][name]["kernel"].shape
        bound = math.prod(shape[:inputs]) ** -0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, i), (layers, *shape[:inputs], lora.rank),
            minval=-bound, maxval=bound,
        )  # fmt: skip
        b = jnp.zeros((layers, lora.rank, *shape[inputs:]))
        blocks.setdefault(part, {})[name] = {"a": a, "b": b}
    head = {k: v for k, v in base.params.items() if k == "value_head"}
    return {"blocks": blocks, **head}


def attach(base: LM, adapters: Params, lora: Lora) -> LM:
    """The adapted model: the base's tree, with A and s·B beside each target's kernel."""
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * lora.scale if path[-1].key == "b" else x, adapters
    )
    return LM(base.config, _update(base.params, scaled))


def merge(base: LM, adapters: Params, lora: Lora) -> LM:
    """The adapters merged into the weights: W + s A B, in W's dtype."""

    def fold(node):
        if not isinstance(node, dict):
            return node
        if "a" not in node:
            return {k: fold(v) for k, v in node.items()}
        rest = {k: v for k, v in node.items() if k not in ("a", "b")}
        a, b, kernel = node["a"], node["b"], node["kernel"]
        layers, rank = a.shape[0], a.shape[-1]
        product = jnp.matmul(
            a.reshape(layers, -1, rank),
            b.reshape(layers, rank, -1),
            precision="highest",
        )
        whole = kernel.astype(jnp.float32) + product.reshape(kernel.shape)
        return {**rest, "kernel": whole.astype(kernel.dtype)}

    return LM(base.config, fold(attach(base, adapters, lora).params))


def is_adapters(params: Params) -> bool:
    """Whether a tree is adapters alone: it has no embedding."""
    return "embed" not in params


def save(
    adapters: Params, lora: Lora, config: ModelConfig, path: str | pathlib.Path,
    *, base: str = "", files: Mapping[str, bytes] = MappingProxyType({}),
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes a PEFT adapter directory (adapter_config.json, adapter_model.safetensors).

    It appears complete or not at all.

    Args:
      adapters: from `init`, trained.
      lora: its settings.
      config: of the base model; decides the names of the tensors.
      path: the directory to make.
      base: the base model's name or path, for adapter_config.json.
      files: {name: content} of further files.
      overwrite: replace adapters that were written here before.

    Raises:
      FileExistsError: `path` is not empty, or holds other things.
      ValueError: adapters with a value head, which PEFT keeps elsewhere.
    """
    from safetensors.numpy import save_file

    path = pathlib.Path(path).expanduser()
    check_target(path, overwrite)
    if set(adapters) != {"blocks"}:
        raise ValueError("adapters with a value head cannot be written as PEFT's")
    tensors = {}
    for name, (key, layer, matrix) in _peft_names(adapters, config).items():
        part, target = key
        tensor = np.asarray(adapters["blocks"][part][target][matrix][layer], np.float32)
        rows = lora.rank if matrix == "b" else -1
        flat = tensor.reshape(rows, lora.rank if matrix == "a" else -1)
        tensors[name] = np.ascontiguousarray(flat.T)
    names = families.hf_names(config)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rank_stabilised, "bias": "none",
        "lora_dropout": 0.0, "fan_in_fan_out": False, "inference_mode": True,
        "base_model_name_or_path": base,
        "target_modules": sorted(_module(names, t) for t in lora.targets),
    }  # fmt: skip
    with at_once(path) as new:
        weights = new / "adapter_model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors lets only the owner read
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (new / "adapter_config.json").write_text(text, encoding="utf-8")
        for name, content in files.items():
            (new / name).write_bytes(content)


def load(path: str | pathlib.Path, base: LM) -> tuple[Params, Lora]:
    """Reads a PEFT adapter directory for a base model.

    Raises:
      FileNotFoundError: one of its two files does not exist.
      ValueError: a setting that this file does not compute (DoRA, a rank per module,
        biases, ...), an unknown module, a tensor that is missing, unused or of another
        shape: it is named.
    """
    path = pathlib.Path(path).expanduser()
    settings = peft_settings(path)
    readers = safetensors(path / "adapter_model.safetensors")
    tensors = {name: read() for name, read in readers.items()}
    names = families.hf_names(base.config)
    modules = {_module(names, t): t for t in TARGETS}
    wanted = settings["target_modules"]
    if isinstance(wanted, str):  # a pattern: the tensors show what it matched
        wanted = {name.split(".")[-3] for name in tensors}
    wanted = {name.split(".")[-1] for name in wanted}
    if unknown := sorted(wanted - set(modules)):
        raise ValueError(f"{path}: unknown modules {unknown}; known: {sorted(modules)}")
    lora = Lora(
        settings["r"], float(settings["lora_alpha"]),
        tuple(sorted(modules[m] for m in wanted)), bool(settings.get("use_rslora")),
    )  # fmt: skip
    adapters = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32),
        jax.eval_shape(lambda: init(base, lora, jax.random.key(0))),
    )
    adapters = {"blocks": adapters["blocks"]}
    expected = _peft_names(adapters, base.config)
    if tensors.keys() != expected.keys():
        missing = sorted(expected.keys() - tensors.keys())
        unused = sorted(tensors.keys() - expected.keys())
        raise ValueError(f"{path}: missing {missing[:3]}, unused {unused[:3]}")
    for name, ((part, target), layer, matrix) in expected.items():
        place = adapters["blocks"][part][target][matrix][layer]
        rows = (-1, lora.rank) if matrix == "a" else (lora.rank, -1)
        want = place.reshape(rows).T.shape  # as torch stores a linear map
        if tensors[name].shape != want:
            raise ValueError(
                f"{path}: {name} has shape {tensors[name].shape}, expected {want} for "
                f"rank {lora.rank} on this base"
            )
        place[...] = tensors[name].astype(np.float32).T.reshape(place.shape)
    return jax.tree.map(jnp.asarray, adapters), lora


def peft_settings(path: str | pathlib.Path) -> dict[str, Any]:
    """The contents of an adapter_config.json, if `load` supports all of them.

    Raises:
      ValueError: a setting that asks for anything else, or one that is missing.
    """
    path = pathlib.Path(path).expanduser()
    settings = json_object.read(path / "adapter_config.json")
    for key, value in settings.items():
        plain = value in PEFT_VALUES[key] if key in PEFT_VALUES else not value
        if key not in PEFT_FREE and not plain:
            raise ValueError(f"{path}: {key}={value!r} is not supported")
    for key in ("r", "lora_alpha", "target_modules"):
        if not settings.get(key):
            raise ValueError(f"{path}: adapter_config.json lacks {key!r}")
    where = f"{path / 'adapter_config.json'}: "
    sizes.number(f"{where}r", settings["r"], 1, 2**17, whole=True)
    sizes.number(f"{where}lora_alpha", settings["lora_alpha"], 1e-6, 1e9)
    wanted = settings["target_modules"]
    listed = isinstance(wanted, list) and all(isinstance(x, str) for x in wanted)
    if not listed and not isinstance(wanted, str):
        raise ValueError(
            f"{where}target_modules is {sizes.brief(wanted)}, expected names"
        )
    return settings


def is_peft(path: str | pathlib.Path) -> bool:
    """Whether a path is a directory of PEFT adapters."""
    return (pathlib.Path(path).expanduser() / "adapter_config.json").is_file()


def peft_base(path: str | pathlib.Path) -> str:
    """Path of the base that PEFT adapters name: as it stands, or relative to their folder.

    Raises:
      FileNotFoundError: nothing is there; the message has the name.
    """
    path = pathlib.Path(path).expanduser()
    name = peft_settings(path).get("base_model_name_or_path") or ""
    for place in (pathlib.Path(name), path.parent / name, path / name):
        if name and place.expanduser().exists():
            return str(place)
    raise FileNotFoundError(
        f"{path} names the base {name!r}, which is neither a path nor beside it: save the "
        "base somewhere and put its path into adapter_config.json"
    )


def _module(names: dict[str, str], target: str) -> str:
    """Hugging Face's name of a projection: 'q' -> 'q_proj'."""
    return names[f"blocks/{TARGETS[target][0]}/{target}/kernel"].split(".")[-2]


def _peft_names(adapters: Params, config: ModelConfig):
    """{name in a PEFT file: ((part, target), layer, 'a' | 'b')}."""
    names, out = families.hf_names(config), {}
    for part, targets in adapters["blocks"].items():
        for target in targets:
            weight = names[f"blocks/{part}/{target}/kernel"]
            for layer in range(config.num_layers):
                stem = "base_model.model." + weight.format(layer).removesuffix(
                    ".weight"
                )
                for matrix in ("a", "b"):
                    name = f"{stem}.lora_{matrix.upper()}.weight"
                    out[name] = ((part, target), layer, matrix)
    return out


def _update(tree: Params, other: Params) -> Params:
    """A nested dict with the leaves of another put into it; neither is changed."""
    out = dict(tree)
    for key, value in other.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _update(out[key], value) if nested else value
    return out
