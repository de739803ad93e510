"""The model and the tokenizer that a config, or the folder of a finished run, means."""

import dataclasses
import datetime
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignax.batch import LM, Params
from alignax.models import int8, load, lora, peft, sharding, transformer
from alignax.models import sizes as model_sizes
from alignax.models.transformer import ModelConfig
from alignax.runs import adapter_base, checkpoint, model_paths
from alignax.runs.model_paths import ModelPath
from alignax.text import tokenizer, tokenizer_files, truncation
from alignax.text.dialogues import SYSTEMS, Reading

FROZEN_DTYPES = (*load.DTYPES, "int8")  # what config.model.frozen_dtype may be


def make_policy(
    config, text: tokenizer.Tokenizer, model: ModelPath | None = None,
    mesh: Mesh | None = None,
) -> LM:  # fmt: skip
    """The policy a run starts from.

    Args:
      config: a ConfigDict.
      text: the tokenizer.
      model: from `model_path`, where that is known already.
      mesh: on which weights are placed that are read; None reads them to the host.

    Raises:
      ValueError: neither path nor sizes; sizes with fewer ids than the tokenizer, or
        weights without its EOS; rows longer than the model's context. Of weights with
        fewer ids than the tokenizer, a row that has such an id is refused where it is read.
    """
    m = config.model
    if m.path:
        lm = load_lm(model or m.path, dtype=m.param_dtype, mesh=mesh)
    elif m.sizes:
        lm_config = model_config(config, text.vocab_size)
        lm = LM(lm_config, transformer.init(lm_config, jax.random.key(config.seed)))
    else:
        raise ValueError(
            "config.model needs a path to weights, or sizes to start from scratch"
        )
    ids, size = text.vocab_size, lm.config.vocab_size
    if ids > size and (not m.path or text.eos_id >= size):
        raise ValueError(
            f"the tokenizer has {ids} ids, the model only {size}"
            + (f", without EOS, {text.eos_id}" if m.path else "")
        )
    if config.length > lm.config.max_length:
        raise ValueError(
            f"config.length={config.length} is beyond the model's context of {lm.config.max_length}"
        )
    lm = with_value_head(lm, m.value_head)
    params = cast(lm.params, m.param_dtype)
    if m.path and mesh is not None:
        params = sharding.placed(params, mesh)
    return LM(dataclasses.replace(lm.config, **computed(config)), params)


