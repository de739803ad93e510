"""PEFT's adapter directories (adapter_config.json, adapter_model.safetensors) of LoRA.

A directory is read for a base model into the tree and the settings of `models.lora`, and
written from them. What is read: a rank and an alpha for each module, some layers only, DoRA,
LoRA of the embedding and the head, modules that are saved in full, biases, and rows of the
embedding (trainable_token_indices). What else changes a model is refused by its name.
`lora_dropout` is read and not used: it does nothing to trained adapters, and alignax trains
without dropout, so that the first step's policy is the reference.

Names of modules are those of transformers, without PEFT's prefix 'base_model.model.', e.g.
'model.layers.0.self_attn.q_proj'. Which modules have adapters follows PEFT's own rules
(`peft.tuners.tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key`).

Source: https://github.com/huggingface/peft, of version 0.21.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.batch import LM, Params
from alignax.models import families, int8, json_object, lora, sizes
from alignax.models.lora import TABLES, TARGETS, Lora
from alignax.models.save import at_once, check_target
from alignax.models.stored import expanded, safetensors
from alignax.models.transformer import ModelConfig, tree_shapes

PREFIX = "base_model.model."
# FREE: settings that are read here, or that do not change what trained adapters compute.
# VALUES: settings of which some values are supported. Any other setting must be off.
FREE = (
    "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "exclude_modules",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "inference_mode", "lora_dropout", "megatron_config", "megatron_core",
    "qalora_group_size", "runtime_config", "eva_config",
)  # fmt: skip
VALUES = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", "SEQ_CLS"),
    "bias": lora.BIASES,
    # other values (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}
# a setting -> what it is, where it is not off
KINDS = {
    "rank_pattern": "ranks by module", "alpha_pattern": "numbers by module",
    "target_modules": "names", "modules_to_save": "names", "exclude_modules": "names",
    "layers_pattern": "names", "layers_to_transform": "whole numbers",
}  # fmt: skip
LINEAR = (".lora_A.weight", ".lora_B.weight")  # ends of the names of A and B
EMBEDDED = (".lora_embedding_A", ".lora_embedding_B")
MATRICES = {  # end of a tensor's name -> leaf of a node
    **dict.fromkeys((LINEAR[0], EMBEDDED[0]), "a"),
    **dict.fromkeys((LINEAR[1], EMBEDDED[1]), "b"),
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
ROWS = ".token_adapter.trainable_tokens_delta"
BASE_WEIGHT, BASE_BIAS = ".base_layer.weight", ".base_layer.bias"
LONGEST = 400  # characters of a pattern
Pair = tuple[str, np.ndarray]


class Place(NamedTuple):
    """Where a tensor of transformers has its place in our tree."""

    path: str  # 'blocks/attn/q/kernel'
    layer: int  # 0 outside of the layers


class Tensors(NamedTuple):
    """The tensors of a file by what they are: {module or tensor: (name there, value)}."""

    low: dict[str, dict[str, Pair]]  # module -> {'a' | 'b' | 'magnitude': ...}
    full: dict[str, Pair]  # 'lm_head.weight' -> what replaces it
    bases: dict[str, Pair]  # module -> its weight below the adapters
    rows: dict[str, Pair]  # module -> rows of its table


# -- the settings


def settings(path: str | pathlib.Path) -> dict[str, Any]:
    """The contents of an adapter_config.json, if `load` supports all of them.

    Raises:
      ValueError: a setting that asks for anything else, one that is missing, or a value of
        another type.
    """
    path = expanded(path)
    found = json_object.read(path / "adapter_config.json")
    for key, value in found.items():
        plain = value in VALUES[key] if key in VALUES else not value
        if key not in FREE and not plain:
            raise ValueError(f"{path}: {key}={sizes.brief(value)} is not supported")
    for key in ("r", "lora_alpha", "target_modules"):
        if not found.get(key):
            raise ValueError(f"{path}: adapter_config.json lacks {key!r}")
    where = f"{path / 'adapter_config.json'}: "
    sizes.number(f"{where}r", found["r"], 1, 2**17, whole=True)
    sizes.number(f"{where}lora_alpha", found["lora_alpha"], 1e-6, 1e9)
    for key, kind in KINDS.items():
        value = found.get(key)
        if value and not _is(value, kind):
            raise ValueError(f"{where}{key} is {sizes.brief(value)}, expected {kind}")
    for pattern in _patterns(found):
        _compiled(pattern, where)
    if isinstance(found["target_modules"], str) and found.get("layers_to_transform"):
        raise ValueError(f"{where}layers_to_transform needs a list of target_modules")
    _token_indices(found, where)
    return found


def holds(path: str | pathlib.Path) -> bool:
    """Whether a path is a directory of PEFT adapters."""
    return (expanded(path) / "adapter_config.json").is_file()


def base_path(path: str | pathlib.Path) -> str:
    """Path of the base that PEFT adapters name: as it stands, or relative to their folder.

    Raises:
      FileNotFoundError: nothing is there; the message has the name.
    """
    path = expanded(path)
    name = settings(path).get("base_model_name_or_path") or ""
    for place in (pathlib.Path(name), path.parent / name, path / name):
        if name and expanded(place).exists():
            return str(place)
    raise FileNotFoundError(
        f"{path} names the base {name!r}, which is neither a path nor beside it: save the "
        "base somewhere and put its path into adapter_config.json"
    )


def _is(value: Any, kind: str) -> bool:
    """Whether a setting has the type that it should."""
    if kind == "whole numbers":
        many = value if isinstance(value, list) else [value]
        return all(type(x) is int and 0 <= x < 2**31 for x in many)
    if kind == "names":
        many = value if isinstance(value, list) else [value]
        return all(isinstance(x, str) for x in many)
    if not isinstance(value, dict):
        return False
    kinds, low, high = ((int,), 1, 2**17) if "ranks" in kind else ((int, float), 0, 1e9)
    return all(type(x) in kinds and low <= x <= high for x in value.values())


def _patterns(found: Mapping[str, Any]) -> Iterator[str]:
    """The regular expressions in the settings."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(found.get(key), str):
            yield found[key]
    for key in ("rank_pattern", "alpha_pattern"):
        yield from found.get(key) or {}
    yield from _listed(found.get("layers_pattern"))


