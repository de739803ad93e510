"""The base model of LoRA adapters: recorded when a run starts, checked when it is read.

Adapters are of no use with other weights. WORKDIR/base.json holds the path of the base (an
absolute one, and one relative to the workdir, so that both can move together) and a checksum
of its parameters in the dtype of the run.
"""

import os

import jax
from etils import epath

from alignax.batch import Params
from alignax.models import json_object
from alignax.records import fetch
from alignax.runs import checkpoint, workdirs

NAME = "base.json"
NEEDS = {"path": str, "from_here": str, "checksum": str}


def note(workdir, path: str, checksum: str) -> None:
    """Writes base.json; a resumed run checks it instead.

    Args:
      workdir: of the run; it exists.
      path: of the base's weights; '' if they were drawn from the run's seed.
      checksum: of the base's parameters, in the dtype of the run and not quantised, from
        `checkpoint.fingerprint`. Every host takes it: it may be a program of all devices.

    Raises:
      ValueError: the base is not the one that the run began with.
    """
    folder = checkpoint.absolute(workdir)
    if (folder / NAME).exists():
        _compare(folder, checksum)
    elif jax.process_index() == 0:
        prefix, path = _parts(path)
        named = path.startswith(fetch.PREFIX)
        there = str(checkpoint.absolute(path)) if path and not named else path
        local = path and not named and "://" not in f"{there}{folder}"
        seen = os.path.relpath(there, folder) if local else ""
        known = {"path": prefix + there, "from_here": seen, "checksum": checksum}
        workdirs.write_json(folder / NAME, known)


def _parts(path: str) -> tuple[str, str]:
    """('average:' or '', the path behind it)."""
    bare = path.removeprefix(checkpoint.AVERAGE)
    return path[: len(path) - len(bare)], bare


def noted(workdir) -> bool:
    """Whether a run has a base.json."""
    return (checkpoint.absolute(workdir) / NAME).exists()


def find(workdir, path: str) -> str:
    """Where the base of a run is now; `path` itself for a run without base.json.

    Args:
      workdir: of the run.
      path: of the base in the run's config; it may be relative to another folder.

    Raises:
      FileNotFoundError: the base is in none of the places; they are listed.
    """
    folder = checkpoint.absolute(workdir)
    if not path or not (folder / NAME).exists():
        return path
    known = json_object.read(folder / NAME, NEEDS)
    places = [known["path"], path]
    if known["from_here"]:
        there = os.path.normpath(folder / known["from_here"])
        places.insert(1, _parts(known["path"])[0] + there)
    for place in places:
        bare = _parts(place)[1]
        if bare.startswith(fetch.PREFIX) or epath.Path(bare).exists():
            return place
    raise FileNotFoundError(
        f"the base of the adapters in {folder} is in none of {list(dict.fromkeys(places))}"
    )


def check(workdir, path: str, params: Params) -> None:
    """Raises ValueError if a base is not the one that adapters were trained on.

    Args:
      workdir: of the run that trained them; it has a base.json.
      path: where the base was found; '' if it was drawn from the run's seed.
      params: of the base, in the dtype of the run.
    """
    folder = checkpoint.absolute(workdir)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        _compare(folder, checkpoint.fingerprint(params), path)


def _compare(folder: epath.Path, checksum: str, path: str | None = None) -> None:
    known = json_object.read(folder / NAME, NEEDS)
    if checksum == known["checksum"]:
        return
    where = path or known["path"]
    what = (
        f"{where} is not the base that the adapters in {folder} were trained on: "
        if where
        else f"the adapters in {folder} were trained on weights drawn from a seed, which "
        "on this platform or this jax draws others (train on saved weights instead): "
    )
    raise ValueError(
        f"{what}its checksum is {checksum}, that of the base was {known['checksum']}"
    )
