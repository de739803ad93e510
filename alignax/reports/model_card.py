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
      metrics: from `evaluation`.
      peft: it is adapters for PEFT.
    """
    header = ["---", f"library_name: {'peft' if peft else 'transformers'}"]
    start = (config or {}).get("model", {}).get("path", "")
    if start.startswith(HUB):
        header.append(f"base_model: {start.removeprefix(HUB)}")
    loss = (config or {}).get("loss", {}).get("name", "")
    header += ["tags:", "- alignax", *([f"- {loss}"] if loss else []), "---"]
    parts = ["\n".join(header), f"# {name}", _how(config, loss, facts.get("step"))]
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
