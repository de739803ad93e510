"""The first rows of a config's data exactly as the model gets them; no weights are read.

Not shown: `reference_data`, which only the reference reads, and the cut of prompts by
evaluations that sample.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alignax import plugin
from alignax.batch import Example
from alignax.inputs import rows as cutting
from alignax.inputs.detokenize import marked
from alignax.inputs.tokenizer import Tokenizer
from alignax.runs import model_paths
from alignax.training import checks, loading
from alignax.training.plugins import bind


def show(config, rows: int = 3) -> str:
    """Prompts and responses as text, the scored tokens marked, and what was cut and why.

    Args:
      config: a ConfigDict; its weights need not exist, its tokenizer has to.
      rows: of each data section: data, or the parts of a mixture, eval_data, prompts.

    Raises:
      ValueError, OSError: a config that cannot run, or data that cannot be read.
    """
    if config.get("stages"):
        stages = config.copy_and_resolve_references().stages
        return "\n".join(
            f"== {name} ==\n{one_run(c, rows, tokenizer_of(c, stages))}"
            for name, c in stages.items()
        )
    return one_run(config, rows, tokenizer_of(config, {}))


def tokenizer_of(config, stages: Any) -> str:
    """The path of the tokenizer; that of 'stage:NAME' is the one that stage NAME reads."""
    while not config.tokenizer and config.model.path.startswith(model_paths.STAGE):
        config = stages[config.model.path.removeprefix(model_paths.STAGE)]
    return loading.tokenizer_path(config)


def one_run(config, rows: int, path: str) -> str:
    """The first rows of every data section of a run, by the tokenizer at `path`."""
    if rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1")
    checks.check_names(config)
    plugins = bind(config)
    checks.check_data(config)
    checks.check_rollout(config, plugins)
    text = loading.load_tokenizer(config, path)
    lines = [
        f"tokenizer {path}, {text.vocab_size} ids; what is scored stands between ⟦ and ⟧"
    ]
    for name, spec, one in sections(config):
        examples = plugin.load_examples(spec, drop=("ratio",))
        lines += section(name, examples, text, rows, one)
    return "\n".join(lines)


Show = Callable[[Example, Tokenizer], list[str]]


def sections(config) -> Iterator[tuple[str, object, Show]]:
    """(name, spec, how one example is shown) of every data section."""
    length = config.length

    def whole(example: Example, text: Tokenizer) -> list[str]:
        return with_responses(example, text, length)

    def prompt(example: Example, text: Tokenizer) -> list[str]:
        room = length - config.rollout.max_new
        why = f"config.length={length} less rollout.max_new={config.rollout.max_new}"
        return prompt_alone(example, text, room, why)

    def asked(example: Example, text: Tokenizer) -> list[str]:
        return prompt_alone(example, text, None, "")

    trains = prompt if config.rollout.reward else whole
    if config.data:
        yield "data", config.data, trains
    for part, spec in config.mixture.items():
        yield f"mixture.{part}", spec, trains
    if config.eval_data:
        yield "eval_data", config.eval_data, whole
    if config.prompts:
        yield "prompts", config.prompts, asked


def section(
    name: str, examples: Sequence[Example], text: Tokenizer, rows: int, one: Show
) -> list[str]:
    """The first rows of one data section, and what the reader of the file left out."""
    size = len(examples)
    lines = [f"\n{name}: {size} examples, the first {min(rows, size)}:"]
    for kind, reasons in (getattr(examples, "report", None) or {}).items():
        if reasons:
            lines.append(f"  {len(reasons)} {kind}, left out; the first: {reasons[0]}")
    for i in range(min(rows, size)):
        example = examples[i]
        lines.append(f"[{i}] {example.id}")
        try:
            lines += [f"  {line}" for line in one(example, text)]
        except ValueError as error:
            lines.append(f"  malformed, left out: {error}")
    return lines


def with_responses(example: Example, text: Tokenizer, length: int) -> list[str]:
    """A prompt and its responses, cut to `length` tokens as in training."""
    whole = cutting.tokenize(example, text)
    part, _ = cutting.cut(whole, length, text.bos_id)
    lines = prompt_lines(whole.prompt_ids, part.prompt_ids, text, f"length={length}")
    for g, (ids, scored) in enumerate(zip(part.responses, part.scored, strict=True)):
        many, lost = len(ids), len(whole.responses[g]) - len(ids)
        line = f"response {g}: {many} tokens, {sum(scored)} scored"
        if example.feedback:
            line += f", feedback {float(example.feedback[g]):g}"
        if lost:
            line += f"; the last {lost} of {many + lost} were cut: length={length}"
        lines += [line, f"  {marked(ids, scored, text)}"]
        if not any(scored):
            lines.append(f"  dropped: no response left at length {length}")
    return lines


def prompt_alone(
    example: Example, text: Tokenizer, room: int | None, why: str
) -> list[str]:
    """A prompt to respond to, cut to `room` tokens; None cuts nothing."""
    whole = text.prompt(example)
    part = whole if room is None else cutting.cut_prompt(whole, room, text.bos_id)
    return prompt_lines(whole, part, text, why)


def prompt_lines(
    whole: list[int], part: list[int], text: Tokenizer, why: str
) -> list[str]:
    """A prompt as text, and how much of its left end was cut."""
    line, lost = f"prompt: {len(part)} tokens", len(whole) - len(part)
    if lost:
        line += f"; {lost} of {len(whole)} were cut on the left: {why}"
    return [line, f"  {text.decode(part, keep_specials=True)}"]
