"""Writes a run or a model as a folder that transformers, PEFT and vLLM load.

  alignax export runs/dpo exported            weights, config, tokenizer, generation_config
  alignax export runs/lora adapters --peft    the adapters of a run, as PEFT writes them

SOURCE is all that `alignax.load` reads. The folder appears complete or not at all, and is
read back before the command ends.
"""

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import api
from alignax.batch import LM, Params
from alignax.models import json_object, load, lora, peft, transformer
from alignax.models import save as model_files
from alignax.models.stored import expanded
from alignax.records import fetch
from alignax.reports import metrics, model_card
from alignax.runs import checkpoint, model_paths
from alignax.runs.model_paths import ModelPath
from alignax.text import tokenizer as tokenizers
from alignax.text import tokenizer_files
from alignax.text.tokenizer import Tokenizer
from alignax.training import loading

MOST_STEPS = 16  # from a run to the model that it began with
# What the change of log-probabilities by a cast is measured on.
TEXTS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Write a short story about the tide.", "At dawn the water came back, and with it the boats."),
    ("Compute 17 + 25.", "17 + 25 = 42."),
)  # fmt: skip


def export(
    source: str, out: str, *, peft: bool = False, dtype: str = "", average: bool = False,
    value_head: str = "", overwrite: bool = False,
) -> list[str]:  # fmt: skip
    """Writes a model and reads it back.

    Args:
      source: a run, its 'best', a Hugging Face or PEFT folder, or a .gguf file.
      out: the folder to make.
      peft: write the adapters of a run alone, for PEFT. Otherwise adapters are merged.
      dtype: 'float32' or 'bfloat16', of the weights; '' is the source's own (of a .gguf
        file, and of float16, it is float32).
      average: the average of the parameters that the run kept, instead of these.
      value_head: 'classifier' writes the scalar head of a reward model as a sequence
        classifier's `score`; 'drop' leaves the head of a critic out. '' is an error for a
        model with such a head, and 'classifier' for adapters with one.
      overwrite: replace a model folder that stands there.

    Returns:
      What was written and measured, in lines.

    Raises:
      ValueError: the source has no such adapters, average or head; the message says so.
      FileNotFoundError, FileExistsError: no model there, or a folder that would be lost.
    """
    if "://" in out:
        raise ValueError(f"{out} is remote: export to a local folder, and copy that")
    found = model_paths.resolve(checkpoint.AVERAGE * average + source)
    text = tokenizers.load(tokenizer_of(found))
    files = tokenizer_files.files(text)
    known = facts(found)
    card = model_card.card(
        pathlib.Path(out).name, found.config, known, evaluation(found, known.get("step")),
        peft=peft, source=origin(found),
    )  # fmt: skip
    files["README.md"] = card.encode()
    if peft:
        if dtype:
            raise ValueError("adapters are written in float32")
        return write_adapters(found, out, files, overwrite, value_head)
    model_files.check_target(expanded(out), overwrite)
    lm, said = read(found)
    lm = with_head(lm, value_head, source)
    if dtype:
        lm, line = cast(lm, dtype, text)
        said.append(line)
    model_files.save(lm, out, files=files, overwrite=overwrite)
    stored = str(jax.tree.leaves(lm.params)[0].dtype)
    check_written(lm.params, load.load(out, dtype=stored).params, out)
    size = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    kind = "sequence classifier" if lm.config.value_head else "causal LM"
    many = len(jax.tree.leaves(lm.params))
    return [
        *said,
        f"wrote {out}: {lm.config.family}, {kind}, {size / 1e6:.1f} MB; {many} parameters "
        "read back as they were written",
    ]


def tokenizer_of(found: ModelPath) -> str:
    """The path of the tokenizer of a model.

    Raises:
      FileNotFoundError: none is known.
    """
    if not found.tokenizer:
        raise FileNotFoundError(f"{found.path} has no tokenizer that is known")
    return found.tokenizer


def facts(found: ModelPath) -> dict[str, Any]:
    """What is known of a model beside its config: its step, its data, who wrote it."""
    if found.kind != "run":
        return {}
    meta = checkpoint.last_meta(found.path)
    return {
        "step": meta.get("step", ""),
        "parameters": "their average" if found.average else "",
        "alignax": meta.get("written_by", {}).get("alignax", ""),
        "digest of the data": (meta.get("data") or {}).get("data", ""),
    }


def origin(found: ModelPath) -> dict[str, Any]:
    """What the card of the model that another was made of says of both, and its name.

    Args:
      found: a model; a run, or adapters, lead to the Hugging Face folder that they began
        with. Without its README.md nothing is known.
    """
    for _ in range(MOST_STEPS):
        if found.kind == "hf":
            break
        start = (found.config or {}).get("model", {}).get("path", "")
        if found.base is not None:
            found = found.base
        elif start and not start.startswith(fetch.PREFIX):
            try:
                found = model_paths.resolve(start)
            except (ValueError, OSError):  # it is no longer there
                return {}
        else:
            return {}
    folder = expanded(found.path).absolute()
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{folder}/")
    name = "/".join(cached.groups()) if cached else folder.name
    return {**model_card.inherited(text), "base_model": name}


def evaluation(found: ModelPath, step: Any) -> dict[str, float]:
    """The evaluation of a run at a step, if these are the parameters that it was of."""
    if found.kind != "run" or found.average:
        return {}
    try:
        return model_card.evaluation(metrics.read(found.folder or found.path), step)
    except FileNotFoundError:
        return {}