def _compiled(pattern: str, where: str = "") -> re.Pattern[str]:
    """A regular expression of the settings.

    Raises:
      ValueError: it is none, it is very long, or it repeats a repetition, which can take
        longer than any run.
    """
    try:
        if len(pattern) > LONGEST or re.search(r"[*+}]\)[*+{]", pattern):
            raise re.error("too long, or a repetition of a repetition")
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}pattern {sizes.brief(pattern)}: {error}") from error


def _listed(value: Any) -> list[Any]:
    """One or several values as a list; none as an empty one."""
    return (
        []
        if not value and value != 0
        else value
        if isinstance(value, list)
        else [value]
    )


def _token_indices(found: Mapping[str, Any], where: str = "") -> dict[str, list[int]]:
    """{'embed' or 'head': the rows that trainable_token_indices names}."""
    value = found.get("trainable_token_indices")
    if not value:
        return {}
    known = {"embed_tokens": "embed", "lm_head": "head"}
    named = value if isinstance(value, dict) else {"embed_tokens": value}
    out = {}
    for name, ids in named.items():
        table = known.get(name.split(".")[-1])
        fits = isinstance(ids, list) and ids and _is(ids, "whole numbers")
        if table is None or not fits or len(set(ids)) < len(ids):
            raise ValueError(
                f"{where}trainable_token_indices is {sizes.brief(value)}, expected ids, or "
                "ids by embed_tokens and lm_head"
            )
        out[table] = ids
    return out


# -- which modules have adapters


def modules(config: ModelConfig) -> dict[str, Place]:
    """{module: place of its matrix} of all modules that can have low-rank adapters."""
    names = families.hf_names(config)
    out = {}
    for target, (part, _) in TARGETS.items():
        path = f"blocks/{part}/{target}/kernel"
        for layer in range(config.num_layers):
            name = names[path].format(layer)
            out[name.removesuffix(".weight")] = Place(path, layer)
    for table in TABLES:
        out[names[table].removesuffix(".weight")] = Place(table, 0)
    return out


