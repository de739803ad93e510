"""The folder of a run (workdir): its saved config, and checks before a run uses it."""

import contextlib
import json
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

import alignax
from alignax.models import fallback, json_object
from alignax.models.sizes import brief
from alignax.runs import checkpoint

RESPONSES = "responses.jsonl"  # of a run that answers prompts
END = "finished.json"  # of a run that is over: {"step": its last}
# What a run writes, empty at its start.
WRITTEN = ("metrics.jsonl", "samples.jsonl", "samples.md")
# Keys that decide how numbers are computed, and so how they round.
ROUNDING = (
    "mesh", "accumulate", "model.remat", "model.head_kernel", "model.attn_kernel",
)  # fmt: skip
# Keys that may differ when a run is resumed: they change no step, but for rounding.
VOLATILE = (
    "log_every", "checkpoint", "profile", "trackers", "wandb", "patience", "watchdog", "row_cache",
    "rollout.show", "eval_every", "plots", *ROUNDING,
)  # fmt: skip
OWN_B2 = {"adamw": 0.999, "lion": 0.99, "muon": 0.999}  # optax's; what optim.b2=0 means
# Keys that runs of earlier versions lack. They only decide how rows become ids, which the
# saved position in the data is checked by.
ADDED = ("template", "template_system", "truncate", "min_response", "truncate_prompts")
# Sections that have the same keys in every config.
FIXED = ("model", "lora", "rollout", "generate", "optim", "checkpoint")
SECTIONS = (*FIXED, "loss", "evals")  # that are objects in every config


def check_owner(workdir: str, config, defaults=None, *, counted: bool = False) -> None:
    """Checks that a workdir holds no run of another config.

    A run of an earlier version lacks the keys that were added since: they take their
    defaults, which is logged.

    Args:
      workdir: of the run.
      config: a ConfigDict.
      defaults: a ConfigDict with all keys of this version.
      counted: whether num_steps are those of num_epochs, if there are any; otherwise they
        are not compared.

    Raises:
      ValueError: the run there has another config, whose keys are listed; or it is of a
        newer version, and both versions are named.
    """
    folder = checkpoint.absolute(workdir)
    path = folder / "config.json"
    if not path.exists():
        return
    there = read_config(path)
    if "batch_size" not in there:
        raise ValueError(
            f"{folder} holds a config.json that is no run's: take another workdir"
        )
    if not _holds_work(folder, there):
        return
    a, b = _flat(_judged(there)), _flat(_judged(plain(config)))
    for run in (a, b):
        if run.get("optim.b2") == 0:
            run["optim.b2"] = OWN_B2.get(run["optim.name"], 0.999)
    steps = a.get("optim.schedule_steps") or a.get("num_steps", 0)
    for run in (a, b):
        _rate_of_every_step(run)
    if config.get("num_epochs") and not counted and "none" not in a["num_steps"]:
        b["num_steps"] = a["num_steps"]  # compared when they are known
    known = _flat(plain(defaults)) if defaults is not None else {}
    new = [k for k in b if k not in a and b[k] == known.get(k) and k in known]
    if said := [f"{k}={b[k]!r}" for k in new if not k.startswith(VOLATILE)]:
        fallback.say_once(
            f"{folder} was begun by an earlier version of alignax; new keys take their "
            f"defaults: {', '.join(said)}"
        )
    differ = [
        f"{k} ({a.get(k, 'absent')} there, {b.get(k, 'absent')} here)"
        for k in sorted({*a, *b})
        if a.get(k) != b.get(k)
        and not k.startswith(VOLATILE)
        and not (k not in a and (k in new or _may_be_added(k, b[k])))
    ]
    if steps and any(x.startswith("num_steps ") for x in differ):
        differ.append(
            "the number of steps may change if the learning rate of every step stays: with "
            f"optim.schedule_steps={steps}"
        )
    unknown = [
        k for k in a
        if known and k not in b and _is_fixed(k) and not k.startswith(VOLATILE)
    ]  # fmt: skip
    if unknown:
        version = checkpoint.written_by(folder) or "of another version"
        raise ValueError(
            f"{folder} holds a run of alignax {version} with the keys {unknown}, which this "
            f"alignax {alignax.__version__} does not know: go on with the version that wrote it"
        )
    if differ:
        raise ValueError(
            f"{folder} holds a run of another config; take another workdir or undo: "
            + "; ".join(differ)
        )


