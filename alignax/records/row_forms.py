"""Forms of rows: what the keys of a row say it is. `data/README.md` has a table of them.

Every function here takes what it reads out of the row; what is left becomes the columns of
the example, so that nothing of a row is lost.

Source: forms of https://huggingface.co/docs/trl/dataset_formats (prompt, chosen, rejected,
completion, label, messages), https://github.com/tatsu-lab/stanford_alpaca (instruction,
input, output), https://github.com/lm-sys/FastChat (conversations),
https://github.com/OpenBMB/UltraFeedback (completions), https://github.com/anthropics/hh-rlhf
and https://platform.openai.com/docs/guides/fine-tuning (preferred_output)
"""

import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from alignax.batch import Example, Message
from alignax.records import messages, values
from alignax.records.messages import Turns
from alignax.records.values import brief, number

Row = dict[str, Any]

DIALOGUES = ("messages", "conversations", "conversation")
ANSWERS = ("response", "completion")
LABELS = ("label", "kto_tag")
SCORES = (  # of chosen and rejected
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"), ("chosen_rating", "rejected_rating"),
)  # fmt: skip
SYSTEMS = ("system", "system_prompt")
RESPONSES = ("response", "completion", "text", "content")
RATINGS = ("overall_score", "fine-grained_score", "score", "rating")
PREFERENCE = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
TEMPLATE = ("tools", "functions", "documents", "chat_template_kwargs")
KEYS = (
    "id", "prompt", "chosen", "rejected", "responses", "scores", "completions",
    "instruction", "input", "output", "history", *ANSWERS, *LABELS, *DIALOGUES,
    *SYSTEMS, *TEMPLATE, *PREFERENCE, *(key for pair in SCORES for key in pair),
)  # fmt: skip
_LISTED = frozenset(DIALOGUES)
_VARIABLES = frozenset(TEMPLATE)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Dropped(ValueError):
    """A row that can be read, but that has no use as it is."""


def parse(name: str, row: Any, names: Mapping[str, str] | None = None) -> Example:
    """One row as an Example.

    Args:
      name: the id it gets if it has none, e.g. 'train.jsonl:17'.
      row: what the file holds.
      names: key in the file -> key that is read here.

    Returns:
      The example; its columns hold all keys of the row that are in no other field.

    Raises:
      ValueError: says what is wrong with the row; `Dropped` if nothing is, and it has no
        use all the same.
    """
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    rest = {k: v for k, v in row.items() if v is not None}
    for key, ours in (names or {}).items():
        if key in rest:
            if ours in rest:
                raise ValueError(f"'{key}' is read as '{ours}', but that is there too")
            rest[ours] = rest.pop(key)
    own = rest.get("id")
    named = own is not None and isinstance(own, str | int) and own != ""
    if named and not isinstance(own, bool):
        name = str(rest.pop("id"))
    if not PREFERENCE.keys().isdisjoint(rest):
        _preference(rest)
    template = {} if _VARIABLES.isdisjoint(rest) else _template(rest)
    prompt, responses, feedback, form = _form(rest)
    if responses and all(map(messages.empty, responses)):
        raise ValueError("an empty assistant turn is all there is to learn from")
    columns = values.columns(rest) if rest else {}
    return Example(name, prompt, responses, feedback, columns, form, template)


def known(names: Mapping[str, str]) -> None:
    """Raises ValueError for a key of ours that is almost, but not, one that is read."""
    for key, ours in names.items():
        near = difflib.get_close_matches(ours, KEYS, 1, 0.8)
        if near and ours not in KEYS:
            raise ValueError(
                f"columns: {key!r} is read as {ours!r}, which means nothing (did you "
                f"mean {near[0]!r}?)"
            )