def is_target(found: Mapping[str, Any], module: str) -> bool:
    """Whether the settings give adapters to a module, by PEFT's rules."""
    excluded, wanted = found.get("exclude_modules"), found["target_modules"]
    if isinstance(excluded, str):
        if _compiled(excluded).fullmatch(module):
            return False
    elif _ends(module, excluded or ()):
        return False
    saved = _listed(found.get("modules_to_save"))
    if any(f".{m}." in f".{module}." for m in saved):
        return False
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            return ".layers." in f".{module}"
        return bool(_compiled(wanted).fullmatch(module))
    if module in wanted:
        return True
    numbers = found.get("layers_to_transform")
    if not _ends(module, wanted) or numbers is None or numbers == []:
        return _ends(module, wanted)
    patterns = _listed(found.get("layers_pattern"))
    tried = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    layer = next((m for p in tried if (m := re.match(p, module))), None)
    return layer is not None and int(layer.group(1)) in _listed(numbers)


def _ends(module: str, names: Sequence[str]) -> bool:
    """Whether a module has one of these names, or ends with one after a dot."""
    return module in names or any(module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# -- reading


def load(path: str | pathlib.Path, base: LM) -> tuple[Params, Lora]:
    """Reads a PEFT adapter directory for a base model.

    `lora.merge` of the result is the model that PEFT computes: with a value head where the
    file brings one ('score'), and with a head of its own where a tied base does not stay
    tied.

    Args:
      path: the directory.
      base: the model that the adapters are for. Its arrays are read only where the file
        replaces a part of them.

    Returns:
      Adapters in the tree of `lora.init`, float32, and their settings.

    Raises:
      FileNotFoundError: one of its two files does not exist.
      ValueError: a setting that is not supported; a tensor that is missing, unused or of
        another shape: it is named.
    """
    path = expanded(path)
    found = settings(path)
    tensors = _sorted(path / "adapter_model.safetensors")
    config = _config(found, tensors, base.config, path)
    file = File(path, found, tensors, config, base, tree_shapes(config))
    wanted = _wanted(file)
    _check_names(file, wanted)
    made = _lora(file, wanted)
    out: Params = {"blocks": {}}
    for target in made.targets:
        if target in TARGETS:
            part = out["blocks"].setdefault(TARGETS[target][0], {})
            part[target] = _node(target, made, file)
    _add_full(out, made, file)
    out |= _tables(made, file)
    targets = tuple(name for name, _ in lora.targets_of(out))
    made = dataclasses.replace(
        made, targets=targets,
        ranks={k: v for k, v in made.ranks.items() if k.split("/")[0] in targets},
        alphas={k: v for k, v in made.alphas.items() if k.split("/")[0] in targets},
        saved=tuple(t for t in TABLES if t in out and t not in targets),
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, out), made


class File(NamedTuple):
    """What is read: the settings and tensors of a directory, and what they are for."""

    path: pathlib.Path
    found: Mapping[str, Any]  # adapter_config.json
    tensors: Tensors
    config: ModelConfig  # of the adapted model, but for `tied`, which is the base's
    base: LM
    shapes: Mapping[str, tuple[int, ...]]  # of the config's parameters

    @property
    def classifier(self) -> bool:
        """Whether PEFT's model is a sequence classifier, which has no head of tokens."""
        return self.found.get("task_type") == "SEQ_CLS"

    @property
    def tied(self) -> bool:
        """Whether PEFT's model starts with a head that is its embedding."""
        return self.config.tied and not self.classifier

    def in_full(self, table: str) -> Pair | None:
        """What modules_to_save has of a table; with ensure_weight_tying, of its twin."""
        both = self.tied and bool(self.found.get("ensure_weight_tying"))
        stems = [_stem(self.config, t) for t in TABLES if both or t == table]
        if not any(map(self.saves, stems)):
            return None
        return self.tensors.full.get(f"{_stem(self.config, table)}.weight")

    def saves(self, module: str) -> bool:
        """Whether modules_to_save has a module, by PEFT's rule."""
        return any(map(module.endswith, _listed(self.found.get("modules_to_save"))))


def _sorted(path: pathlib.Path) -> Tensors:
    """The tensors of a file, by what they are."""
    out = Tensors({}, {}, {}, {})
    for stored, read in safetensors(path).items():
        value, name = read(), stored.removeprefix(PREFIX)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"tensor {stored} in {path} has dtype {value.dtype}, expected a float"
            )
        end = next((e for e in MATRICES if name.endswith(e)), None)
        if end:
            module = out.low.setdefault(name.removesuffix(end), {})
            module[MATRICES[end]] = name, value
        elif name.endswith(ROWS):
            out.rows[name.removesuffix(ROWS)] = name, value
        elif name.endswith(BASE_WEIGHT):
            out.bases[name.removesuffix(BASE_WEIGHT)] = name, value
        else:
            out.full[name.replace(BASE_BIAS, ".bias")] = name, value
    return out


