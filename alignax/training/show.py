"""The first rows of a config's data exactly as the model gets them; no weights are read.

Not shown: `reference_data`, which only the reference reads.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alignax import plugin
from alignax.batch import Example
from alignax.inputs import prompts, rows
from alignax.inputs.detokenize import marked
from alignax.reports import tables
from alignax.text import truncation
from alignax.text.dialogues import Prepared
from alignax.text.tokenizer import Tokenizer
from alignax.text.truncation import TooLong
from alignax.training import checks, loading
from alignax.training import stages as of_stages
from alignax.training.plugins import bind, has_rollouts


def show(config, many: int = 3, reasons: str | None = None) -> str:
    """Prompts and responses as text, the scored tokens marked, and what was cut and why.

    Args:
      config: a ConfigDict; its weights need not exist, its tokenizer has to.
      many: rows of each data section: data, or the parts of a mixture, eval_data, prompts.
      reasons: a file; all rows are read, counted, and written to it where something was
        cut, left out or is remarkable: JSON lines with section, id, kind and reason.

    Raises:
      ValueError, OSError: a config that cannot run, or data that cannot be read.
    """
    found: list[dict[str, str]] | None = None if reasons is None else []
    if config.get("stages"):
        stages = config.copy_and_resolve_references().stages
        of_stages.check(config.stages)
        shown = [
            f"== {name} ==\n{one_run(c, many, tokenizer_of(c, stages), found, name)}"
            for name, c in stages.items()
        ]
    else:
        shown = [one_run(config, many, tokenizer_of(config, {}), found)]
    if reasons is not None and found is not None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        pathlib.Path(reasons).write_text("".join(lines), encoding="utf-8")
        shown.append(f"\n{len(found)} reasons are in {reasons}")
    return "\n".join(shown)


def tokenizer_of(config, stages: Any) -> str:
    """The path of the tokenizer; that of 'stage:NAME' is the one that stage NAME reads."""
    *_, first = of_stages.lineage(config, stages)
    own = (c for c in of_stages.lineage(config, stages) if c.tokenizer)
    return loading.tokenizer_path(next(own, first))


def one_run(
    config, many: int, path: str, reasons: list[dict[str, str]] | None = None,
    stage: str = "",
) -> str:  # fmt: skip
    """The first rows of every data section of a run, by the tokenizer at `path`.

    With `reasons`, all rows are read: what happened to them is counted, and appended.
    """
    if many < 1:
        raise ValueError(f"rows is {many}, expected at least 1")
    checks.check_sections(config)
    plugins = bind(config)
    checks.check_data(config)
    checks.check_rollout(config, plugins)
    text = loading.load_tokenizer(config, path)
    lines = [
        f"tokenizer {path}, {text.vocab_size} ids; what is scored stands between ⟦ and ⟧"
    ]
    for name, spec, one, room in sections(config):
        examples = plugin.load_examples(spec, drop=("ratio",))
        if name == "eval_data" and len(examples) and not examples[0].responses:
            one, room = prompt_alone, sampled_room(config)
        own = text.for_data(examples)
        lines += section(name, examples, own, many, (one, room))
        if reasons is not None:
            counts = counted(examples, text, room, whole=one is not prompt_alone)
            lines.append(f"{name}: {tables.summary(counts)}")
            where = f"{stage}.{name}" if stage else name
            reasons += [{"section": where, **row} for row in counts["reasons"]]
    return "\n".join(lines)


Show = Callable[[Example, Tokenizer, int | None], list[str]]


def sections(config) -> Iterator[tuple[str, object, Show, int | None]]:
    """(name, spec, how one example is shown, tokens of a row) of every data section."""
    length = config.length
    trained: tuple[Show, int] = (with_responses, length)
    if has_rollouts(config):
        trained = (prompt_alone, sampled_room(config))
    if config.data:
        yield "data", config.data, *trained
    for part, spec in config.mixture.items():
        yield f"mixture.{part}", spec, *trained
    if config.eval_data:
        yield "eval_data", config.eval_data, with_responses, length
    if config.prompts:
        yield "prompts", config.prompts, prompt_alone, None


def sampled_room(config) -> int:
    """Tokens that a prompt may have, to which responses are sampled."""
    return config.length - (config.rollout.max_new if has_rollouts(config) else 0)


def counted(
    examples: Sequence[Example], text: Tokenizer, room: int | None, *, whole: bool
) -> dict[str, Any]:
    """What happens to every row: the counts of `rows.no_counts`, with all reasons."""
    counts = rows.no_counts(reasons=True)
    try:
        if whole:
            assert room is not None
            rows.read(examples, text, length=room, counts=counts)
        else:
            prompts.usable(examples, text, length=room or 2**30, counts=counts)
    except ValueError as error:  # no row is usable, say: the counts tell
        counts["notes"].setdefault("error", [1, str(error)])
    return counts


def section(
    name: str, examples: Sequence[Example], text: Tokenizer, many: int,
    one: tuple[Show, int | None],
) -> list[str]:  # fmt: skip
    """The first rows of one data section, and what the reader of the file left out."""
    show_one, room = one
    size = len(examples)
    lines = [f"\n{name}: {size} examples, the first {min(many, size)}:"]
    for kind, reasons in (getattr(examples, "report", None) or {}).items():
        if reasons:
            lines.append(f"  {len(reasons)} {kind}, left out; the first: {reasons[0]}")
    for i in range(min(many, size)):
        example = examples[i]
        lines.append(f"[{i}] {example.id}")
        try:
            lines += [f"  {line}" for line in show_one(example, text, room)]
        except TooLong as error:
            lines.append(f"  dropped: {error}")
        except ValueError as error:
            lines.append(f"  malformed, left out: {error}")
    return lines


def with_responses(example: Example, text: Tokenizer, length: int | None) -> list[str]:
    """A prompt and its responses, cut to `length` tokens as in training.

    Raises:
      ValueError: a row that is left out; TooLong: a row without room.
    """
    assert length is not None
    rows.check(example)
    prepared = Prepared(text.dialogues, example)
    whole = prepared.tokens()
    part = rows.cut(example, prepared, whole, text, length)
    lines = prompt_lines(whole.prompt, part.prompt, text, f"length={length}")
    for g, (ids, scored) in enumerate(zip(part.responses, part.scored, strict=True)):
        many, lost = len(ids), len(whole.responses[g]) - len(ids)
        line = f"response {g}: {many} tokens, {sum(scored)} scored"
        if example.feedback:
            line += f", feedback {float(example.feedback[g]):g}"
        if lost > 0:
            line += f"; the last {lost} of {many + lost} were cut: length={length}"
        lines += [line, f"  {marked(ids, scored, text)}"]
        if not any(scored):
            lines.append(f"  dropped: no room for a scored token at length {length}")
    return lines + [f"note: {name}: {details}" for name, details in whole.notes.items()]


def prompt_alone(example: Example, text: Tokenizer, room: int | None) -> list[str]:
    """A prompt to respond to, cut to `room` tokens; None cuts nothing.

    Raises:
      ValueError: a prompt that is left out; TooLong: one that is too long.
    """
    whole = text.prompt(example)
    if room is None:
        return prompt_lines(whole, whole, text, "")
    part, _, _ = truncation.fit_prompt(
        example, text.dialogues, room=room, rule=text.reading.truncate_prompts,
        bos_id=text.bos_id,
    )  # fmt: skip
    why = f"config.length less rollout.max_new leaves {room}"
    return prompt_lines(whole, part, text, why)


def prompt_lines(
    whole: list[int], part: list[int], text: Tokenizer, why: str
) -> list[str]:
    """A prompt as text, and how much of it was cut."""
    line, lost = f"prompt: {len(part)} tokens", len(whole) - len(part)
    if lost > 0:
        line += f"; {lost} of {len(whole)} were cut: {why}"
    return [line, f"  {text.decode(part, keep_specials=True)}"]