def hh_turns(dialogue: str) -> list[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", contents stripped of blanks.

    Raises:
      ValueError: the text does not start with a turn.
    """
    pieces = _TURN.split(dialogue)
    if pieces[0].strip() or len(pieces) < 3:
        raise ValueError(f"not a dialogue: {dialogue[:40]!r}")
    pairs = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in pairs]


Side = tuple[str, Any]  # a key of a row, and a response under it
Found = tuple[Turns, list[Turns], tuple[float, ...], str]  # fields of an Example


def _form(rest: Row) -> Found:
    """(prompt, responses, feedback, form) of a row."""
    if "chosen" in rest or "rejected" in rest:
        return _pair(rest)
    several = isinstance(rest.get("responses"), list)
    rated = _objects(rest.get("completions"), RESPONSES)
    single = next((k for k in ANSWERS if k in rest), None)
    key = _dialogue_key(rest)
    if key and not ((several or rated or single) and _asks(rest[key])):
        return _dialogue(rest, key)
    alpaca = key is None and "prompt" not in rest
    if alpaca and not several and not rated and single is None and "output" in rest:
        single = "output"
    prompt = _prompt(rest)
    if "responses" in rest:
        return _group(rest, prompt)
    if rated:
        return _rated(rest, prompt)
    if single is None:
        return prompt, [], (), ""
    responses, prompt = _answers([(single, rest.pop(single))], prompt)
    return prompt, responses, _label(rest), ""


def _dialogue_key(rest: Row) -> str | None:
    """The key of a dialogue: 'messages', or another whose list holds messages.

    Beside a prompt only 'messages' are one: elsewhere the other keys mean other things.
    """
    if _LISTED.isdisjoint(rest):
        return None
    if isinstance(rest.get("messages"), list):
        return "messages"
    others = () if "prompt" in rest else DIALOGUES[1:]
    found = (k for k in others if _objects(rest.get(k), ("role", "from")))
    return next(found, "messages" if "messages" in rest else None)


def _objects(value: Any, keys: Sequence[str]) -> bool:
    """Whether a value is a list of objects that have one of `keys`."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and any(k in m for k in keys) for m in value)
    )


def _asks(value: Any) -> bool:
    """Whether a dialogue waits for an answer, so that it is a prompt."""
    last = value[-1] if isinstance(value, list) and value else None
    if not isinstance(last, dict):
        return False
    role = last.get("role", last.get("from"))
    return messages.SPEAKERS.get(str(role).lower(), role) != "assistant"


# -- prompts


def _prompt(rest: Row) -> Turns:
    """The prompt of a row, with its system turn and the turns before it."""
    if "prompt" in rest:
        found = messages.turns("prompt", rest.pop("prompt"))
    elif text := _instruction(rest):
        found = text
    elif key := _dialogue_key(rest):
        found = messages.turns(key, rest.pop(key))
    else:
        raise ValueError(
            f"'prompt' is missing; the row has {sorted(map(str, rest))} (columns="
            "{'question': 'prompt'} gives keys other names)"
        )
    return _with_system(rest, found)


def _instruction(rest: Row) -> Turns | None:
    """Alpaca's instruction and input, after the exchanges of its history."""
    parts = []
    for key in ("instruction", "input"):
        if isinstance(rest.get(key), str):
            text = rest.pop(key)
            parts += [text] if text.strip() else []
        elif key == "instruction" and key in rest:
            raise ValueError(f"'{key}' is {brief(rest[key])}, expected text")
    if not parts:
        return None
    asked = "\n\n".join(parts)
    history = rest.pop("history", None)
    if not history:
        return asked
    found: list[Message] = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or [type(x) for x in pair] != [str, str]:
            raise ValueError(
                f"'history' holds {brief(pair)}, expected pairs of question and answer"
            )
        found += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    return [*found, {"role": "user", "content": asked}]


def _with_system(rest: Row, found: Turns) -> Turns:
    """A prompt after the row's own system turn, unless it begins with the same one."""
    key = next((k for k in SYSTEMS if isinstance(rest.get(k), str)), None)
    if key is None:
        return found
    text = rest.pop(key)
    if not text.strip():
        return found
    listed = [{"role": "user", "content": found}] if isinstance(found, str) else found
    if listed[0]["role"] in ("system", "developer"):
        if messages.text(listed[0]) != text:
            raise ValueError(f"'{key}' is not the system turn that the prompt has")
        return listed
    return [{"role": "system", "content": text}, *listed]


# -- responses