def _config(
    found: Mapping[str, Any], tensors: Tensors, base: ModelConfig, path: pathlib.Path
) -> ModelConfig:
    """The base's config with the value head and the vocabulary of the file."""
    classifier = found.get("task_type") == "SEQ_CLS"
    has_score = "score.weight" in tensors.full
    if classifier and not has_score and not base.value_head:
        raise ValueError(f"{path}: task_type is SEQ_CLS, but there is no score.weight")
    embed, head = _stem(base, "embed"), _stem(base, "head")
    table = tensors.bases.get(embed) or tensors.full.get(f"{embed}.weight")
    size = len(table[1]) if table and table[1].ndim == 2 else base.vocab_size
    own_head = head in tensors.bases or f"{head}.weight" in tensors.full
    if size != base.vocab_size and not (base.tied or classifier or own_head):
        raise ValueError(
            f"{path}: its embedding has {size} rows and that of the base "
            f"{base.vocab_size}, but there is no {head}.weight of that size"
        )
    value_head = base.value_head or has_score
    return dataclasses.replace(base, vocab_size=size, value_head=value_head)


def _stem(config: ModelConfig, table: str) -> str:
    """The module of a table: 'model.embed_tokens' or 'lm_head'."""
    return families.hf_names(config)[table].removesuffix(".weight")


def _wanted(file: File) -> dict[str, tuple[Place, int, float]]:
    """{module: (its place, rank, alpha)} of the modules that have adapters.

    Raises:
      ValueError: there are none.
    """
    found, low, out = file.found, file.tensors.low, {}
    every = modules(file.config)
    head = _stem(file.config, "head")
    if file.classifier:
        del every[head]
    for module, place in every.items():
        target = is_target(found, module)
        if found["target_modules"] == "all-linear":  # the file shows what it matched
            target = target and module in low
        if module == head and found.get("ensure_weight_tying"):
            target = module in low  # it follows the embedding
        if target:
            rank = _by_pattern(found.get("rank_pattern"), module, found["r"])
            alpha = _by_pattern(found.get("alpha_pattern"), module, found["lora_alpha"])
            out[module] = place, rank, float(alpha)
    if not out:
        named = sizes.brief(found["target_modules"])
        raise ValueError(f"{file.path}: target_modules={named} matches no module")
    return out


def _check_names(file: File, wanted: Mapping[str, Any]) -> None:
    """Raises ValueError for tensors that the settings do not mean, or that are not there."""
    found, tensors, config = file.found, file.tensors, file.config
    tables = {table: _stem(config, table) for table in TABLES}
    expected = set()
    for module in wanted:
        low = EMBEDDED if module == tables["embed"] else LINEAR
        expected |= {module + end for end in low}
        if found.get("use_dora"):
            expected.add(f"{module}.lora_magnitude_vector")
    rows = _token_indices(found)
    for table in rows:
        if config.tied and len(rows) == 2 and rows["embed"] == rows["head"]:
            table = "embed"  # the head shares them
        expected.add(tables[table] + ROWS)
    allowed = {stem + e for stem in tables.values() for e in (BASE_WEIGHT, ".weight")}
    bias = found.get("bias") or "none"
    for name in _tensor_names(config):
        module, _, kind = name.rpartition(".")
        if file.saves(module):
            allowed.add(name)
            shared = module == tables["head"] and (config.tied or file.classifier)
            expected |= set() if shared else {name}
        elif kind == "bias" and (
            bias == "all" or (bias != "none" and module in wanted)
        ):
            allowed.add(module + (BASE_BIAS if module in wanted else ".bias"))
    there = {x for node in tensors.low.values() for x, _ in node.values()}
    there |= {x for part in tensors[1:] for x, _ in part.values()}
    there = {x.removesuffix(".weight") if ".lora_magnitude" in x else x for x in there}
    missing, unused = sorted(expected - there), sorted(there - expected - allowed)
    if missing or unused:
        raise ValueError(f"{file.path}: missing {missing[:3]}, unused {unused[:3]}")


