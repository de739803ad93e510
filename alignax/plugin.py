"""Loads plug-ins: functions found by folder and file name, with their hyper-parameters.

`load('losses', 'dpo')` is `alignax.losses.dpo.loss`: all files of a folder define a function
of the same name and signature. A dotted name is imported as it is, so a method outside this
repository needs no fork.
"""

import difflib
import fnmatch
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from alignax import masked
from alignax.batch import COMPARED, FORMS, OF_BEHAVIOUR, Example, Metrics

ROLES = {  # folder -> the function that every file in it defines (one of them)
    "losses": ("loss",), "reweight": ("reweight",), "shaping": ("shape",),
    "rewards": ("reward",), "evals": ("evaluate",), "data": ("examples",),
    "decoders": ("guide", "search"),
}  # fmt: skip


# Keywords that the caller passes (to a `search` those of SEARCH); all others are
# hyper-parameters.
HANDED = (
    "key",
    "tokenizer",
    "generate",
    "score",
    "batch_size",
    "length",
    "ema",
)
SUM = "sum"  # name of a weighted sum of losses: see `combine`
READING = ("raw", "specials")  # keys of every data section: see `dialogues.Reading`
SEARCH = (*HANDED, "max_new", "judge", "temperature", "eos_ids", "reader", "stops")


class Bound(NamedTuple):
    """A plug-in with all its hyper-parameters, and the declarations of its module."""

    name: str
    function: Callable
    hyper: dict[str, Any]
    needs: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()  # of rows that a loss reads; () = all with responses
    coupled: bool = False
    ema: Mapping[str, float] = MappingProxyType({})
    stage: str = ""  # of a shaping: when it applies
    baseline: str = ""  # of a shaping: the samples whose rewards it compares with
    # of a loss: values of the config that it needs if rollouts make its batches
    requires: Mapping[str, Any] = MappingProxyType({})
    returns: bool = False  # of a shaping: its result + values is a critic's target
    role: str = ""  # name of the function in its file, one of ROLES
    # of a shaping with BASELINE 'running': its numbers at the start of a run, and the
    # function that gives them after a rollout
    running: Mapping[str, float] = MappingProxyType({})
    update: Callable | None = None

    def __call__(self, *args, **kwargs):
        return self.function(*args, **{**self.hyper, **kwargs})


def available(folder: str) -> list[str]:
    """Names of the plug-ins in a folder of this package."""
    package = importlib.import_module(f"alignax.{folder}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def load(
    folder: str, name: str, hyper: Mapping[str, Any] | None = None, *,
    handed: Sequence[str] | None = None,
) -> Bound:  # fmt: skip
    """Imports a plug-in and binds its hyper-parameters, before anything compiles.

    Args:
      folder: one of ROLES.
      name: a file in the folder, or a dotted path to a module or a function.
      hyper: values for the function's keyword-only parameters.
      handed: keywords that the caller passes, where they are not those of the folder.

    Raises:
      ValueError: unknown name (alternatives are listed), unknown hyper-parameter (the
        function's own are listed), a value whose type cannot be the parameter's, or one
        outside the interval that the module states in RANGES.
    """
    module, function, role = _find(folder, name)
    if handed is None:
        handed = SEARCH if role == "search" else HANDED
    named = f"{folder}.{name}"
    bound = bind(function, hyper, name=named, module=module, handed=handed)
    return bound._replace(role=role)