def cast(params: Params, dtype: str) -> Params:
    """Parameters in a dtype; what has it already is not copied."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def frozen(config, params: Params, mesh: Mesh) -> Params:
    """Frozen parameters on a mesh, in config.model.frozen_dtype; '' is param_dtype.

    In int8 are weights that were rounded to param_dtype before.
    """
    m = config.model
    if m.frozen_dtype == "int8":
        return sharding.quantized(cast(params, m.param_dtype), mesh)
    return sharding.placed(cast(params, m.frozen_dtype or m.param_dtype), mesh)


def as_frozen(params: Params, dtype: str) -> Params:
    """Parameters in one of FROZEN_DTYPES, wherever they are; '' keeps their dtype."""
    if dtype == "int8":
        return int8.quantize(params)
    return cast(params, dtype) if dtype else params


def computed(config) -> dict[str, str]:
    """How a run computes its models, for their `ModelConfig`."""
    m = config.model
    kernels = {"head_kernel": m.head_kernel, "attn_kernel": m.attn_kernel}
    return {"dtype": m.dtype, "remat": m.remat, **kernels}


def model_config(config, vocab_size: int) -> ModelConfig:
    """The architecture that config.model.sizes describes (training from scratch)."""
    sizes = {"vocab_size": vocab_size, **config.model.sizes}
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(sizes) - known)
    if unknown:
        raise ValueError(f"model.sizes has no {unknown}; it takes {sorted(known)}")
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    try:
        model_sizes.check(sizes)
        return ModelConfig(**sizes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.sizes: {error}") from error


def model_path(config) -> ModelPath | None:
    """The description of config.model.path; None where the run draws its weights."""
    return model_paths.resolve(config.model.path) if config.model.path else None


def tokenizer_path(config, model: ModelPath | None = None) -> str:
    """The tokenizer a config means: its own, or the one that lies with the weights.

    Args:
      config: a ConfigDict.
      model: from `model_path`, where that is known already.

    Raises:
      ValueError: neither the config nor its model names one.
    """
    if config.tokenizer:
        return config.tokenizer
    found = (model or model_path(config)) if config.model.path else None
    if found is None or not found.tokenizer:
        raise ValueError(
            "config.tokenizer is empty and config.model.path names no weights"
        )
    return found.tokenizer


def load_tokenizer(config, path: str) -> tokenizer.Tokenizer:
    """The tokenizer at a path, which reads rows as the config says."""
    return tokenizer.load(path, now=date(config)).read_as(reading(config))


def date(config) -> datetime.datetime:
    """The date that a chat template prints; ValueError if config.date is none."""
    try:
        return datetime.datetime.fromisoformat(config.date)
    except ValueError as error:
        raise ValueError(
            f"config.date is {config.date!r}, expected a date such as 2024-07-26"
        ) from error


def reading(config) -> Reading:
    """How a config reads rows; what a data section says itself comes on top.

    Raises:
      ValueError: an unknown value of one of its keys.
    """
    found = Reading(
        variables=config.template.to_dict(), system=config.template_system,
        truncate=config.truncate, min_response=config.min_response,
        truncate_prompts=config.truncate_prompts,
    )  # fmt: skip
    if found.system not in SYSTEMS:
        raise ValueError(
            f"config.template_system is {found.system!r}, expected one of "
            f"{', '.join(SYSTEMS)}"
        )
    if taken := sorted({"messages", "add_generation_prompt"} & {*found.variables}):
        raise ValueError(
            f"config.template.{taken[0]}: the rows and the prompt give it to the template"
        )
    truncation.check(found, config.length)
    return found


def lora_settings(config) -> lora.Lora | None:
    """The adapters that a config asks for; None for a rank of 0."""
    return as_lora(config.lora) if config.lora.rank else None


def as_lora(section: Any) -> lora.Lora:
    """The adapters that a section `lora` describes."""
    kinds = {
        "targets": tuple,
        "layers": tuple,
        "saved": tuple,
        "ranks": dict,
        "alphas": dict,
    }
    values = {k: kinds[k](v) if k in kinds else v for k, v in section.items()}
    return lora.Lora(**values)


def load_lm(
    path: str | ModelPath, *, dtype: str = "float32", mesh: Mesh | None = None
) -> LM:
    """Weights from a run's folder, a Hugging Face or PEFT directory, or a .gguf file.

    Adapters are merged into their base, cast as they were trained on it.

    Args:
      path: of the model, or its description.
      dtype: 'float32' or 'bfloat16', of weights that are read from a Hugging Face folder or
        a .gguf file; a run keeps its own. PEFT's adapters are merged into a base that is
        read in float32 (a run as the base keeps its own).
      mesh: on which they are placed; every host reads what its own devices hold. Adapters
        are merged on the host, though, so that no mesh changes how the sums round: what
        comes of them is not placed.

    Raises:
      ValueError: adapters that do not know their base, or whose base is another now;
        weights that are not finite.
      FileNotFoundError: no model there, or no base of the adapters.
    """
    found = path if isinstance(path, ModelPath) else model_paths.resolve(path)
    if found.kind == "peft":
        assert found.base is not None
        base = load_lm(found.base)
        lm = lora.merge(base, *peft.load(found.path, base))
        config = dataclasses.replace(lm.config, dtype=dtype)
        lm = LM(config, cast(lm.params, dtype))
    elif found.kind != "run":
        lm = load.load(found.path, dtype=dtype, mesh=mesh)
    else:
        adapters = bool(found.config and found.config.get("lora", {}).get("rank"))
        lm = checkpoint.load_lm(
            found.path, average=found.average, mesh=None if adapters else mesh
        )
        lm = merged(found, lm) if lora.is_adapters(lm.params) else lm
    check_finite(lm.params, found.path)
    return lm


def check_finite(params: Params, path: str) -> None:
    """Raises ValueError for weights that are NaN or infinite: they answer nothing.

    Of arrays on a mesh it raises on every host.
    """
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        # a copy that numpy made of a device's array would stay as long as the array
        if isinstance(leaf, jax.Array) and not _on_host(leaf):
            fine = bool(_all_finite(leaf))
        elif isinstance(leaf, jax.Array):
            fine = all(_is_finite(shard.data) for shard in leaf.addressable_shards)
        else:
            fine = _is_finite(leaf)
        if not fine:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise ValueError(f"{path}: {name} has weights that are NaN or infinite")


def _on_host(x: jax.Array) -> bool:
    devices: Any = x.sharding.device_set
    return x.is_fully_addressable and all(d.platform == "cpu" for d in devices)


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _is_finite(part: jax.Array | np.ndarray) -> bool:
    array = np.asarray(part)
    bits = np.dtype(f"u{array.itemsize}")
    exponent = np.array(np.inf, array.dtype).view(bits)  # all ones: no finite number
    return not any(
        (x.view(bits) & exponent == exponent).any()
        for x in (array if array.ndim > 1 else [array])  # a small mask at a time
    )


def merged(found: ModelPath, adapters: LM) -> LM:
    """The adapters of a run in their base, which is read, or drawn from the run's seed."""
    config = found.config
    if not config or not adapter_base.noted(found.folder):
        raise ValueError(
            f"{found.path} holds adapters, and no config.json and {adapter_base.NAME} "
            "beside it that say on which base"
        )
    if found.base is not None:
        base = load_lm(found.base)
    else:
        plain = dataclasses.replace(adapters.config, value_head=False)
        base = LM(plain, transformer.init(plain, jax.random.key(config["seed"])))
    params = with_value_head(base, adapters.config.value_head).params
    dtype = config["model"]["param_dtype"]
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    adapter_base.check(found.folder, found.base.path if found.base else "", params)
    # what the adapters were trained on; runs of earlier versions lack the key
    params = as_frozen(params, config["model"].get("frozen_dtype", ""))
    params = cast(int8.dequantize(params, dtype), dtype)
    base = LM(adapters.config, params)
    return lora.merge(base, adapters.params, as_lora(config["lora"]))


def other_tokenizer(
    path: str | ModelPath, text: tokenizer.Tokenizer
) -> tuple[str, str]:
    """The tokenizer of a model, if its ids mean other tokens than those of `text`.

    Args:
      path: of the model, or its description.
      text: the run's tokenizer.

    Returns:
      (path of the tokenizer, the first difference); ('', '') where the ids mean the same,
      or where no tokenizer lies with the model.
    """
    where = path if isinstance(path, ModelPath) else model_paths.resolve(path)
    own = where.tokenizer
    if not own:
        return "", ""
    try:
        found = tokenizer_files.difference(text, tokenizer.load(own, now=text.now))
    except FileNotFoundError:  # weights alone: their ids are taken to be the run's
        return "", ""
    return (own, found) if found else ("", "")


def with_value_head(lm: LM, wanted: bool) -> LM:
    """The same LM with (at zero) or without a scalar head."""
    if wanted == lm.config.value_head:
        return lm
    params = {k: v for k, v in lm.params.items() if k != "value_head"}
    if wanted:
        params["value_head"] = {"kernel": jnp.zeros(lm.config.width)}
    return LM(dataclasses.replace(lm.config, value_head=wanted), params)