def _tensor_names(config: ModelConfig) -> dict[str, Place]:
    """{name in a Hugging Face checkpoint: place} of every tensor of a model."""
    names, out = families.hf_names(config), {}
    for p in tree_shapes(dataclasses.replace(config, tied=False)):
        for layer in range(config.num_layers if p.startswith("blocks/") else 1):
            out[names[p].format(layer)] = Place(p, layer)
    return out


def _lora(file: File, wanted: Mapping[str, tuple[Place, int, float]]) -> Lora:
    """The settings in the form of `models.lora`."""
    found, count = file.found, file.config.num_layers
    per: dict[str, dict[int, tuple[int, float]]] = {}
    for place, rank, alpha in wanted.values():
        target = place.path.split("/")[-2] if "/" in place.path else place.path
        per.setdefault(target, {})[place.layer] = rank, alpha
    inner = {frozenset(own) for t, own in per.items() if t in TARGETS}
    layers = tuple(sorted(*inner)) if len(inner) == 1 else ()
    some = layers if len(layers) < count else ()
    default = found["r"], float(found["lora_alpha"])
    own: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # ranks, alphas
    for target, pairs in per.items():
        every = range(1) if target in TABLES else some or range(count)
        for k, values in enumerate(own):
            one = {i: pairs.get(i, (0, default[1]))[k] for i in every}
            named = {f"{target}/{i}": x for i, x in one.items()}
            if len({*one.values()}) == 1:
                named = {target: one[every[0]]}
            values.update({n: x for n, x in named.items() if x != default[k]})
    biases = any(name.endswith(".bias") for name in file.tensors.full)
    return Lora(
        *default, tuple(sorted(per)), bool(found.get("use_rslora")),
        bool(found.get("use_dora")), some, *own,
        bias=found.get("bias") or "none" if biases else "none",
    )  # fmt: skip


def _node(target: str, made: Lora, file: File) -> Params:
    """A, B and the magnitude of a target in all layers; zeros where there are none."""
    ranks = made.ranks_of(target, file.config.num_layers)
    most, layers = max(ranks), len(ranks)
    shape, inputs, stem = _matrix(target, file)
    ins, outs = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    names = [stem.format(i) for i in range(layers)]
    given = {i: file.tensors.low[names[i]] for i, rank in enumerate(ranks) if rank}
    for i, node in given.items():
        want = {"a": (ranks[i], ins), "b": (outs, ranks[i]), "magnitude": (outs,)}
        for leaf, (name, value) in node.items():
            if value.shape != want[leaf]:
                raise ValueError(
                    f"{file.path}: {name} has shape {value.shape}, expected {want[leaf]} "
                    f"for rank {ranks[i]} on this base"
                )
    lead = () if target in TABLES else (layers,)
    a = np.zeros((layers, ins, most), np.float32)
    b = np.zeros((layers, most, outs), np.float32)
    magnitude = np.zeros((layers, outs), np.float32)
    for i, node in given.items():
        a[i, :, : ranks[i]] = node["a"][1].astype(np.float32).T
        b[i, : ranks[i]] = node["b"][1].astype(np.float32).T
        if made.dora:
            magnitude[i] = node["magnitude"][1].astype(np.float32)
    out = {
        "a": a.reshape(*lead, *shape[:inputs], most),
        "b": b.reshape(*lead, most, *shape[inputs:]),
    }
    if made.dora:
        out["magnitude"] = magnitude.reshape(*lead, *shape[inputs:])
    return out


def _matrix(target: str, file: File) -> tuple[tuple[int, ...], int, str]:
    """(shape of a target's matrix, its number of input axes, its module, {} for a layer)."""
    if target in TABLES:
        shape = file.shapes["embed"]
        return shape[:: 1 if target == "embed" else -1], 1, _stem(file.config, target)
    part, inputs = TARGETS[target]
    path = f"blocks/{part}/{target}/kernel"
    stem = families.hf_names(file.config)[path].removesuffix(".weight")
    return file.shapes[path][1:], inputs, stem