def read(found: ModelPath) -> tuple[LM, list[str]]:
    """The model in its own dtype, and what is to be said of that."""
    if found.kind != "hf":
        return loading.load_lm(found), []
    config = json_object.read(expanded(found.path) / "config.json")
    own = config.get("dtype") or config.get("torch_dtype") or "float32"
    said = []
    if own not in ("float32", "bfloat16"):
        said = [f"the weights are {own} there, and float32 here"]
    lm = loading.load_lm(found, dtype="bfloat16" if own == "bfloat16" else "float32")
    return lm, said


def with_head(lm: LM, value_head: str, source: str) -> LM:
    """The model with or without its scalar head, as was asked for.

    Raises:
      ValueError: it has one and nothing was asked for, or has none.
    """
    if lm.config.value_head and not value_head:
        raise ValueError(
            f"{source} has a scalar head: --sequence-classifier writes it as a classifier's "
            "`score`, as for a reward model; --drop-value-head leaves it out, as for a critic"
        )
    if value_head and not lm.config.value_head:
        raise ValueError(
            f"{source} has no scalar head, as reward models and critics have"
        )
    return loading.with_value_head(lm, False) if value_head == "drop" else lm


def cast(lm: LM, dtype: str, text: Tokenizer) -> tuple[LM, str]:
    """The model in another dtype, and what that does to log-probabilities."""
    new = LM(lm.config, jax.tree.map(lambda x: jnp.asarray(x, dtype), lm.params))
    if lm.config.value_head:
        return new, f"cast to {dtype}"
    prompts, responses = zip(*TEXTS, strict=True)
    # in float32, for the change of the weights alone
    config = dataclasses.replace(lm.config, dtype="float32")
    before, after = (
        api.score(api.Model(LM(config, x.params), text), prompts, responses)
        for x in (lm, new)
    )
    change = np.abs(after.logps - before.logps)[before.mask]
    return new, (
        f"cast to {dtype}: log-probabilities (computed in float32) change by "
        f"{change.mean():.2g} nats per token, "
        f"by {change.max():.2g} at most ({change.size} tokens)"
    )


def check_written(params: Params, again: Params, out: str) -> None:
    """Raises ValueError unless what was read back is what was written."""
    same = jax.tree.map(
        lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), params, again
    )
    for path, equal in jax.tree_util.tree_leaves_with_path(same):
        if not equal:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{out} does not read back: {name} differs")


def write_adapters(
    found: ModelPath, out: str, files: dict[str, bytes], overwrite: bool,
    value_head: str = "",
) -> list[str]:  # fmt: skip
    """Writes the adapters of a run for PEFT, and reads them back.

    Args:
      found: the run.
      out: the folder to make.
      files: {name: content} of further files.
      overwrite: replace a model folder that stands there.
      value_head: 'drop' leaves a scalar head out; otherwise adapters with one are those of
        a sequence classifier.

    Raises:
      ValueError: it is no run with adapters, or 'classifier' without a scalar head.
    """
    lm = checkpoint.load_lm(found.path, average=found.average) if found.kind == "run" else None  # fmt: skip
    if lm is None or not found.config or not lora.is_adapters(lm.params):
        raise ValueError(f"{found.path} is no run with adapters (config.lora.rank)")
    if value_head:
        lm = with_head(lm, value_head, found.path)
    settings = loading.as_lora(found.config["lora"])
    base, note = base_of(found)
    peft.save(
        lm.params, settings, lm.config, out, base=base, files=files, overwrite=overwrite
    )
    shapes = jax.eval_shape(lambda: transformer.init(lm.config, jax.random.key(0)))
    again, _ = peft.load(out, LM(lm.config, shapes))
    check_written(lm.params, again, out)
    many = sum(x.size for x in jax.tree.leaves(lm.params))
    kind = ", of a sequence classifier" if lm.config.value_head else ""
    return [
        f"wrote {out}: {many} parameters of adapters of {note}, rank {settings.rank}{kind}; "
        "they read back as they were written"
    ]


def base_of(found: ModelPath) -> tuple[str, str]:
    """(base_model_name_or_path of a run's adapters, the base in words)."""
    assert found.config is not None
    path = found.config["model"]["path"]
    if path.startswith(fetch.PREFIX):  # by the name that others know it by
        name = path.removeprefix(fetch.PREFIX)
        return name, name
    if found.base is None:
        return "", "weights that were drawn from the run's seed"
    if found.base.kind == "hf":
        return found.base.path, found.base.path
    return found.base.path, (
        f"{found.base.path}, which PEFT and vLLM do not read: export it, too, and name that "
        "folder in adapter_config.json (base_model_name_or_path)"
    )


def main(arguments: Sequence[str]) -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(
        prog="alignax export", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "source", help="a run, a Hugging Face or PEFT folder, or a .gguf"
    )
    parser.add_argument("out", help="the folder to make")
    parser.add_argument("--peft", action="store_true", help="the adapters alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="")
    parser.add_argument(
        "--average", action="store_true", help="the average of the run's parameters"
    )
    head = parser.add_mutually_exclusive_group()
    head.add_argument(
        "--sequence-classifier", dest="head", action="store_const", const="classifier",
        default="", help="a reward model, with its scalar head as `score`",
    )  # fmt: skip
    head.add_argument(
        "--drop-value-head", dest="head", action="store_const", const="drop",
        help="a policy without the head of its critic",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model folder"
    )
    a = parser.parse_args(arguments)
    try:
        said = export(
            a.source, a.out, peft=a.peft, dtype=a.dtype, average=a.average,
            value_head=a.head, overwrite=a.overwrite,
        )  # fmt: skip
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error
    print("\n".join(said))


if __name__ == "__main__":
    main(sys.argv[1:])
