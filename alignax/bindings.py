"""What binds a config's names to plug-ins: to losses, shapings, evaluations and data."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from alignax import logprob, masked, plugin
from alignax.batch import Example


def bind(config, folder: str, spec: Any) -> plugin.Bound:
    """Loads the plug-in that a config section names; the other keys are its own."""
    spec = inner_dicts(spec)
    return plugin.load(folder, spec.pop("name"), spec)


def bind_loss(config) -> plugin.Bound:
    """The loss of a config, under its reweightings; what it needs, from which LMs."""
    weights = [
        bind(config, "reweight", {"name": name, **hyper})
        for name, hyper in config.reweight.items()
    ]
    loss = plugin.compose(bind(config, "losses", config.loss), weights)
    mode = loss.hyper.get("reduction", masked.MODES[0])
    if mode not in masked.MODES:
        raise ValueError(
            f"{loss.name}: reduction={mode!r} is not one of {', '.join(masked.MODES)}"
        )
    return loss._replace(needs=matched(loss.needs, list(config.lms)))


def matched(needs: Sequence[str], lms: Sequence[str]) -> tuple[str, ...]:
    """Needs with one for each LM in the place of a pattern: 'aligned*_logps'.

    A pattern that no LM matches stays, and is missing like any other need.
    """
    columns = [f"{name}_logps" for name in lms]
    out: list[str] = []
    for need in needs:
        out += fnmatch.filter(columns, need) or [need]
    return tuple(dict.fromkeys(out))


def frozen(need: str) -> str | None:
    """The name of the frozen LM that fills a need of a loss; None if none does."""
    if need in logprob.COMPARED:
        return "ref"
    name = need.removesuffix("_logps")
    return None if name in (need, "old") else name


def load_examples(spec: Any, drop: tuple[str, ...] = ()) -> Sequence[Example]:
    """The examples that a data section describes."""
    spec = {k: v for k, v in inner_dicts(spec).items() if k not in drop}
    return plugin.load("data", spec.pop("name"), spec)()


def inner_dicts(spec) -> dict[str, Any]:
    """A section as plain dicts, also inside: plug-ins know nothing of ConfigDict."""
    return {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in spec.items()}