def bind(
    function: Callable,
    hyper: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    module: Any = None,
    handed: Sequence[str] = HANDED,
) -> Bound:
    """Binds a function's keyword-only parameters; `load` after the import.

    Args:
      function: the plug-in.
      hyper: values for its keyword-only parameters.
      name: of the plug-in in error messages.
      module: defines NEEDS, FORMS, COUPLED, EMA, STAGE, BASELINE, REQUIRES, RETURNS,
        RUNNING and `update`; the function's own module by default.
      handed: keywords that are no hyper-parameters, since the caller passes them.

    Raises:
      ValueError: as for `load`.
    """
    name = name or function.__name__
    module = module or inspect.getmodule(function)
    parameters = inspect.signature(function).parameters.values()
    takes = {
        p.name: p
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in handed
    }
    given = dict(hyper or {})
    for key, value in given.items():
        if key not in takes:
            near = difflib.get_close_matches(key, takes, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            names = ", ".join(map(repr, takes)) or "none"
            raise ValueError(
                f"{name} has no hyper-parameter {key!r}{hint}; it takes {names}"
            )
        default = takes[key].default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{name}: {key}={value!r} should be True or False")
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(
                f"{name}: {key}={value!r} should be a number, like its default {default!r}"
            )
        interval = getattr(module, "RANGES", {}).get(key)
        several = value.values() if isinstance(value, Mapping) else value
        if interval and not number and isinstance(several, Iterable):
            for item in several:
                if isinstance(item, bool) or not isinstance(item, int | float):
                    raise ValueError(f"{name}: {key}={value!r} should hold numbers")
                _number(name, key, item, 0.0, interval)
        if number:
            if takes[key].annotation is int and value % 1 != 0:  # NaN too
                raise ValueError(f"{name}: {key}={value!r} should be a whole number")
            given[key] = _number(name, key, value, default, interval)
        choices: Any = getattr(module, f"{key.upper()}S", None)
        listed = isinstance(value, str) and isinstance(choices, tuple | Mapping)
        if listed and value not in choices:
            raise ValueError(
                f"{name}: {key}={value!r} is not one of {', '.join(choices)}"
            )
    missing = [k for k, p in takes.items() if p.default is p.empty and k not in given]
    if missing:
        raise ValueError(f"{name} needs a value for {', '.join(map(repr, missing))}")
    defaults = {k: p.default for k, p in takes.items() if p.default is not p.empty}

    def declared(attribute: str, default: Any) -> Any:
        value: Any = getattr(module, attribute, default)
        # a function where it depends on the hyper-parameters
        return value({**defaults, **given}) if callable(value) else value

    return Bound(
        name, function, {**defaults, **given},
        tuple(getattr(module, "NEEDS", ())),
        _forms(name, module),
        bool(getattr(module, "COUPLED", False)),
        dict(getattr(module, "EMA", {})),
        str(getattr(module, "STAGE", "")),
        str(declared("BASELINE", "")),
        dict(getattr(module, "REQUIRES", {})),
        bool(getattr(module, "RETURNS", False)),
        running={k: float(v) for k, v in declared("RUNNING", {}).items()},
        update=getattr(module, "update", None) if hasattr(module, "RUNNING") else None,
    )  # fmt: skip


def find(folder: str, name: str) -> Callable:
    """The function of a plug-in, nothing bound."""
    return _find(folder, name)[1]


def function(path: str, setting: str) -> Callable:
    """A function of the user's own by its dotted name, such as 'my_module.reply'.

    Args:
      path: MODULE.FUNCTION.
      setting: the key of the config that names it, for the error.

    Raises:
      ValueError: there is no such module or no such function in it.
    """
    name, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(name), attribute) if name else None
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # it is there, but a module that it imports is not
        found = None
    except AttributeError:
        found = None
    if not callable(found):
        raise ValueError(
            f"{setting} is {path!r}, expected MODULE.FUNCTION of a function that can be "
            "imported from here"
        )
    return found


def combine(parts: Mapping[str, tuple[float, Bound]], *, reduction: str = "") -> Bound:
    """A weighted sum of losses, as one loss.

    Args:
      parts: label -> (weight, loss of the folder losses/). Hyper-parameters become
        'label.parameter', beside 'label.weight'; metrics and running means 'label/name'.
      reduction: of all parts that have one; '' takes it from them.

    Raises:
      ValueError: no part, no form of rows that all parts read, parts with different
        reductions, or parts that need different rollouts.
    """
    if not parts:
        raise ValueError("loss 'sum' has no parts: {name: {'weight': 1.0, ...}, ...}")
    requires: dict[str, Any] = {}
    forms: tuple[str, ...] = ()
    reductions = {}
    for label, (_, loss) in parts.items():
        shared = _shared(forms, loss.forms)
        if not shared and forms and loss.forms:
            raise ValueError(
                f"the parts of a sum read other rows: {label} reads "
                f"{' or '.join(loss.forms)}, those before it {' or '.join(forms)}"
            )
        forms = shared
        for key, value in loss.requires.items():
            # 'loss.n' is a hyper-parameter of the part
            own = value.replace("loss.", f"loss.{label}.") if isinstance(value, str) else value  # fmt: skip
            key = key.replace("loss.", f"loss.{label}.")
            if requires.setdefault(key, own) != own:
                raise ValueError(f"the parts of a sum need different values of {key}")
        if "reduction" in loss.hyper:
            reductions[label] = reduction or loss.hyper["reduction"]
    if len(set(reductions.values())) > 1:
        raise ValueError(
            f"the parts of a sum have different reductions, {reductions}: set "
            "loss.reduction to one for all"
        )

    def function(
        policy, batch, *, ema: Mapping[str, Any] = MappingProxyType({}), **hyper
    ):
        total: Any = 0.0
        metrics: Metrics = {}
        for label, (_, loss) in parts.items():
            own = {k: hyper[f"{label}.{k}"] for k in loss.hyper if k != "reduction"}
            if "reduction" in loss.hyper:
                own["reduction"] = hyper["reduction"]
            if loss.ema:
                own["ema"] = {k: ema[f"{label}/{k}"] for k in loss.ema}
            values, found = loss.function(policy, batch, **own)
            total = total + hyper[f"{label}.weight"] * values
            for k, v in {**found, "loss": values}.items():
                mean = k.removeprefix("ema/")  # what a running mean follows
                metrics[f"{label}/{k}" if mean == k else f"ema/{label}/{mean}"] = v
        return total, metrics

    hyper: dict[str, Any] = {}
    for label, (weight, loss) in parts.items():
        own = {k: v for k, v in loss.hyper.items() if k != "reduction"}
        hyper |= {f"{label}.weight": float(weight)}
        hyper |= {f"{label}.{k}": v for k, v in own.items()}
    if reductions:
        hyper["reduction"] = next(iter(reductions.values()))
    losses = [loss for _, loss in parts.values()]
    return Bound(
        "losses.sum", function, hyper,
        tuple(dict.fromkeys(n for loss in losses for n in loss.needs)), forms,
        any(loss.coupled for loss in losses),
        {f"{k}/{e}": v for k, (_, loss) in parts.items() for e, v in loss.ema.items()},
        requires=requires, role="loss",
    )  # fmt: skip


