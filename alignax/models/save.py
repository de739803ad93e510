"""Saves a model as a Hugging Face directory (config.json, safetensors) for transformers."""

import contextlib
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from alignax.batch import LM
from alignax.models import families, int8
from alignax.models.stored import expanded
from alignax.models.transformer import tree_shapes

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def save(
    lm: LM,
    path: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | None = None,
    files: Mapping[str, bytes] = MappingProxyType({}),
    overwrite: bool = False,
    max_shard_bytes: int = 4 * 10**9,
) -> None:
    """Writes the model; the directory appears complete or not at all.

    A value head is written as the `score` of transformers' sequence classifiers (which
    need the tokenizer's pad_token_id for batches of more than one row).

    Args:
      lm: parameters in float32 or bfloat16, written as they are. Matrices in int8 are
        written as what they stand for, in the dtype of the norms.
      path: the directory to make; its parents are made too.
      tokenizer: a directory whose tokenizer files are copied.
      files: {name: content} of further files, e.g. from `text.tokenizer_files`.
      overwrite: whether to replace a model directory at `path`.
      max_shard_bytes: a larger model is written as several files and an index.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
      FileNotFoundError: `tokenizer` holds no tokenizer file.
      ValueError: the family cannot express the config, or the tree is not the config's.
    """
    path = expanded(path)
    check_target(path, overwrite)
    blocks = lm.params.get("blocks")
    if isinstance(blocks, tuple):  # as `unstack` leaves them
        lm = LM(
            lm.config,
            {**lm.params, "blocks": jax.tree.map(lambda *x: np.stack(x), *blocks)},
        )
    lm = LM(lm.config, int8.dequantize(lm.params))
    dtype = _check_params(lm)
    config = families.to_hf(lm.config)
    config |= {"dtype": dtype, "torch_dtype": dtype}
    copied = _tokenizer_files(tokenizer)

    with at_once(path) as new:
        _write_weights(lm, new, max_shard_bytes)
        _write_json(new / "config.json", config)
        for file in copied:
            shutil.copy(file, new / file.name)
        for name, content in files.items():
            (new / name).write_bytes(content)


@contextlib.contextmanager
def at_once(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to write to, which takes the place of `path` when all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        if path.exists():
            path.rename(work / "old")
        new.rename(path)
    finally:
        if (work / "old").exists() and not path.exists():
            (work / "old").rename(path)  # the last step failed: put it back
        shutil.rmtree(work, ignore_errors=True)


OWN = re.compile(  # what `save` and `peft.save` write, and a card
    r"config\.json|generation_config\.json|adapter_config\.json|README\.md"
    r"|(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)


def check_target(path: pathlib.Path, overwrite: bool) -> None:
    """Checks that a folder may be made, or replaced.

    Raises:
      FileExistsError: it is not empty and may not be replaced, or it holds other things
        than a model that was written here, which would be lost.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists; overwrite=True (--overwrite) replaces a model"
        )
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
    others = [n for n in names if not OWN.fullmatch(n) and n not in TOKENIZER_FILES]
    if others or not {"config.json", "adapter_config.json"} & {*names}:
        raise FileExistsError(
            f"{path} holds {others[0] if others else 'no model'}, which a model that was "
            "written here does not: it is kept"
        )


def _check_params(lm: LM) -> str:
    """Compares the tree with the one that the config describes; returns its dtype."""
    want, got = tree_shapes(lm.config), dict(_flatten(lm.params))
    if set(want) != set(got):
        raise ValueError(
            f"the parameters are not those of this config: missing {sorted(set(want) - set(got))}, "
            f"unknown {sorted(set(got) - set(want))} (adapters are merged before saving)"
        )
    for p, shape in want.items():
        if np.shape(got[p]) != shape:
            raise ValueError(
                f"parameter {p} has shape {np.shape(got[p])}, expected {shape}"
            )
    dtypes = {jnp.dtype(x.dtype).name for x in got.values()}
    if dtypes not in ({"float32"}, {"bfloat16"}):
        raise ValueError(
            f"parameters are {sorted(dtypes)}, expected float32 or bfloat16"
        )
    return dtypes.pop()


def _flatten(params) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        yield "/".join(str(k.key) for k in keys), leaf


def _write_weights(lm: LM, folder: pathlib.Path, max_shard_bytes: int) -> None:
    """Plans the shards from shapes, then holds one of them in memory at a time."""
    from safetensors.numpy import save_file

    names, params = families.hf_names(lm.config), dict(_flatten(lm.params))
    shards: list[list[tuple[str, int]]] = [[]]
    size = total = 0
    for p, value in params.items():
        layers = lm.config.num_layers if p.startswith("blocks/") else 1
        for i in range(layers):
            n = value.size // layers * value.dtype.itemsize
            if shards[-1] and size + n > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((p, i))
            size, total = size + n, total + n
    where = {}
    for k, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for p, i in shard:
            value = params[p][i] if p.startswith("blocks/") else params[p]
            value = np.asarray(value).reshape(_stored_order(p, value.shape))
            name = names[p].format(i)
            tensors[name] = np.ascontiguousarray(
                value.T if families.is_linear(p) else value
            )
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors lets only the owner read
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _stored_order(p: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape, [in, out] where it will be transposed."""
    stored = families.stored_shape(p, shape)
    return stored[::-1] if families.is_linear(p) else stored


def _tokenizer_files(folder: str | pathlib.Path | None) -> list[pathlib.Path]:
    if folder is None:
        return []
    folder = expanded(folder)
    found = [folder / f for f in TOKENIZER_FILES if (folder / f).exists()]
    if not found:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(TOKENIZER_FILES)}")
    return found


def _write_json(path: pathlib.Path, value) -> None:
    path.write_text(
        json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
