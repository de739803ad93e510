"""The model and the tokenizer that a config, or the folder of a finished run, means."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from etils import epath

from alignax.batch import LM
from alignax.inputs import tokenizer
from alignax.models import load, lora, transformer
from alignax.models.transformer import ModelConfig
from alignax.runs import adapter_base, checkpoint, workdirs


def make_policy(config, text: tokenizer.Tokenizer) -> LM:
    """The policy a run starts from, on the host.

    Raises:
      ValueError: neither path nor sizes; a tokenizer with more ids than the model; rows
        longer than the model's context.
    """
    m = config.model
    if m.path:
        lm = load_lm(m.path)
    elif m.sizes:
        lm_config = model_config(config, text.vocab_size)
        lm = LM(lm_config, transformer.init(lm_config, jax.random.key(config.seed)))
    else:
        raise ValueError(
            "config.model needs a path to weights, or sizes to start from scratch"
        )
    if text.vocab_size > lm.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {text.vocab_size} ids, the model only {lm.config.vocab_size}"
        )
    if config.length > lm.config.max_length:
        raise ValueError(
            f"config.length={config.length} is beyond the model's context of {lm.config.max_length}"
        )
    lm = with_value_head(lm, m.value_head)
    params = jax.tree.map(lambda x: jnp.asarray(x, m.param_dtype), lm.params)
    return LM(dataclasses.replace(lm.config, **computed(config)), params)


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
    return ModelConfig(**sizes)


def tokenizer_path(config) -> str:
    """The tokenizer a config means: its own, or the one that lies with the weights."""
    if config.tokenizer:
        return config.tokenizer
    if not config.model.path:
        raise ValueError(
            "config.tokenizer is empty and config.model.path names no weights"
        )
    path = config.model.path
    if inner := workdirs.saved_config(path):
        folder = workdirs.run_folder(path)
        inner["model"]["path"] = adapter_base.find(folder, inner["model"]["path"])
        return inner["tokenizer"] or tokenizer_path(_Plain(inner))
    if lora.is_peft(path) and not (epath.Path(path) / "tokenizer.json").exists():
        return lora.peft_base(path)
    return path


class _Plain(dict):
    """Attribute access to a plain dict."""

    def __getattr__(self, name):
        value = self[name]
        return _Plain(value) if isinstance(value, dict) else value


def lora_settings(config) -> lora.Lora | None:
    """The adapters that a config asks for; None for a rank of 0."""
    if not config.lora.rank:
        return None
    return lora.Lora(**{**config.lora, "targets": tuple(config.lora.targets)})


def load_lm(path: str) -> LM:
    """Weights from a run's folder, a Hugging Face or PEFT directory, or a .gguf file.

    Adapters are merged into their base, cast as they were trained on it.

    Raises:
      ValueError: adapters that do not know their base, or whose base is another now.
      FileNotFoundError: no model there, or no base of the adapters.
    """
    if lora.is_peft(path):
        base = load_lm(lora.peft_base(path))
        return lora.merge(base, *lora.load(path, base))
    if not checkpoint.holds(path):
        return load.load(path)
    lm = checkpoint.load_lm(path)
    if not lora.is_adapters(lm.params):
        return lm
    config = _Plain(workdirs.saved_config(path) or {})
    folder = workdirs.run_folder(path)
    if not config or not (folder / adapter_base.NAME).exists():
        raise ValueError(
            f"{path} holds adapters, and no config.json and {adapter_base.NAME} beside it "
            "that say on which base"
        )
    if there := adapter_base.find(folder, config.model.path):
        base = load_lm(there)
    else:
        plain = dataclasses.replace(lm.config, value_head=False)
        base = LM(plain, transformer.init(plain, jax.random.key(config.seed)))
    params = with_value_head(base, lm.config.value_head).params
    params = jax.tree.map(lambda x: jnp.asarray(x, config.model.param_dtype), params)
    adapter_base.check(folder, there, params)
    base = LM(lm.config, params)
    return lora.merge(base, lm.params, cast(lora.Lora, lora_settings(config)))


def with_value_head(lm: LM, wanted: bool) -> LM:
    """The same LM with (at zero) or without a scalar head."""
    if wanted == lm.config.value_head:
        return lm
    params = {k: v for k, v in lm.params.items() if k != "value_head"}
    if wanted:
        params["value_head"] = {"kernel": jnp.zeros(lm.config.width)}
    return LM(dataclasses.replace(lm.config, value_head=wanted), params)
