"""The README.md of an exported model: what it is made of, how it was trained, its metrics."""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import yaml

from alignax.reports import tables

HUB = "hf:"  # in front of a name on the Hugging Face hub
# What holds for a model that was made of another one, of the header of its card.
CARRIED = ("license", "license_name", "license_link", "language")
LONGEST = 500  # characters of a value, and values of a list


def card(
    name: str, config: Mapping[str, Any] | None, facts: Mapping[str, Any],
    metrics: Mapping[str, float], *, peft: bool = False,
    source: Mapping[str, Any] = MappingProxyType({}),
) -> str:  # fmt: skip
    """A model card in Markdown, with the header that the Hugging Face hub reads.

    Args:
      name: of the model.
      config: of its run; None for a model that no run made.
      facts: more lines, such as {'step': 100, 'data': digest of the rows}.
      metrics: from `evaluation`.
      peft: it is adapters for PEFT.
      source: keys of the header that come from the model it was made of: those of
        `inherited`, and its name as 'base_model'.
    """
    header: dict[str, Any] = {"library_name": "peft" if peft else "transformers"}
    header |= source
    start = (config or {}).get("model", {}).get("path", "")
    if start.startswith(HUB):
        header["base_model"] = start.removeprefix(HUB)
    loss = (config or {}).get("loss", {}).get("name", "")
    header["tags"] = ["alignax", *([loss] if loss else [])]
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=LONGEST)
    parts = [f"---\n{text}---", f"# {name}", _how(config, loss, facts.get("step"))]
    lines = [f"- {key}: {value}" for key, value in facts.items() if value != ""]
    parts += ["\n".join(lines)] if lines else []
    if metrics:
        step = int(metrics["step"])
        rest = {k: v for k, v in metrics.items() if k != "step"}
        parts += [
            f"## Evaluation at step {step}",
            f"```text\n{tables.table(rest)}\n```",
        ]
    if config:
        text = json.dumps(config, indent=2, default=str)
        parts += ["## Config", f"```json\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def inherited(text: str) -> dict[str, Any]:
    """The keys of CARRIED in the header of a model card, where they are text or lists of it.

    Args:
      text: the README.md of a model; without a header, or with a damaged one, nothing is
        found.

    Returns:
      {key: text or list of texts}.
    """
    found = re.match(r"---[ \t]*\r?\n(.*?)\n---[ \t]*\r?(\n|$)", text, re.DOTALL)
    if not found:
        return {}
    try:  # this loader makes texts of all values: 'no' is a language
        header = yaml.load(found[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(header, dict):
        return {}
    return {key: header[key] for key in CARRIED if _fits(header.get(key))}


def _fits(value: Any) -> bool:
    """Whether a value is a text, or a list of texts."""
    if isinstance(value, list):
        return 0 < len(value) <= LONGEST and all(
            isinstance(x, str) and _fits(x) for x in value
        )
    return isinstance(value, str) and 0 < len(value) <= LONGEST


def _how(config: Mapping[str, Any] | None, loss: str, step: Any) -> str:
    """One sentence: how it was made."""
    if not config:
        return "Written by alignax, which did not train it."
    if not config.get("num_steps") or not step:
        return "Written by alignax."
    adapters = config.get("lora", {}).get("rank")
    how = f"LoRA adapters of rank {adapters}" if adapters else "all weights"
    return (
        f"Trained with alignax: loss `{loss}`, step {step} of {config['num_steps']} with "
        f"{config['batch_size']} prompts each, {how}."
    )


def evaluation(rows: list[dict[str, float]], step: Any) -> dict[str, float]:
    """The metrics of the evaluation at a step, and 'step'; {} without one.

    Args:
      rows: the lines of metrics.jsonl.
      step: of the parameters.
    """
    found = {
        k: v
        for row in rows
        if row["step"] == step
        for k, v in row.items()
        if k.startswith("eval/")
    }
    return {"step": float(step), **found} if found else {}