def _holds_work(folder: epath.Path, config: dict[str, Any]) -> bool:
    """Whether a run saved anything that another would lose: it owns its folder then."""
    saved = [p for p in (folder / "checkpoints", folder / "best") if p.is_dir()]
    if any(step.name.isdigit() for p in saved for step in p.iterdir()):
        return True
    if config.get("prompts"):
        return (folder / RESPONSES).exists()
    return not config.get("num_steps") and not _is_empty(folder / "metrics.jsonl")


def _is_empty(path: epath.Path) -> bool:
    """Whether a file has no content, or is not there."""
    return not path.exists() or not path.stat().length


def release(workdir: str) -> None:
    """Leaves nothing of a start that failed: no config, no empty file or folder.

    A folder with a checkpoint, responses or metrics stays as it is, and so do files that no
    run writes, and a folder without the config of a run. Errors of the file system are not
    raised, so that they do not hide the one that ended the run.
    """
    folder = checkpoint.absolute(workdir)
    # etils raises ValueError for a folder that is not empty
    with contextlib.suppress(OSError, ValueError):
        path = folder / "config.json"
        there = read_config(path) if path.exists() else {}
        ours = "batch_size" in there and not _holds_work(folder, there)
        if ours and _is_empty(folder / "metrics.jsonl"):
            path.unlink()
            for name in ("base.json", *WRITTEN):
                if name not in WRITTEN or _is_empty(folder / name):
                    (folder / name).unlink(missing_ok=True)
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink(missing_ok=True)
    for name in ("checkpoints", "best", ""):
        with contextlib.suppress(OSError, ValueError):
            (folder / name).rmdir()


def rounded(before: dict[str, Any], config) -> list[str]:
    """Keys of ROUNDING that a config gives another value than the one before it."""
    a, b = _flat(before), _flat(plain(config))
    return [k for k in ROUNDING if k in a and a[k] != b.get(k)]


def prepare(workdir: str, config) -> str:
    """Makes the workdir and writes the config there.

    Raises:
      OSError: it cannot be written.
    """
    folder = checkpoint.absolute(workdir)
    path, now = folder / "config.json", plain(config)
    make(folder)
    if jax.process_index() == 0:
        write_json(path, now)
    return str(folder)