def compose(loss: Bound, weights: Sequence[Bound]) -> Bound:
    """A loss with reweightings, as one loss; they are applied in order, before the loss.

    Args:
      loss: of the folder losses/.
      weights: of the folder reweight/; their hyper-parameters become 'name.parameter'.

    Raises:
      ValueError: no form of rows is read by the loss and by all reweightings.
    """
    if not weights:
        return loss
    forms = loss.forms
    for w in weights:
        shared = _shared(forms, w.forms)
        if not shared and forms and w.forms:
            raise ValueError(
                f"{w.name} weighs {' or '.join(w.forms)}, but {loss.name} reads "
                f"{' or '.join(loss.forms)}: take another loss, or empty config.reweight"
            )
        forms = shared

    def function(policy, batch, **hyper):
        scale: Any = 1.0
        found: Metrics = {}
        for w in weights:
            own = {k: hyper.pop(f"{w.name}.{k}") for k in w.hyper}
            policy, batch, factor, *more = w.function(policy, batch, **own)
            scale = scale * factor
            found |= more[0] if more else {}
        values, metrics = loss.function(policy, batch, **hyper)
        return values * scale, metrics | {"weight": scale} | found

    hyper = {f"{w.name}.{k}": v for w in weights for k, v in w.hyper.items()}
    needs = dict.fromkeys(n for b in (loss, *weights) for n in b.needs)
    return loss._replace(
        function=function, hyper={**loss.hyper, **hyper}, needs=tuple(needs),
        forms=forms,
    )  # fmt: skip