def _ours(file: File, stored: str, value: np.ndarray, p: str, shape) -> np.ndarray:
    """A stored tensor in the shape of our parameter of one layer, float32."""
    want = families.stored_shape(p, shape)
    if value.shape != want:
        raise ValueError(
            f"{file.path}: {stored} has shape {value.shape}, expected {want}"
        )
    value = value.astype(np.float32)
    return (value.T if families.is_linear(p) else value).reshape(shape)


def _add_full(out: Params, made: Lora, file: File) -> None:
    """Puts what is saved in full into the tree, but for the tables."""
    names, count = _tensor_names(file.config), file.config.num_layers
    given: dict[str, dict[int, np.ndarray]] = {}
    for name, (stored, value) in file.tensors.full.items():
        p, layer = names[name]
        if p not in TABLES:
            shape = file.shapes[p][p.startswith("blocks/") :]
            given.setdefault(p, {})[layer] = _ours(file, stored, value, p, shape)
    for p, own in given.items():
        *parents, leaf = p.split("/")
        node, base = out, file.base.params
        for key in parents:
            node = node.setdefault(key, {})
            base = base.get(key, {})
        if not p.startswith("blocks/"):
            node[leaf] = own[0]
            continue
        ranks = made.ranks_of(parents[-1], count)
        adapted = {i for i, rank in enumerate(ranks) if rank} == {*own}
        if len(own) == count or (
            leaf == "bias" and made.bias == "lora_only" and adapted
        ):
            node[leaf] = np.zeros(file.shapes[p], np.float32)
        else:  # the other layers keep the base's
            node[leaf] = np.array(base[leaf], np.float32)
        for i, value in own.items():
            node[leaf][i] = value


def _tables(made: Lora, file: File) -> Params:
    """The embedding and the head, or their adapters, as far as they are not the base's.

    A tied base stays tied where PEFT ties what it adds (`ensure_weight_tying`, rows of the
    embedding alone, another vocabulary). Elsewhere its head gets a table of its own.
    """
    starts = _starts(file)
    own = {t: _table(t, made, file, starts.get(t)) for t in TABLES}
    own = {t: leaf for t, leaf in own.items() if leaf is not None}
    if not own or not file.tied:
        return own
    embed, head = (_stem(file.config, t) for t in TABLES)
    changed = {m for m in (embed, head) if m in file.tensors.low or file.saves(m)}
    changed |= file.tensors.rows.keys()
    if file.found.get("ensure_weight_tying") and changed:
        if made.dora and isinstance(own["embed"], dict):
            raise ValueError(
                f"{file.path}: use_dora of a tied embedding is not supported"
            )
        if "head" in own and not _transposed(own["head"], own.get("embed")):
            raise ValueError(
                f"{file.path}: ensure_weight_tying is set, and {head} is not {embed}"
            )
        return {"embed": own["embed"]}
    if not changed or (changed == {embed} and embed in file.tensors.rows):
        return {"embed": own["embed"]}
    if "head" not in own:
        own["head"] = np.array(int8.table(file.base.params, "embed"), np.float32).T
    return own


def _transposed(head: Any, embed: Any) -> bool:
    """Whether a head, or its adapters, are those of the embedding."""
    if isinstance(head, dict) and isinstance(embed, dict):
        return np.array_equal(head["a"], embed["b"].T) and np.array_equal(
            head["b"], embed["a"].T
        )
    return not isinstance(head, dict) and np.array_equal(head.T, np.asarray(embed))


def _starts(file: File) -> dict[str, np.ndarray]:
    """Tables of the base that the file has in another form: resized, or trained before."""
    out = {}
    for table in TABLES:
        stem = _stem(file.config, table)
        pair = file.tensors.bases.get(stem)
        if pair is None and file.in_full(table) is None:
            pair = file.tensors.full.get(f"{stem}.weight")
        if pair is None:
            continue
        shape = _matrix(table, file)[0]
        value = _ours(file, *pair, table, shape)
        known = file.base.params.get(table)
        tied = table == "head" and known is None
        known = int8.table(file.base.params, "embed") if known is None else known
        known = np.asarray(known.T if tied else known)
        if not np.array_equal(value.astype(known.dtype), known):
            out[table] = value
    if file.tied and out:
        one = out["embed"] if "embed" in out else out["head"].T
        out = {"embed": one, "head": one.T}
    return out


