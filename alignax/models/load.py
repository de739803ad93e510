"""Loads a model from a Hugging Face directory or a llama.cpp .gguf file.

Both formats are read into the same three things: a config with Hugging Face's keys, a table
of tensor names, and one `Tensor` per name that reads rows of it, as [out, in]. A tensor that is
missing, unused or of the wrong shape is named in the error.
"""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from alignax.batch import LM
from alignax.models import families, gguf, json_object, sharding
from alignax.models.sizes import brief
from alignax.models.stored import Tensor, aligned, check_dtype, expanded, safetensors
from alignax.models.transformer import ModelConfig, tree_shapes

DTYPES = ("float32", "bfloat16")


def load(
    path: str | pathlib.Path, *, dtype: str = "float32", mesh: Mesh | None = None
) -> LM:
    """Reads a model, a few megabytes of its files at a time.

    Args:
      path: a directory with config.json and safetensors (one file, or shards with their
        index), or a .gguf file (dequantised).
      dtype: 'float32' or 'bfloat16', of the parameters and of the computation.
      mesh: from `sharding.make_mesh`. Every host then reads only what its devices hold.

    Returns:
      The config and arrays, every layer stacked on a leading axis L: on the devices of
      `mesh` by the rule table; or without one uncommitted, in host memory.

    Raises:
      FileNotFoundError: the path, or a file it needs, does not exist.
      ValueError: an unknown architecture or feature; a damaged file; tensors that are
        missing, unused or of another shape.
      ImportError: a .gguf file without the `gguf` package.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    path = expanded(path)
    if path.is_dir():
        hf, readers = _read_directory(path)
        config = _config(hf, path)
        table = families.hf_names(config)
    elif path.is_file() and path.suffix == ".gguf":
        hf, readers = gguf.read(path)
        config = _config(hf, path)
        table = gguf.NAMES
    elif path.exists():
        raise ValueError(f"{path} is neither a directory nor a .gguf file")
    else:
        raise FileNotFoundError(f"no model at {path}")
    if config.value_head and not config.tied and table["head"] not in readers:
        # a reward model is saved without its language-model head
        config = dataclasses.replace(config, tied=True)
    if config.tied and table["head"] in readers:
        _drop_tied_head(readers, table, path)
    return LM(
        dataclasses.replace(config, dtype=dtype),
        _assemble(config, readers, table, dtype, path, mesh),
    )


def _config(hf: dict[str, Any], path: pathlib.Path) -> ModelConfig:
    try:
        return families.from_hf(hf)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _assemble(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    table: dict[str, str],
    dtype: str,
    path: pathlib.Path,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """Fills our tree; the shapes of all tensors are checked before any is read."""
    shapes = tree_shapes(config)
    names = {
        p: [table[p].format(i) for i in range(config.num_layers)]
        if p.startswith("blocks/")
        else [table[p]]
        for p in shapes
    }
    wanted = {name for listed in names.values() for name in listed}
    missing, unused = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or unused:
        parts = [
            f"{what} {_some(x)}"
            for what, x in (("lacks", missing), ("also has", unused))
            if x
        ]
        raise ValueError(
            f"{path} does not hold the tensors of a {config.family} model with "
            f"{config.num_layers} layers (tied={config.tied}): it {'; it '.join(parts)}"
        )
    for p, shape in shapes.items():
        want = families.stored_shape(p, shape[p.startswith("blocks/") :])
        for name in names[p]:
            if tensors[name].shape != want:
                raise ValueError(
                    f"tensor {name} in {path} has shape {tensors[name].shape}, "
                    f"expected {want}"
                )
    params: dict[str, Any] = {}
    for p, shape in shapes.items():
        *parents, leaf = p.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        stored = [tensors[name] for name in names[p]]
        node[leaf] = _placed(p, shape, stored, jnp.dtype(dtype), mesh)
    return params


def _placed(
    p: str, shape: tuple[int, ...], stored: list[Tensor], dtype: np.dtype,
    mesh: Mesh | None,
) -> jax.Array:  # fmt: skip
    """One parameter: whole on the host, or every shard of this host on its device."""
    if mesh is None:
        return _on_host(_parts(p, shape, stored, dtype, [()])[()])
    place = NamedSharding(mesh, sharding.spec(p, shape, mesh))
    indices = [
        _bounds(index, shape)
        for index in place.addressable_devices_indices_map(shape).values()
    ]
    parts = _parts(p, shape, stored, dtype, indices)

    def read(index: Any) -> np.ndarray:
        return parts[_bounds(index, shape)]

    return jax.make_array_from_callback(shape, place, read, dtype=dtype)


Bounds = tuple[tuple[int, int], ...]  # (first, last + 1) along every axis; () is all


def _bounds(index: Any, shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _parts(
    p: str, shape: tuple[int, ...], stored: list[Tensor], dtype: np.dtype,
    wanted: Iterable[Bounds],
) -> dict[Bounds, np.ndarray]:  # fmt: skip
    """Parts of one parameter, from its tensor or from those of its layers, read once."""
    out = {}
    for bounds in {*wanted}:
        sizes = tuple(b - a for a, b in bounds) if bounds else shape
        out[bounds] = aligned(sizes, dtype)
    layers = p.startswith("blocks/")
    for i, tensor in enumerate(stored):
        parts = []
        for bounds, array in out.items():
            whole = bounds or tuple((0, n) for n in shape)
            if not layers:
                parts.append((whole, array))
            elif whole[0][0] <= i < whole[0][1]:
                parts.append((whole[1:], array[i - whole[0][0]]))
        _fill(parts, tensor, p, shape[layers:])
    return out


def _fill(
    parts: Sequence[tuple[Bounds, np.ndarray]], tensor: Tensor, p: str,
    shape: tuple[int, ...],
) -> None:  # fmt: skip
    """Reads a stored tensor into parts of our array, a few rows at a time.

    A linear map is stored transposed: what its rows are in the file are our last axes.

    Args:
      parts: what is to be filled, and where it lies in the array.
      tensor: as stored.
      p: path in our tree.
      shape: ours, of one layer.
    """
    linear = families.is_linear(p)
    split = families.input_axes(p) if linear else 1 if p == "embed" else len(shape)

    def as_stored(x: tuple) -> tuple[tuple, tuple]:
        """Axes that are rows in the file, and the others."""
        return (x[split:], x[:split]) if linear else (x[:split], x[split:])

    rows, others = as_stored(shape)
    views = []
    for bounds, array in parts:
        of_rows, of_others = as_stored(bounds)
        if linear:
            array = array.transpose(*range(split, array.ndim), *range(split))
        if not rows:  # a scalar head is one row
            of_rows, array = ((0, 1),), array[None]
        rest = tuple(slice(*x) for x in (*of_rows[1:], *of_others))
        views.append((of_rows[0], rest, array))
    if not views:
        return
    unit = math.prod(rows[1:])
    first = min(start for (start, _), _, _ in views)
    last = max(stop for (_, stop), _, _ in views)
    for at, block in tensor.chunks(first * unit, last * unit, unit):
        block = block.reshape(-1, *rows[1:], *others)
        begin, end = at // unit, at // unit + len(block)
        for (start, stop), rest, array in views:
            a, b = max(begin, start), min(end, stop)
            if a < b:
                array[a - start : b - start] = block[
                    (slice(a - begin, b - begin), *rest)
                ]


def _on_host(value: np.ndarray) -> jax.Array:
    """A jax array on the host; on the default device if there is no CPU backend."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return jnp.asarray(value)
    with jax.default_device(cpu):
        return jax.device_put(value)  # which takes an aligned array over