def make(folder: epath.Path) -> None:
    """Makes a workdir.

    Raises:
      OSError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"  # of all hosts
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to workdir {folder}: {error.strerror}") from error


def mark_end(workdir: str, step: int) -> None:
    """Notes that a run is over at a step: with its last evaluation, and its best step."""
    path = checkpoint.absolute(workdir) / END
    if jax.process_index() == 0 and ended_at(workdir) != step:
        write_json(path, {"step": step})


def ended_at(workdir: str) -> int | None:
    """The step at which a run was over; None without `mark_end`."""
    path = checkpoint.absolute(workdir) / END
    return json_object.read(path, {"step": int})["step"] if path.exists() else None


def write_json(path: epath.Path, value: Any, aside: str = "") -> None:
    """Writes a file of JSON; a kill leaves what was there before, or all of it.

    Args:
      path: of the file.
      value: what json.dumps takes.
      aside: name of the file that it is written to first, where several processes write.

    Raises:
      OSError: it cannot be written; it is named.
    """
    fresh = path.parent / (aside or f".{path.name}")
    try:
        fresh.write_text(json.dumps(value, indent=1))
        fresh.replace(path)
    except OSError as error:  # it names no file where the disk is full
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def plain(config) -> dict[str, Any]:
    """A config as plain dicts, lists and numbers, as JSON keeps it."""
    return json.loads(json.dumps(config.to_dict()))


def run_folder(path: str) -> epath.Path:
    """The folder of the run that a path belongs to; the path may be its 'best'."""
    folder = epath.Path(path)
    return folder.parent if folder.name in ("best", "checkpoints") else folder


def saved_config(path: str) -> dict[str, Any] | None:
    """The config of the run that a folder, or its 'best', belongs to; None if of no run.

    Raises:
      ValueError: it is damaged; it is named.
    """
    file = run_folder(path) / "config.json"
    config = read_config(file) if file.is_file() else {}
    if "batch_size" not in config:
        return None
    model = config.get("model", {})
    for key, value in (
        ("model.path", model.get("path")), ("tokenizer", config.get("tokenizer")),
    ):  # fmt: skip
        if not isinstance(value, str):
            raise ValueError(f"{file} has {key} {brief(value)}, expected a text")
    return config


def read_config(path: epath.Path) -> dict[str, Any]:
    """The object in a config.json, which may be that of something else than a run.

    Raises:
      ValueError: it is no object; or it is a run's, and one of its sections is none.
    """
    config = json_object.read(path)
    if "batch_size" not in config:
        return config
    sections = {key: config.get(key, {}) for key in SECTIONS}
    evals = sections["evals"]
    if isinstance(evals, dict):
        sections |= {f"evals.{key}": value for key, value in evals.items()}
    for key, value in sections.items():
        if not isinstance(value, dict):
            raise ValueError(f"{path} has {key} {brief(value)}, expected an object")
    return config


def everywhere(here: bool, what: str) -> bool:
    """Whether a condition holds on every host.

    Raises:
      ValueError: it holds on some hosts only, which would then run different programs.
    """
    if jax.process_count() == 1:
        return here
    hosts = multihost_utils.process_allgather(np.array(here))
    if hosts.any() != hosts.all():
        names = np.flatnonzero(hosts).tolist()
        raise ValueError(f"{what} only on hosts {names}: name a folder that all share")
    return bool(hosts.all())


def _may_be_added(key: str, value: Any) -> bool:
    """Whether a run that lacks a key may go on with this value of it.

    A key of a section whose keys are those of all configs is new, and off if it is falsy.
    Sections of plug-ins hold what differs from the plug-in's defaults, whatever these are.
    """
    return key.partition(".")[0] in ADDED or (
        "." in key and _is_fixed(key) and not value
    )


def _rate_of_every_step(run: dict[str, Any]) -> None:
    """Puts the steps that a schedule depends on in the place of the number of steps.

    More steps are the same run as long as the learning rate of every step is the same.
    """
    steps, epochs = run.pop("num_steps", 0), run.pop("num_epochs", 0)
    own = run.pop("optim.schedule_steps", 0)
    if not (steps or epochs):
        run["num_steps"] = "none"  # it is another run, which evaluates only
    elif run.get("optim.schedule") == "constant":
        run["num_steps"] = "any"
    else:
        run["num_steps"] = str(own or steps)


def _is_fixed(key: str) -> bool:
    """Whether a key is one of all configs, and of no plug-in."""
    section, dot, _ = key.partition(".")
    own = ("rollout.reward.", "model.sizes.", "generate.reward.")
    return not dot or (section in FIXED and not key.startswith(own))


def _judged(config: dict[str, Any]) -> dict[str, Any]:
    """A config in which every evaluation says its reward: by default that of rollouts."""
    reward = config.get("rollout", {}).get("reward")
    evals = config.get("evals", {})
    if not reward or not evals:
        return config
    return {**config, "evals": {k: {"reward": reward, **v} for k, v in evals.items()}}


def _flat(tree, prefix="") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out
