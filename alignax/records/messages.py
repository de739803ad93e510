"""One turn of a dialogue: the keys that files give it, and which turns are the same.

Source: messages as chat templates read them,
https://huggingface.co/docs/transformers/chat_templating; ShareGPT's 'from' and 'value', and
the 'function_call' of https://platform.openai.com/docs/guides/function-calling are rewritten
"""

import json
from collections.abc import Sequence
from typing import Any

from alignax.batch import Message
from alignax.records.values import brief

Turns = str | list[Message]

SPEAKERS = {  # of ShareGPT -> role
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "bot": "assistant",
    "assistant": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "function": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
UNREAD = ("role", "content", "weight", "train")  # what no text of a turn depends on


def turns(key: str, value: Any) -> Turns:
    """What stands under a key, as text or as messages; one message is a list of one.

    Raises:
      ValueError: no text, an empty text, or a message that is none: says which.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"'{key}' is empty")
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"'{key}' is {brief(value)}, expected text or a list of messages"
        )
    return [message(key, m) for m in value]


def message(key: str, value: Any) -> Message:
    """A message with all its keys, of which null ones are left out.

    Its content is text or parts of text; where it calls tools it may be None, and is ""
    where the file has no such key.

    Raises:
      ValueError: no role, content that is not text, or no content; names `key`.
    """
    if not isinstance(value, dict):
        raise ValueError(f"'{key}' holds {brief(value)}, expected role and content")
    usual = len(value) == 2 and isinstance(value.get("role"), str)
    if usual and isinstance(value.get("content"), str) and value["role"] != "function":
        return value
    if "from" in value and "role" not in value:
        value = _sharegpt(key, value)
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str):
        raise ValueError(f"'{key}' holds {brief(value)}, expected role and content")
    found = {k: v for k, v in value.items() if v is not None}
    if call := found.pop("function_call", None):
        found["tool_calls"] = [{"type": "function", "function": call}]
    if role == "function":
        found["role"] = "tool"
    if isinstance(content, str):
        return found
    if isinstance(content, list) and content:
        found["content"] = [_part(key, role, part) for part in content]
    elif content is None and found.get("tool_calls"):
        found["content"] = None if "content" in value else ""
    else:
        raise ValueError(
            f"'{key}' has a {role} turn whose content is not text: {brief(content)}"
        )
    return found


def text(turn: Message) -> str:
    """The text of a message's content, its parts put together."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(p if isinstance(p, str) else p["text"] for p in content)
    return ""


def whole(value: str | Sequence[Message]) -> str:
    """The text by which prompts are told apart: a string is one assistant turn."""
    if isinstance(value, str):
        return f"assistant: {value}".strip()
    return "\n".join(f"{m['role']}: {text(m)}" for m in value).strip()


def further(value: str | Sequence[Message]) -> list[dict[str, Any]]:
    """What the turns hold beside their text, such as calls of tools."""
    if isinstance(value, str):
        return []
    return [
        found
        for m in value
        if (found := {k: v for k, v in m.items() if k not in UNREAD})
    ]


def identical(a: str | Sequence[Message], b: str | Sequence[Message]) -> bool:
    """Whether two responses are the same to a model."""
    if a == b:
        return True
    if len(a) == len(b) == 1 and _other_end(a[0], b[0]):
        return False
    return whole(a) == whole(b) and further(a) == further(b)


def _other_end(a: Any, b: Any) -> bool:
    """Whether two messages end differently: a quick look at the usual kind."""
    if isinstance(a, str) or isinstance(b, str):
        return False
    return text(a).rstrip() != text(b).rstrip()


def repeats(a: Message, b: Message) -> bool:
    """Whether two messages are one, of which a file may give more keys in one place."""
    if a is b or a == b:
        return True
    same = a["role"] == b["role"] and text(a) == text(b)
    return same and a.get("tool_calls") == b.get("tool_calls")


def empty(value: str | Sequence[Message]) -> bool:
    """Whether a response has no assistant turn with any content, thought or call."""
    if isinstance(value, str):
        return not value.strip()
    return not any(
        m["role"] == "assistant"
        and (text(m).strip() or any(k not in UNREAD for k in m))
        for m in value
    )


def _part(key: str, role: str, part: Any) -> Any:
    """A part of a content: text, or an object of type text."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        named = f"of type {kind!r:.40}" if kind not in (None, "text") else brief(part)
        raise ValueError(
            f"'{key}' has a {role} turn with a part {named}; only text is read"
        )
    return {k: v for k, v in part.items() if v is not None}


def _sharegpt(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """A message of ShareGPT's form as one with role and content."""
    speaker = value["from"]
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(
            f"'{key}' has a turn from {brief(speaker)}, expected one of "
            f"{', '.join(SPEAKERS)}"
        )
    found = {k: v for k, v in value.items() if k not in ("from", "value")}
    found |= {"role": role, "content": value.get("value")}
    if speaker.lower() == "function_call" and (calls := _calls(found["content"])):
        found |= {"content": "", "tool_calls": calls}
    return found


def _calls(content: Any) -> list[dict[str, Any]]:
    """The calls that a text of JSON describes; none if it is another text."""
    try:
        found = json.loads(content) if isinstance(content, str) else None
    except ValueError:
        return []
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]