def _table(table: str, made: Lora, file: File, start: np.ndarray | None) -> Any:
    """A table of the adapted model [V, D] or [D, V], a node of adapters, or None."""
    stem = _stem(file.config, table)
    ids = _token_indices(file.found).get(table, [])
    if full := file.in_full(table):
        return _ours(file, *full, table, _matrix(table, file)[0])
    node = _node(table, made, file) if table in made.targets else None
    if node is None and stem not in file.tensors.rows:
        return start
    if start is None and node is not None and stem not in file.tensors.rows:
        return node
    old = LM(
        file.config, {**file.base.params, **({} if start is None else {table: start})}
    )
    whole = np.array(lora.table(old, table, node, made), np.float32)
    if stem in file.tensors.rows:
        name, rows = file.tensors.rows[stem]
        want = (len(ids), file.config.width)
        if rows.shape != want or max(ids) >= file.config.vocab_size:
            raise ValueError(
                f"{file.path}: {name} has shape {rows.shape}, expected {want}"
            )
        by_row = whole if table == "embed" else whole.T
        by_row[ids] = rows.astype(np.float32)
    return whole


# -- writing


def save(
    adapters: Params, made: Lora, config: ModelConfig, path: str | pathlib.Path, *,
    base: str = "", files: Mapping[str, bytes] = MappingProxyType({}),
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes a PEFT adapter directory (adapter_config.json, adapter_model.safetensors).

    It appears complete or not at all. A value head is written as PEFT writes a sequence
    classifier: task_type SEQ_CLS, and `score` of modules_to_save.

    Args:
      adapters: from `lora.init`, trained.
      made: its settings.
      config: of the base model; decides the names of the tensors.
      path: the directory to make.
      base: the base model's name or path, for adapter_config.json.
      files: {name: content} of further files.
      overwrite: replace adapters that were written here before.

    Raises:
      FileExistsError: `path` is not empty, or holds other things.
      ValueError: a value head beside a head of tokens, which a classifier does not have.
    """
    from safetensors.numpy import save_file

    path = expanded(path)
    check_target(path, overwrite)
    if "value_head" in adapters and "head" in adapters:
        raise ValueError(
            "a sequence classifier has no head of tokens: adapters of 'head' and of a value "
            "head cannot be written together"
        )
    tensors = {PREFIX + k: v for k, v in _stored(adapters, made, config)}
    text = json.dumps(
        _settings_of(adapters, made, config, base), indent=2, sort_keys=True
    )
    with at_once(path) as new:
        weights = new / "adapter_model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors lets only the owner read
        (new / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        for name, content in files.items():
            (new / name).write_bytes(content)


def _stored(
    adapters: Params, made: Lora, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of everything in a tree of adapters, as PEFT stores it."""
    names, count = families.hf_names(config), config.num_layers
    tied = config.tied and not {"value_head", "head"} & adapters.keys()

    def flat(x, *shape: int) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(x, np.float32).reshape(shape).T)

    for target, node in lora.targets_of(adapters):
        stem, ranks = _stem_of(target, config), made.ranks_of(target, count)
        ends = EMBEDDED if target == "embed" else LINEAR
        for i, rank in enumerate(ranks):
            if rank:
                one = (
                    node
                    if target in TABLES
                    else jax.tree.map(lambda x, i=i: x[i], node)
                )
                module, most = stem.format(i), one["a"].shape[-1]
                a, b = (
                    flat(one["a"], -1, most)[:rank],
                    flat(one["b"], most, -1)[:, :rank],
                )
                yield module + ends[0], a
                yield module + ends[1], np.ascontiguousarray(b)
                if "magnitude" in one:
                    yield f"{module}.lora_magnitude_vector", flat(one["magnitude"], -1)
                if target == "embed" and tied:
                    head = _stem(config, "head")
                    yield f"{head}.lora_A.weight", np.ascontiguousarray(b.T)
                    yield f"{head}.lora_B.weight", np.ascontiguousarray(a.T)
    for table in TABLES:
        if table in adapters and not isinstance(adapters[table], dict):
            value = np.asarray(adapters[table], np.float32)
            value = np.ascontiguousarray(value if table == "embed" else value.T)
            yield names[table], value
            if table == "embed" and tied:
                yield names["head"], value.copy()
    if "value_head" in adapters:
        yield names["value_head/kernel"], flat(adapters["value_head"]["kernel"], -1, 1)
    for p, value in _others(adapters):
        for i in range(count if p.startswith("blocks/") else 1):
            name = names[p].format(i)
            rank = 0
            if p.endswith("/bias"):
                target = p.split("/")[2]
                rank = target in made.targets and made.ranks_of(target, count)[i]
                if not rank and made.bias == "lora_only":
                    continue
                name = name.replace(".bias", BASE_BIAS) if rank else name
            one = value[i] if p.startswith("blocks/") else value
            yield name, flat(one, *_turned(p, np.shape(one)))