def _dialogue(rest: Row, key: str) -> Found:
    """Every assistant turn is a response to what is before the first one."""
    turns = messages.turns(key, rest.pop(key))
    if isinstance(turns, str):
        raise ValueError(f"'{key}' is a string, expected a list of messages")
    at = [i for i, m in enumerate(turns) if m["role"] == "assistant"]
    if not at:
        raise ValueError(f"'{key}' has no assistant turn{_roles(turns)}")
    if at[0] == 0:
        raise ValueError(f"'{key}' starts with an assistant turn, so it has no prompt")
    if left := turns[at[-1] + 1 :]:
        rest[f"{key}_after"] = left
    if any(
        m["role"] == "user" and messages.text(m) == rest.get("prompt") for m in turns
    ):
        del rest["prompt"]
    prompt = _with_system(rest, turns[: at[0]])
    labelled = any(rest.get(k) in (0, 1) for k in LABELS)  # else it is another label
    feedback = _label(rest) if labelled else ()
    return prompt, [turns[at[0] : at[-1] + 1]], feedback, ""


def _label(rest: Row) -> tuple[float, ...]:
    key = next((k for k in LABELS if k in rest), None)
    return () if key is None else (number(key, rest.pop(key)),)


def _group(rest: Row, prompt: Turns) -> Found:
    responses, scores = rest.pop("responses"), rest.pop("scores", None)
    if not isinstance(responses, list) or not responses:
        raise ValueError("'responses' is empty, or no list")
    answers, prompt = _answers([("response", r) for r in responses], prompt)
    if scores is None:
        return prompt, answers, (), ""
    good = isinstance(scores, list) and len(scores) == len(answers)
    if not good or any(isinstance(x, bool) for x in scores):
        raise ValueError(
            f"'scores' is {brief(scores)}, expected {len(answers)} numbers"
        )
    try:
        found = tuple(number("scores", x) for x in scores)
    except ValueError as e:
        raise ValueError(f"{e} (expected {len(answers)} numbers)") from None
    return prompt, answers, found, "groups" if len(answers) > 1 else ""


def _rated(rest: Row, prompt: Turns) -> Found:
    """Completions that are objects of a response, its score and more."""
    sides, scores, left = [], [], []
    for item in rest.pop("completions"):
        item = {k: v for k, v in item.items() if v is not None}
        key = next((k for k in RESPONSES if k in item), RESPONSES[0])
        if key not in item:
            raise ValueError("'completions' holds a response that is null")
        sides.append((key, item.pop(key)))
        if rating := next((k for k in RATINGS if k in item), None):
            scores.append(number(rating, item.pop(rating)))
        left.append(item)
    if not sides or len(scores) not in (0, len(sides)):
        raise ValueError(
            f"'completions' has {len(scores)} scores of {len(sides)} responses"
        )
    answers, prompt = _answers(sides, prompt)
    if any(left):
        rest["completions"] = left
    return prompt, answers, tuple(scores), "groups" if len(scores) > 1 else ""


def _pair(rest: Row) -> Found:
    for key in ("chosen", "rejected"):
        if key not in rest:
            raise ValueError(
                f"'{key}' is missing; the row has {sorted(map(str, rest))}"
            )
    sides = _sides(rest)
    dialogue = _dialogue_key(rest)
    asked = "prompt" not in rest and any(
        isinstance(rest.get(k), str) for k in ("instruction", "input")
    )
    if "prompt" in rest or (asked and not all(_starts(side) for _, side in sides)):
        found, prompt = _answers(sides, _prompt(rest))
        if dialogue:
            _forget_repeated(rest, dialogue, prompt, found)
    else:
        found, prompt = _without_prompt(rest, sides, dialogue)
    chosen, *others = found
    if any(messages.identical(chosen, rejected) for rejected in others):
        raise ValueError("chosen and rejected are identical")
    if len(others) > 1:
        return prompt, found, (1.0, *[0.0] * len(others)), "groups"
    (rejected,) = others
    scored = (pair for pair in SCORES if all(k in rest for k in pair))
    keys = next(scored, None) if rest else None
    if keys is None:
        return prompt, [chosen, rejected], (1.0, 0.0), ""
    better, worse = (number(k, rest.pop(k)) for k in keys)
    if better < worse:
        raise Dropped(f"chosen is scored {better:g}, below rejected with {worse:g}")
    return prompt, [chosen, rejected], (better, worse), "pairs"


