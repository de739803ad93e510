"""The README.md of an exported model: what it is made of, how it was trained, its metrics."""

import json
from collections.abc import Mapping
from typing import Any

from alignax.reports import tables

HUB = "hf:"  # in front of a name on the Hugging Face hub


def card(
    name: str, config: Mapping[str, Any] | None, facts: Mapping[str, Any],
    metrics: Mapping[str, float], *, peft: bool = False,
) -> str:  # fmt: skip
    """A model card in Markdown, with the header that the Hugging Face hub reads.

    Args:
      name: of the model.
      config: of its run; None for a model that no run made.
      facts: more lines, such as {'step': 100, 'data': digest of the rows}.
      metrics: of the last evaluation, from `last_evaluation`.
      peft: it is adapters for PEFT.
    """
    header = ["---", f"library_name: {'peft' if peft else 'transformers'}"]
    start = (config or {}).get("model", {}).get("path", "")
    if start.startswith(HUB):
        header.append(f"base_model: {start.removeprefix(HUB)}")
    loss = (config or {}).get("loss", {}).get("name", "")
    header += ["tags:", "- alignax", *([f"- {loss}"] if loss else []), "---"]
    parts = ["\n".join(header), f"# {name}", _how(config, loss)]
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


def _how(config: Mapping[str, Any] | None, loss: str) -> str:
    """One sentence: how it was made."""
    if not config:
        return "Written by alignax, which did not train it."
    if not config.get("num_steps"):
        return "Written by alignax."
    adapters = config.get("lora", {}).get("rank")
    how = f"LoRA adapters of rank {adapters}" if adapters else "all weights"
    return (
        f"Trained with alignax: loss `{loss}`, {config['num_steps']} steps of "
        f"{config['batch_size']} prompts, {how}."
    )


def last_evaluation(rows: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of the last step that was evaluated, and 'step'; {} without one.

    Args:
      rows: the lines of metrics.jsonl.
    """
    found: dict[str, float] = {}
    for row in rows:
        new = {k: v for k, v in row.items() if k.startswith("eval/")}
        if new and row["step"] != found.get("step"):
            found = {"step": row["step"]}
        found |= new
    return found
