"""The kinds of model paths: `resolve` describes a path, and all other code reads that.

  hf    a Hugging Face folder                     config.json, *.safetensors
  gguf  a llama.cpp file                          *.gguf
  peft  a folder of PEFT adapters, and its base   adapter_config.json
  run   the folder of a run, or its 'best'        checkpoints/, config.json, base.json

'hf:OWNER/NAME' is the folder of a model that is fetched by its name: see `records.fetch`.
'stage:NAME' is the run of an earlier stage of the same config: see `of_stage`. In front of
a run, 'average:' means the average of its parameters that it kept (config.average).
"""

from typing import Any, NamedTuple

from etils import epath

from alignax.models import peft
from alignax.records import fetch
from alignax.runs import adapter_base, checkpoint, workdirs
from alignax.runs.checkpoint import AVERAGE

STAGE = "stage:"


class ModelPath(NamedTuple):
    """The description of a path.

    Attributes:
      path: as it was given, or the folder of what was fetched.
      kind: 'hf', 'gguf', 'peft' or 'run'.
      base: of kind peft, the model that the adapters belong to; of a run, the model that
        it started from, where that is needed to read its adapters or its tokenizer; None
        for weights that were drawn from its seed.
      config: the saved config of a run; None for every other kind.
      folder: of the run.
      tokenizer: path of the model's tokenizer; '' if it is not known.
      average: of a run, whether the average of its parameters is meant.
    """

    path: str
    kind: str
    base: "ModelPath | None" = None
    config: dict[str, Any] | None = None
    folder: str = ""
    tokenizer: str = ""
    average: bool = False


def resolve(path: str) -> ModelPath:
    """Describes a path; no weights are read.

    A path that does not exist is described too, as kind hf or gguf; reading its weights is
    then an error.

    Raises:
      FileNotFoundError: the base of adapters is in none of the places that they name.
      ValueError: a stage that was not resolved, adapters of a kind that is not supported,
        a name that cannot be fetched, or the average of what is no run.
    """
    if path.startswith(AVERAGE):
        bare = path.removeprefix(AVERAGE)
        found = resolve(bare)
        if found.kind != "run" and not epath.Path(bare).exists():
            raise FileNotFoundError(f"{path}: there is no {bare}")
        if found.kind != "run":
            raise ValueError(f"{path}: only a run has an average of its parameters")
        return found._replace(average=True)
    if path.startswith(STAGE):
        raise ValueError(f"{path} is a path in a config with stages only")
    if path.startswith(fetch.PREFIX):
        path = fetch.model(path)
    if peft.holds(path):
        base = resolve(peft.base_path(path))
        own = (epath.Path(path) / "tokenizer.json").exists()
        return ModelPath(path, "peft", base, tokenizer=path if own else base.tokenizer)
    if (config := workdirs.saved_config(path)) is not None:
        folder = workdirs.run_folder(path)
        origin = _origin(folder, config)
        text = config["tokenizer"] or (origin.tokenizer if origin else "")
        return ModelPath(path, "run", origin, config, str(folder), text)
    if checkpoint.holds(path):
        return ModelPath(
            path, "run", folder=str(workdirs.run_folder(path)), tokenizer=path
        )
    kind = "gguf" if path.endswith(".gguf") else "hf"
    return ModelPath(path, kind, tokenizer=path)


def _origin(folder: epath.Path, config: dict[str, Any]) -> ModelPath | None:
    """The model that a run started from, where its adapters or its tokenizer need it."""
    start = config["model"]["path"]
    if not start:
        return None
    if adapter_base.noted(folder):
        return resolve(adapter_base.find(folder, start))
    if config["tokenizer"]:
        return None
    try:
        return resolve(start)
    except FileNotFoundError:  # of a run before it; this one has all of its weights
        return None


def stage_of(path: str) -> str | None:
    """The name of the stage whose run a path means; None for another path."""
    bare = path.removeprefix(AVERAGE)
    return bare.removeprefix(STAGE) if bare.startswith(STAGE) else None


def of_stage(path: str, workdir: epath.Path) -> str:
    """Replaces 'stage:NAME', in a config with stages, by the folder of that stage's run."""
    name = stage_of(path)
    if name is None:
        return path
    return AVERAGE * path.startswith(AVERAGE) + str(workdir / name)