def _sides(rest: Row) -> list[Side]:
    """The chosen side of a pair and its rejected one, or several of these.

    A side may be a list of responses, each a text or a list of messages.
    """
    found: dict[str, list[Any]] = {}
    for key in ("chosen", "rejected"):
        value = rest.pop(key)
        several = isinstance(value, list) and value and _responses(value)
        found[key] = value if several else [value]
    if len(found["chosen"]) > 1:
        raise ValueError(
            f"'chosen' holds {len(found['chosen'])} responses, expected one (rows with "
            "several correct ones, as in the subset Ties of RewardBench 2, are not read)"
        )
    return [(key, value) for key, values in found.items() for value in values]


def _responses(value: Sequence[Any]) -> bool:
    """Whether a list holds responses, and not the messages of one."""
    return all(isinstance(x, str | list) for x in value)


def _starts(side: Any) -> bool:
    """Whether a side begins with a turn that is no answer."""
    return isinstance(side, list) and bool(side) and _asks(side[:1])


def _without_prompt(
    rest: Row, sides: Sequence[Side], dialogue: str | None
) -> tuple[list[Turns], Turns]:
    """(sides, prompt) of a pair whose prompt is what both begin with, or a dialogue."""
    read = [messages.turns(key, value) for key, value in sides]
    if not dialogue and all(isinstance(side, str) for side in read):
        read = [_hh(key, text) for key, text in sides]
    if shared := min(_shared(read[0], side) for side in read[1:]):
        prompt = _with_system(rest, read[0][:shared])
        found = [side[shared:] for side in read]
        for (key, _), side in zip(sides, found, strict=True):
            _check_answered(key, side)
        if dialogue:
            _forget_repeated(rest, dialogue, prompt, found)
        return found, prompt
    if dialogue is None:
        raise ValueError("'prompt' is missing and chosen and rejected share no turn")
    before = messages.turns(dialogue, rest.pop(dialogue))
    if not isinstance(before, str):
        asked = [i for i, m in enumerate(before) if m["role"] != "assistant"]
        ended = before[asked[-1] + 1 :] if asked else []
        if ended and any(messages.identical(ended, side) for side in read):
            before = before[: asked[-1] + 1]
    return _answers(sides, _with_system(rest, before))


def _shared(a: Turns, b: Turns) -> int:
    """How many turns both sides begin with."""
    if isinstance(a, str) or isinstance(b, str):
        return 0
    both = list(zip(a, b, strict=False))
    for i, (x, y) in enumerate(both):
        if not messages.identical([x], [y]):
            return i
    raise ValueError("chosen and rejected are identical, or one begins the other")


def _hh(key: str, dialogue: str) -> list[Message]:
    """The turns of a side in one string, of which the last is an answer."""
    hint = "(dialogues in one string, '\\n\\nHuman: ...', are what data.hh_rlhf reads)"
    if not _TURN.match(dialogue):
        raise ValueError(f"'prompt' is missing {hint}")
    turns = hh_turns(dialogue)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError(f"'{key}' does not end in an answer {hint}")
    if not turns[-1]["content"]:
        raise ValueError(f"'{key}' is empty in its last turn")
    return turns


def _answers(sides: Sequence[Side], prompt: Turns) -> tuple[list[Turns], Turns]:
    """(responses, prompt), where responses may repeat the prompt in front.

    A prompt in one string may be the user turn of responses that are lists, and a system
    turn may stand in front of it, which then belongs to the prompt.
    """
    found = [messages.turns(key, value) for key, value in sides]
    lists = {
        i: turns
        for i, turns in enumerate(found)
        if not isinstance(turns, str) and turns[0]["role"] != "assistant"
    }
    if lists:
        before = _listed(prompt)
        ends = {i: _repeated(before, turns) for i, turns in lists.items()}
        longest = max(lists, key=lambda i: ends[i])
        if ends[longest] > len(before):
            prompt = before = lists[longest][: ends[longest]]
        for i, end in ends.items():
            if end and not _begins(before[len(before) - end :], lists[i][:end]):
                raise ValueError(
                    f"'{sides[i][0]}' begins with other turns than another response"
                )
            found[i] = lists[i][end:]
    for (key, _), turns in zip(sides, found, strict=True):
        _check_answered(key, turns)
    return found, prompt