def _others(adapters: Params) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of what is saved in full, but for tables and the value head."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        path = [k.key for k in keys]
        elsewhere = path[0] in (*TABLES, "value_head")
        if not elsewhere and path[-1] not in ("a", "b", "magnitude"):
            yield "/".join(path), leaf


def _turned(p: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape, its axes reversed."""
    return families.stored_shape(p, shape)[::-1]


def _stem_of(target: str, config: ModelConfig) -> str:
    """The module of a target, {} for the layer."""
    if target in TABLES:
        return _stem(config, target)
    path = f"blocks/{TARGETS[target][0]}/{target}/kernel"
    return families.hf_names(config)[path].removesuffix(".weight")


def _settings_of(
    adapters: Params, made: Lora, config: ModelConfig, base: str
) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    count = config.num_layers
    classifier = "value_head" in adapters
    tables = [t for t in TABLES if t in adapters]
    tied = config.tied and tables == ["embed"] and not classifier
    saved = [_short(t, config) for t in tables if not isinstance(adapters[t], dict)]
    names = families.hf_names(config)
    for p, _ in _others(adapters):
        if not p.endswith("/bias"):  # by whole names: PEFT compares ends
            every = range(count) if p.startswith("blocks/") else range(1)
            saved += [names[p].format(i).rpartition(".")[0] for i in every]
    ranks = {t: made.ranks_of(t, count) for t in made.targets}
    inner = {t: tuple(map(bool, r)) for t, r in ranks.items() if t in TARGETS}
    layers = [i for i in range(count) if all(some[i] for some in inner.values())]
    alike = len({*inner.values()}) <= 1
    everywhere = alike and len(layers) == count
    wanted = []
    for target, own in ranks.items():
        stem = _stem_of(target, config)
        if target in TABLES:
            # by its whole name, which layers_to_transform does not exclude
            wanted.append(_short(target, config) if everywhere else stem)
        elif alike:
            wanted.append(_short(target, config))
        else:
            wanted += [stem.format(i) for i, rank in enumerate(own) if rank]

    def patterns(values: Mapping[str, Sequence[Any]], default: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for target, own in values.items():
            some = {i: x for i, x in enumerate(own) if ranks[target][i]}
            named = {_stem_of(target, config).format(i): x for i, x in some.items()}
            if len({*some.values()}) == 1:
                named = {_short(target, config): next(iter(some.values()))}
            if target == "embed" and tied:
                named[_short("head", config)] = next(iter(some.values()))
            out |= {k: _whole(x) for k, x in named.items() if x != default}
        return out

    return {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM",
        "r": made.rank, "lora_alpha": _whole(made.alpha),
        "rank_pattern": patterns(ranks, made.rank),
        "alpha_pattern": patterns(
            {t: made.alphas_of(t, count) for t in ranks}, made.alpha
        ),
        "use_rslora": made.rank_stabilised, "use_dora": made.dora, "bias": made.bias,
        "lora_dropout": 0.0, "fan_in_fan_out": False, "inference_mode": True,
        "base_model_name_or_path": base, "target_modules": sorted(wanted),
        "layers_to_transform": layers if alike and inner and not everywhere else None,
        "modules_to_save": [*saved, *(["classifier", "score"] if classifier else [])] or None,
        "ensure_weight_tying": tied,
    }  # fmt: skip


def _short(target: str, config: ModelConfig) -> str:
    """The last part of a target's module: 'q' -> 'q_proj', 'embed' -> 'embed_tokens'."""
    return _stem_of(target, config).split(".")[-1]


def _whole(value: float) -> float | int:
    """A number as an integer where it is one, as PEFT writes it."""
    return int(value) if value == int(value) else value