def _drop_tied_head(
    readers: dict[str, Tensor], table: dict[str, str], path: pathlib.Path
) -> None:
    """Drops the head that a tied model also stores; an error if it is not the embedding."""
    head, embed = table["head"], table["embed"]
    if embed in readers and not _equal(readers[head], readers[embed]):
        raise ValueError(
            f"{path} has tie_word_embeddings, but its {head} differs from its {embed}; "
            "set tie_word_embeddings to false to use both"
        )
    del readers[head]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    if one.shape != other.shape:
        return False
    many = one.shape[0] if one.shape else 1
    return all(np.array_equal(x, other.rows(at, at + len(x))) for at, x in one.chunks(0, many))  # fmt: skip


def _read_directory(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, and one function per tensor, of a Hugging Face directory."""
    hf = json_object.read(path / "config.json")
    generation = path / "generation_config.json"
    if generation.exists():  # chat models list more end-of-turn ids there
        ids = [
            _ids(hf.get("eos_token_id")),
            _ids(json_object.read(generation).get("eos_token_id")),
        ]
        both = ids[0] + ids[1]
        hf["eos_token_id"] = [x for i, x in enumerate(both) if x not in both[:i]]
    index = path / "model.safetensors.index.json"
    if index.exists():
        where = _weight_map(index)
    elif (path / "model.safetensors").exists():
        where = None
    else:
        found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{path} holds neither model.safetensors nor model.safetensors.index.json "
            f"(found: {found})"
        )
    readers: dict[str, Tensor] = {}
    for file in sorted(set(where.values())) if where else ["model.safetensors"]:
        for name, reader in safetensors(path / file).items():
            if where and where.get(name) != file:
                raise ValueError(f"tensor {name} of {path / file} is not in its index")
            readers[name] = reader
    absent = sorted(set(where or ()) - set(readers))
    if absent:
        raise ValueError(
            f"the index of {path} promises {_some(absent)}, but no shard has it"
        )
    if hf.get("model_type") == "gemma3":
        readers = _text_only(readers, path)
    buffers = [n for n in readers if n.endswith("rotary_emb.inv_freq")]  # old Llamas
    readers = {n: r for n, r in readers.items() if n not in buffers}
    for name, tensor in readers.items():  # what is never read may have any dtype
        check_dtype(name, tensor.dtype, path)
    return hf, readers


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """{tensor: its file} of an index; a file is a name in the index's own folder."""
    where = json_object.read(index).get("weight_map")
    if not where or not isinstance(where, dict):
        raise ValueError(f"{index} has no weight_map")
    for name, file in where.items():
        own = isinstance(file, str) and pathlib.PurePath(file).name == file
        if not own or file in ("", ".."):
            raise ValueError(
                f"{index}: {name} is in {brief(file)}, expected the name of a file beside it"
            )
    return where


def _text_only(readers: dict[str, Tensor], path: pathlib.Path) -> dict[str, Tensor]:
    """The language model of a multimodal Gemma 3; logs how many tensors are left out."""
    text, other = {}, 0
    for name, reader in readers.items():
        if "vision_tower." in name or "multi_modal_projector." in name:
            other += 1
            continue
        for prefix, ours in (
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ):
            if name.startswith(prefix):
                name = ours + name.removeprefix(prefix)
                break
        text[name] = reader
    if other:
        logging.warning(
            "%s: %d tensors of its vision tower are not loaded", path, other
        )
    return text


def _ids(value: Any) -> list[Any]:
    """The ids of an eos_token_id, one or several; `families` checks them."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