def _listed(turns: Turns) -> list[Message]:
    """A prompt as messages: a string is one user turn."""
    return [{"role": "user", "content": turns}] if isinstance(turns, str) else turns


def _check_answered(key: str, turns: Turns) -> None:
    """Raises ValueError for a response without an assistant turn."""
    if isinstance(turns, str) or (turns and turns[-1]["role"] == "assistant"):
        return
    if not any(m["role"] == "assistant" for m in turns):
        raise ValueError(f"'{key}' has no assistant turn{_roles(turns)}")


def _roles(turns: Sequence[Message]) -> str:
    """The roles of turns, for a message."""
    found = ", ".join(dict.fromkeys(repr(m["role"]) for m in turns))
    return f"; its roles are {found}" if found else ""


def _repeated(before: Sequence[Message], turns: Sequence[Message]) -> int:
    """How many of the turns are the prompt again; 0 if they do not repeat it.

    Args:
      before: the prompt.
      turns: of a response; an assistant turn does not begin it.
    """
    for i in range(len(turns) - len(before) + 1):
        if _begins(turns[i:], before):
            return i + len(before)
    leading = (m["role"] in ("system", "developer") for m in before)
    asked = before[sum(itertools.takewhile(bool, leading)) :]
    return len(asked) if _begins(turns, asked) else 0


def _begins(turns: Sequence[Message], before: Sequence[Message]) -> bool:
    pairs = zip(turns, before, strict=False)
    whole = len(turns) >= len(before) > 0
    return whole and all(messages.repeats(a, b) for a, b in pairs)


def _forget_repeated(
    rest: Row, key: str, prompt: Turns, sides: Sequence[Turns]
) -> None:
    """Takes a dialogue out of the row if it is the prompt, or a side of the pair."""
    try:
        turns = messages.turns(key, rest[key])
    except ValueError:  # of another meaning
        return
    if isinstance(turns, str):
        return
    for side in sides:
        answer = (
            [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        )
        full = [*_listed(prompt), *answer]
        # the prompt may have a system turn that the dialogue lacks
        if _begins(full, turns) or _begins(full[1:], turns):
            del rest[key]
            return


# -- further parts of a row


def _template(rest: Row) -> dict[str, Any]:
    """What the row's chat template gets: tools, documents, and its own keywords."""
    found: dict[str, Any] = {}
    kinds = {"tools": list, "functions": list, "documents": list, "chat_template_kwargs": dict}  # fmt: skip
    for key, kind in kinds.items():
        value = _json(rest[key]) if key in rest else None
        if value is None or value == "":
            rest.pop(key, None)
            continue
        if not isinstance(value, kind):
            text = isinstance(value, str) and not value.lstrip().startswith(("[", "{"))
            if key != "chat_template_kwargs" and (text or key != "tools"):
                continue  # of another meaning
            what = "a list" if kind is list else "an object"
            raise ValueError(f"'{key}' is {brief(value)}, expected {what}, or its JSON")
        rest.pop(key)
        if key == "chat_template_kwargs":
            own = {k: v for k, v in value.items() if v is not None}
            if twice := sorted(found.keys() & own.keys()):
                raise ValueError(f"'{twice[0]}' is there twice, also in '{key}'")
            found |= own
        elif key == "functions":
            listed = [{"type": "function", "function": f} for f in value]
            found["tools"] = [*found.get("tools", []), *listed]
        elif value:
            found[key] = value
    return found


def _json(value: Any) -> Any:
    """The value of a text of JSON; another text as it is."""
    if not isinstance(value, str) or not value.strip():
        return "" if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _preference(rest: Row) -> None:
    """OpenAI's form of a pair, as one of ours."""
    asked = rest.get("input")
    if isinstance(asked, dict):
        del rest["input"]
        for key, value in asked.items():
            ours = "prompt" if key == "messages" else key
            if value is not None and ours in rest:
                raise ValueError(f"'input.{key}' is there twice")
            if value is not None:
                rest[ours] = value
    for key, ours in PREFERENCE.items():
        if key in rest and ours not in rest:
            rest[ours] = rest.pop(key)
