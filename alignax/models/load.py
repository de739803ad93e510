"""Loads a model from a Hugging Face directory or a llama.cpp .gguf file.

Both formats are read into the same three things: a config with Hugging Face's keys, a table
of tensor names, and one function per tensor that reads it as [out, in]. A tensor that is
missing, unused or of the wrong shape is named in the error.
"""

import dataclasses
import logging
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax.batch import LM
from alignax.models import families, gguf, json_object
from alignax.models.gguf import Reader
from alignax.models.json_object import one_line
from alignax.models.sizes import brief
from alignax.models.transformer import ModelConfig, init

DTYPES = ("float32", "bfloat16")


def load(path: str | pathlib.Path, *, dtype: str = "float32") -> LM:
    """Reads a model.

    Args:
      path: a directory with config.json and safetensors (one file, or shards with their
        index), or a .gguf file (dequantised).
      dtype: 'float32' or 'bfloat16', of the parameters and of the computation.

    Returns:
      The config and uncommitted arrays in host memory, every layer stacked on a leading
      axis L; the caller places them on devices, or jax does at the first use.

    Raises:
      FileNotFoundError: the path, or a file it needs, does not exist.
      ValueError: an unknown architecture or feature; a damaged file; tensors that are
        missing, unused or of another shape.
      ImportError: a .gguf file without the `gguf` package.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    path = pathlib.Path(path).expanduser()
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
        _assemble(config, readers, table, dtype, path),
    )


def _config(hf: dict[str, Any], path: pathlib.Path) -> ModelConfig:
    try:
        return families.from_hf(hf)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def tree_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter that `init` would make, without making it."""
    tree = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(k.key) for k in keys): leaf.shape for keys, leaf in flat}


def _assemble(
    config: ModelConfig,
    readers: dict[str, Reader],
    table: dict[str, str],
    dtype: str,
    path: pathlib.Path,
) -> dict[str, Any]:
    """Fills our tree; every tensor is read exactly once."""
    shapes = tree_shapes(config)
    layers = {p: config.num_layers if p.startswith("blocks/") else 1 for p in shapes}
    wanted = {table[p].format(i) for p in shapes for i in range(layers[p])}
    missing, unused = sorted(wanted - set(readers)), sorted(set(readers) - wanted)
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
    params: dict[str, Any] = {}
    for p, shape in shapes.items():
        stacked = None
        for i in range(layers[p]):
            name, own = table[p].format(i), shape[p.startswith("blocks/") :]
            value = _to_tree(readers[name](), p, own, name, path)
            if stacked is None:  # not before a tensor has its share of this size
                out = np.empty(shape, jnp.dtype(dtype))
                stacked = out if p.startswith("blocks/") else out[None]
            stacked[i] = value
        *parents, leaf = p.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = _on_host(out)
    return params


def _on_host(value: np.ndarray) -> jax.Array:
    """A jax array on the host; on the default device if there is no CPU backend."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return jnp.asarray(value)
    with jax.default_device(cpu):
        return jnp.asarray(value)


def _to_tree(
    value: np.ndarray, p: str, shape: tuple[int, ...], name: str, path: pathlib.Path
) -> np.ndarray:
    """One stored tensor in the shape of our tree."""
    want = families.stored_shape(p, shape)
    if value.shape != want:
        raise ValueError(
            f"tensor {name} in {path} has shape {value.shape}, expected {want}"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"tensor {name} in {path} has dtype {value.dtype}, expected a float"
        )
    return (value.T if families.is_linear(p) else value).reshape(shape)


def _drop_tied_head(
    readers: dict[str, Reader], table: dict[str, str], path: pathlib.Path
) -> None:
    """Drops the head that a tied model also stores; an error if it is not the embedding."""
    head, embed = table["head"], table["embed"]
    if embed in readers and not np.array_equal(readers[head](), readers[embed]()):
        raise ValueError(
            f"{path} has tie_word_embeddings, but its {head} differs from its {embed}; "
            "set tie_word_embeddings to false to use both"
        )
    del readers[head]


def _read_directory(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Reader]]:
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
    readers: dict[str, Reader] = {}
    for file in sorted(set(where.values())) if where else ["model.safetensors"]:
        for name, reader in tensors_of(path / file).items():
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
    return hf, {n: r for n, r in readers.items() if n not in buffers}


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


def tensors_of(path: pathlib.Path) -> dict[str, Reader]:
    """A function per tensor of a safetensors file that reads it.

    Raises:
      FileNotFoundError: no such file. ValueError: it is damaged, or (when a tensor is read)
        holds a type that numpy has not.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError, UnicodeError) as e:
        raise ValueError(f"{path} is damaged or not safetensors: {one_line(e)}") from e

    def read(name: str) -> np.ndarray:
        try:
            return file.get_tensor(name)
        except (SafetensorError, TypeError, ValueError, AttributeError, KeyError) as e:
            raise ValueError(
                f"tensor {name} in {path} cannot be read: {one_line(e)}"
            ) from e

    return {name: partial(read, name) for name in file.keys()}  # noqa: SIM118


def _text_only(readers: dict[str, Reader], path: pathlib.Path) -> dict[str, Reader]:
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