def _shared(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    """The forms of rows that two plug-ins read; () of one of them is all forms."""
    return tuple(form for form in a or b if form in (b or a))


def _forms(name: str, module: Any) -> tuple[str, ...]:
    """The forms of rows that a module declares; ValueError for one that there is not."""
    declared = getattr(module, "FORMS", ())
    forms = (declared,) if isinstance(declared, str) else tuple(declared)
    if unknown := [f for f in forms if f not in FORMS]:
        raise ValueError(
            f"{name}: FORMS holds {unknown[0]!r}, expected some of {', '.join(FORMS)}"
        )
    return forms


def _number(name: str, key: str, value: Any, default: Any, interval: str | None) -> Any:
    """A number in its interval; a float where its default is one.

    Without an interval a number may not be negative unless its default is: a negative beta,
    weight or clip would train for the opposite.
    """
    interval = interval or ("(-inf, inf)" if default < 0 else "[0, inf)")
    if not is_inside(value, interval):
        raise ValueError(f"{name}: {key}={value!r} is outside {interval}")
    return float(value) if isinstance(default, float) else value


def is_inside(value: float, interval: str) -> bool:
    """Whether a number is in an interval, as in '[0, 0.5)'; NaN is in none."""
    low, high = map(float, interval[1:-1].split(","))
    try:
        value = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return bool(above and below)


def _find(folder: str, name: str):
    if folder not in ROLES:
        raise ValueError(
            f"unknown plug-in folder {folder!r}; known: {', '.join(ROLES)}"
        )
    roles = ROLES[folder]
    wanted = "() or ".join(roles)
    path = name if "." in name else f"alignax.{folder}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise  # the plug-in exists, but a module that it imports does not
        if "." in name:  # perhaps a function inside a module
            parent, _, attribute = path.rpartition(".")
            try:
                module = importlib.import_module(parent)
                role = attribute if attribute in roles else roles[0]
                return module, getattr(module, attribute), role
            except (ModuleNotFoundError, AttributeError):
                raise ValueError(
                    f"cannot import {name!r} (a module with {wanted}(), or a function)"
                ) from None
        names = available(folder)
        near = difflib.get_close_matches(name, names, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"unknown name {name!r} in {folder}{hint}; available: {', '.join(names)}"
        ) from None
    for role in roles:
        if hasattr(module, role):
            return module, getattr(module, role), role
    raise ValueError(f"{path} defines no {wanted}()")


# -- from the sections of a config


def load_section(folder: str, spec: Any) -> Bound:
    """Loads the plug-in of a config section: key 'name', other keys hyper-parameters."""
    spec = plain_section(spec)
    return load(folder, spec.pop("name"), spec)


def load_loss(config: Any) -> Bound:
    """The loss of a config with its reweightings; patterns in its needs are resolved.

    Raises:
      ValueError: as for `load`, or an unknown `reduction`.
    """
    weights = [
        load_section("reweight", {"name": name, **hyper})
        for name, hyper in config.reweight.items()
    ]
    found = plain_section(config.loss)
    summed = found.get("name") == SUM
    loss = compose(
        _load_sum(found) if summed else load_section("losses", found), weights
    )
    mode = loss.hyper.get("reduction", masked.MODES[0])
    if mode not in masked.MODES:
        raise ValueError(
            f"{loss.name}: reduction={mode!r} is not one of {', '.join(masked.MODES)}"
        )
    return loss._replace(needs=match_needs(loss.needs, list(config.lms)))


def _load_sum(spec: Mapping[str, Any]) -> Bound:
    """{'name': 'sum', 'parts': {loss: {'weight': ..., its hyper-parameters}}} as one loss.

    A part may have a 'name', if its label is another.
    """
    if unknown := sorted({*spec} - {"name", "parts", "reduction"}):
        raise ValueError(
            f"loss 'sum' has no hyper-parameter {unknown[0]!r}; it takes 'parts' and "
            "'reduction', and each part its own"
        )
    parts = {}
    for label, section in spec.get("parts", {}).items():
        own = dict(section)
        weight = own.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(
                f"loss.parts.{label}.weight is {weight!r}, expected a number"
            )
        try:
            loss = load("losses", own.pop("name", label), own)
            within = getattr(inspect.getmodule(loss.function), "RANGES", {}).get(
                "weight"
            )
            parts[label] = _number(loss.name, "weight", weight, 1.0, within), loss
        except ValueError as error:
            raise ValueError(f"loss.parts.{label}: {error}") from error
    return combine(parts, reduction=spec.get("reduction", ""))


def load_examples(spec: Any, drop: tuple[str, ...] = ()) -> Sequence[Example]:
    """The examples of a data section; the keys in `drop` are no hyper-parameters.

    What the section says on how its rows are read (READING) is in their attribute
    `reading`.
    """
    spec = {k: v for k, v in plain_section(spec).items() if k not in drop}
    how = {k: spec.pop(k) for k in READING if k in spec}
    examples = load("data", spec.pop("name"), spec)()
    return ReadAs(examples, how) if how else examples


class ReadAs(Sequence):
    """Examples that are read in a way of their own; other attributes are theirs."""

    def __init__(self, examples: Sequence[Example], reading: dict[str, Any]):
        self._examples, self.reading = examples, reading

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        found = self._examples[index]
        return ReadAs(found, self.reading) if isinstance(index, slice) else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._examples, name)


def plain_section(spec: Any) -> dict[str, Any]:
    """A section as nested plain dicts: plug-ins do not use ConfigDict."""
    return {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in spec.items()}


# -- the frozen LMs that fill the needs of a loss


def match_needs(needs: Sequence[str], lms: Sequence[str]) -> tuple[str, ...]:
    """Needs in which a pattern such as 'aligned*_logps' is replaced by one need per LM.

    A pattern that no LM matches is kept, and is then reported as missing.
    """
    columns = [f"{name}_logps" for name in lms]
    out: list[str] = []
    for need in needs:
        out += fnmatch.filter(columns, need) or [need]
    return tuple(dict.fromkeys(out))


def frozen_lm(need: str) -> str | None:
    """The name of the frozen LM that computes a need of a loss; None if none does."""
    if need in COMPARED:
        return "ref"
    name = need.removesuffix("_logps")
    return None if name == need or need in OF_BEHAVIOUR else name
