"""Messages as people have them, turned into role and content that every chat template reads."""

import json
from collections.abc import Callable
from typing import Any

from datasets import LargeList, List

from logitgen.errors import UsageError, first_line

Message = dict[str, Any]
Chat = list[Message]

_SHAREGPT = {"human": "user", "gpt": "assistant"}
_ROLES = {
    **_SHAREGPT,
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""ShareGPT's names of who speaks, and the chat templates' own."""


def from_json(value: Any, name: str, kind: type, index: int) -> Any:
    """Return a list or an object, given as such or as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"Row {index}: '{name}' is text that is not JSON: {first_line(error)}") from error
    if value in (None, ""):
        return None
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise UsageError(f"Row {index}: '{name}' must be {expected}, or JSON text of it, got {kind_of(value)}.")
    return value


def without_filled(value: Any, feature: Any) -> Any:
    """Leave out the null members that Arrow fills in: those of its structs. A null within JSON was written by someone.

    Args:
        value: A value of a column.
        feature: Its type.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        members = {name: without_filled(member, feature[name]) for name, member in value.items()}
        return {name: member for name, member in members.items() if member is not None}
    if isinstance(value, list) and isinstance(feature, List | LargeList):
        return [without_filled(member, feature.feature) for member in value]
    return value


def checked_chat(chat: Any, name: str, index: int) -> Chat:
    """Return a conversation as messages of role and content.

    Args:
        chat: The value of the column: a list, or JSON text of it.
        name: The column.
        index: Number of the row in the split.

    Raises:
        UsageError: It is none, or a message lacks something or has something that cannot be read.
    """
    if isinstance(chat, str) and chat.lstrip().startswith("["):
        chat = from_json(chat, name, list, index)
    if not isinstance(chat, list):
        raise UsageError(f"Row {index}: '{name}' must be a list of messages, got {kind_of(chat)}.")
    try:
        places = [f"Row {index}, message {turn}" for turn in range(len(chat))]
        return [_checked(message, place) for message, place in zip(chat, places, strict=True)]
    except RecursionError as error:
        raise UsageError(f"Row {index}: '{name}' is nested too deeply to be read.") from error


def _checked(message: Any, place: str) -> dict[str, Any]:
    """Return a message with its content as text, and without members that have no value."""
    if not isinstance(message, dict):
        raise UsageError(f"{place}: it must be an object with role and content, got {kind_of(message)}.")
    if message.get("role") is None and message.get("from") is not None:
        message = _from_sharegpt(message, place)
    if not isinstance(message.get("role"), str):
        raise UsageError(f"{place}: 'role' must be a string, got {kind_of(message.get('role'))}.")
    found = {name: value for name, value in message.items() if value is not None}
    found["role"] = _SHAREGPT.get(found["role"], found["role"])
    content = found.get("content", "" if found.get("tool_calls") else None)
    if isinstance(content, list):
        content = "".join(_text_of(part, place) for part in content)
    if not isinstance(content, str):
        raise UsageError(f"{place}: 'content' must be a string, got {kind_of(content)}.")
    found["content"] = content
    return found


def _from_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    """Turn ShareGPT's `from` and `value` into role and content."""
    if not isinstance(message["from"], str) or message["from"] not in _ROLES:
        raise UsageError(f"{place}: 'from' must be one of {', '.join(_ROLES)}, got {kind_of(message['from'])}.")
    others = {name: member for name, member in message.items() if name not in ("from", "value")}
    return others | {"role": _ROLES[message["from"]], "content": message.get("value")}


def _text_of(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise UsageError(f"{place}: a part of 'content' is {kind or kind_of(part)}, only parts of text can be read.")
    return str(part["text"])


def with_arguments(message: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """Return a message with the arguments of its tool calls as JSON text, or as objects."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    change = _encoded if as_text else _decoded
    return message | {"tool_calls": [_with_arguments(call, change) for call in calls]}


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    return call | {"function": function | {"arguments": change(function["arguments"])}}


def _encoded(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _decoded(arguments: Any) -> Any:
    """Decode arguments that are JSON text of an object, because a template encodes them again."""
    try:
        value = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its content as a list of one text part, for templates that read only parts."""
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def counts(message: dict[str, Any]) -> bool:
    """Whether a message is a completion: an assistant's, and not left out by its `weight` or `train`."""
    is_left_out = message.get("weight", 1) in (0, "0") or message.get("train", True) in (0, "0", "false", "False")
    return message["role"] == "assistant" and not is_left_out


def kind_of(value: object) -> str:
    """Show a value in an error message."""
    if isinstance(value, list):
        return f"a list of {len(value)}" + (f" ({value[0]!r:.40}, ...)" if value else "")
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"
