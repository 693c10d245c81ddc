"""The messages of a chat, each reduced to one form.

Clients keep what models have answered and send it again: calls that were cut off, nulls,
parts of other APIs. A chat must not end because of what stands in its history.

After ``parse_messages`` a message is an object of its own with

- ``role``: a short text;
- ``content``: a text, or, with images, a list of parts of the types ``text`` and ``IMAGES``;
- ``tool_calls``: not there, or a list that is not empty, of calls with ``id``, ``type`` and
  ``function``, which has a ``name`` and ``arguments``, see ``Arguments``;
- ``tool_call_id``: that of the call which the message answers, if one can be found;
- ``name``: not there, or a text that is not empty;
- ``reasoning_content`` and ``reasoning``: the same text, since chat templates read the first
  and answers have the second;
- what else the client sent and is not null, for the chat template.

Rules:
1. Only what no chat template could mean is refused.
2. What cannot be read as it should be is kept as the text that was sent.
"""

from typing import Any, Dict, List, Optional, Tuple

from ..errors import RequestError
from .fields import (
    MAX_MESSAGES,
    Field,
    check_count,
    check_field,
    check_required,
    check_type,
)
from .json_text import load_json, load_python, to_text

Message = Dict[str, Any]

# Parts of contents, and tool calls, of all messages.
MAX_PARTS = 20_000
# A role is any short text: a chat template may have others than OpenAI's API.
ROLE = Field(str, 0, 64)
# Roles of some templates and clients, and those that say the same elsewhere.
ALIASES = {
    "developer": "system",
    "latest_reminder": "system",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "human": "user",
    "thinking": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
# The roles of messages that answer a call.
RESULT_ROLES = ("tool", *(role for role in ALIASES if ALIASES[role] == "tool"))
# Where messages and parts have a reasoning.
REASONING = ("reasoning_content", "reasoning", "thinking")
# The types of parts that are images, and of those that nothing here reads.
IMAGES = ("image_url", "input_image", "image")
MEDIA = ("audio", "video", "file", "document")
# Where a part has its text.
TEXTS = ("text", "refusal", "input_text", "output_text")


class Arguments(Dict[str, Any]):
    """The arguments of a call.

    Args:
        values (Dict[str, Any]): By their names. A value that is no object is one argument.
        text (Optional[str]): The text in which they were sent, if they were.
    """

    def __init__(self, values: Dict[str, Any], text: Optional[str] = None):
        super().__init__(values)
        self.text = to_text(values) if text is None else text


def parse_messages(body: Dict[str, Any]) -> List[Message]:
    """Check the messages of a chat request, and give them in one form.

    Raises:
        RequestError: If they are no list of objects with roles, are too many, or end with
          something that the model cannot get.
    """
    check_required(body, "messages")
    messages: Any = body["messages"]
    check_type("messages", messages, list)
    if not messages:
        raise RequestError(400, "messages must not be empty", "messages")
    check_count("messages", len(messages), MAX_MESSAGES)
    n_parts = 0
    for i, message in enumerate(messages):
        check_type(f"messages[{i}]", message, dict)
        role = message.get("role")
        check_field(f"messages[{i}].role", role, ROLE)
        if not role:
            raise RequestError(400, "a role must not be empty", f"messages[{i}].role")
        for parts in (message.get("content"), message.get("tool_calls")):
            n_parts += len(parts) if isinstance(parts, list) else 0
    if n_parts > MAX_PARTS:
        text = (
            f"messages may have {MAX_PARTS} parts and tool calls at most, not {n_parts}"
        )
        raise RequestError(400, text, "messages")
    n_past = count_past(messages)
    pending: Dict[str, str] = {}
    parsed = []
    for i, message in enumerate(messages):
        made = parse_message(f"messages[{i}]", message, i, is_past=i < n_past)
        if "tool_calls" in made:
            pending = {c["id"]: c["function"]["name"] for c in made["tool_calls"]}
        elif made["role"] in RESULT_ROLES:
            link_result(made, pending)
        parsed.append(made)
    return parsed


def count_past(messages: List[Message]) -> int:
    """How many messages the model has answered already: those up to its last answer."""
    answers = (i for i, m in enumerate(messages) if m["role"] == "assistant")
    return max(answers, default=-1) + 1


def parse_message(name: str, message: Message, index: int, is_past: bool) -> Message:
    """Give a message in the form that this file describes, not linked to its call.

    Args:
        name (str): What errors call it.
        message (Message): What the client sent.
        index (int): Its place, of which ids are made.
        is_past (bool): Whether the model has answered it.
    """
    made = {key: value for key, value in message.items() if value is not None}
    content, reasoning = parse_content(
        f"{name}.content", message.get("content"), made["role"], is_past
    )
    made["content"] = content or to_text(made.pop("refusal", ""))
    if made["role"] == "assistant":
        fields = (made.get(key) for key in REASONING)
        sent = next((to_text(field) for field in fields if field), reasoning)
        if sent:
            made.update(reasoning_content=sent, reasoning=sent)
    calls = made.pop("tool_calls", None) or []
    if not calls and "function_call" in made:
        # What OpenAI's API had before tool calls.
        calls = [made["function_call"]]
    made.pop("function_call", None)
    if isinstance(calls, dict):
        # One without its array, or an array in PHP whose keys have gaps.
        calls = [calls] if "function" in calls else list(calls.values())
    check_type(f"{name}.tool_calls", calls, list)
    parsed = []
    for i, call in enumerate(calls):
        if call is None:
            # An array in JavaScript with gaps.
            continue
        check_type(f"{name}.tool_calls[{i}]", call, dict)
        parsed += parse_call(call, f"call_{index}_{i}")
    if parsed:
        made["tool_calls"] = parsed
    if "name" in made:
        made["name"] = to_text(made["name"])
        if not made["name"]:
            del made["name"]
    return made


def parse_content(name: str, content: Any, role: str, is_past: bool) -> Tuple[Any, str]:
    """The content of a message as a text, or as a list if it has images, and the reasoning
    that stands in its parts.

    Raises:
        RequestError: If it has a part that the model is to answer and cannot get.
    """
    if content is None:
        return "", ""
    if isinstance(content, dict) and is_part(content):
        content = [content]
    if not isinstance(content, list):
        return to_text(content), ""
    is_result = role in RESULT_ROLES
    if is_result and not all(map(is_part, content)):
        return to_text(content), ""
    parts, reasoning = [], []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in IMAGES:
            parts.append(part)
        elif kind in REASONING and role == "assistant":
            reasoning.append(part_text(part))
        elif any(word in to_text(kind) for word in MEDIA) and not has_text(part):
            if not (is_past or is_result):
                text = f"{name}[{i}].type {kind!r} is not supported"
                raise RequestError(400, text, f"{name}[{i}].type", "unsupported_value")
            parts.append({"type": "text", "text": f"[{kind}]"})
        elif part is not None:
            parts.append({"type": "text", "text": part_text(part)})
    if any(part["type"] != "text" for part in parts):
        return parts, "".join(reasoning)
    return "".join(part["text"] for part in parts), "".join(reasoning)


def is_part(value: Any) -> bool:
    """Whether a value is a part of a content, and not a value that a tool has given."""
    return isinstance(value, dict) and (
        isinstance(value.get("type"), str)
        and value["type"] in IMAGES
        or has_text(value)
    )


def has_text(part: Dict[str, Any]) -> bool:
    return "type" in part and any(isinstance(part.get(key), str) for key in TEXTS)


def part_text(part: Any) -> str:
    """The text of a part; that of one without is what was sent."""
    if not isinstance(part, dict):
        return to_text(part)
    for key in (*TEXTS, *REASONING):
        if key in part:
            text = part[key]
            if isinstance(text, list):
                return "".join(map(part_text, text))
            return "" if text is None else to_text(text)
    return to_text(part)


def parse_call(call: Dict[str, Any], default_id: str) -> List[Dict[str, Any]]:
    """A call in the form that this file describes; none if it does not say of what."""
    id = to_text(call.get("id") or default_id)
    parts = (call.get(key) for key in ("function", "custom"))
    function = next((part for part in parts if isinstance(part, dict)), call)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        return []
    sent = (function.get(key) for key in ("arguments", "input", "parameters"))
    arguments = next((value for value in sent if value is not None), None)
    if function is call:
        function = {}
    function = {**function, "name": name, "arguments": parse_arguments(arguments)}
    kind = call.get("type") if "function" in call else None
    return [{**call, "id": id, "type": kind or "function", "function": function}]


def parse_arguments(sent: Any) -> Arguments:
    """The arguments of a call, which clients send as a text. A text may be cut off, encoded
    twice, or not be JSON at all; PHP writes no arguments as an empty array."""
    value = sent
    text: Optional[str] = None
    for _ in range(3):
        if not isinstance(value, str):
            break
        try:
            text, value = value, load_json(value) if value.strip() else {}
        except (ValueError, RecursionError):
            try:
                value, text = load_python(value), None
            except (ValueError, RecursionError):
                break
    if value is None or value == [] or value == {}:
        return Arguments({})
    if not isinstance(value, dict):
        value, text = {"arguments": value}, to_text(sent)
    return Arguments(value, text)


def link_result(message: Message, pending: Dict[str, str]) -> None:
    """Give the answer to a call the id of the call, in place, if it has none.

    Args:
        message (Message): The answer.
        pending (Dict[str, str]): The names of the calls without an answer by their ids;
          loses the one that is answered.
    """
    id = message.pop("tool_call_id", None)
    if id in (None, "") and pending:
        id = next(iter(pending))
        if "name" in message:
            named = (i for i, name in pending.items() if name == message["name"])
            id = next(named, id)
    if id not in (None, ""):
        message["tool_call_id"] = to_text(id)
        pending.pop(message["tool_call_id"], None)


def leave_out_past_images(messages: List[Message]) -> None:
    """Replace images by a note, in place, where the chat could not go on with a model that
    takes none: in what has been answered already, and in what tools have given."""
    n_past = count_past(messages)
    for i, message in enumerate(messages):
        is_left_out = i < n_past or message["role"] in RESULT_ROLES
        if is_left_out and isinstance(message["content"], list):
            message["content"] = "".join(
                part["text"] if part["type"] == "text" else "[image]"
                for part in message["content"]
            )


def count_characters(messages: List[Message]) -> int:
    """Characters of the texts of parsed messages."""
    n = 0
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            n += len(content)
        else:
            n += sum(len(p["text"]) for p in content if p["type"] == "text")
    return n
