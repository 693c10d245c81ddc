"""Other ways to say the same with the messages of a chat.

Rules:
1. Messages are as ``history`` makes them, and are never changed: what differs is new.
2. No content, reasoning or call is left out.
"""

import hashlib
import re
from collections import deque
from itertools import chain
from typing import Any, Dict, List, Optional

from .history import REASONING, RESULT_ROLES, Message
from .json_text import to_text

# The start of a channel of gpt-oss, and the marks between channels.
CHANNEL = re.compile(r"<\|channel\|>(\w+)[^<]*<\|message\|>")
MARK = re.compile(
    r"<\|(?:end|return|call)\|>(?:<\|start\|>assistant)?|<\|start\|>assistant"
)
SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


def kind_of(message: Message) -> str:
    """The role of a message; "call" for one that calls tools."""
    return "call" if message.get("tool_calls") else message["role"]


def to_parts(content: Any) -> List[Dict[str, Any]]:
    """A content as a list of parts."""
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def join_contents(*contents: Any) -> Any:
    """Contents as one, with a blank line between texts."""
    said = list(filter(None, contents))
    if all(isinstance(content, str) for content in said):
        return "\n\n".join(said)
    parts: List[Dict[str, Any]] = []
    for content in said:
        parts += [*to_parts("\n\n" if parts else ""), *to_parts(content)]
    return parts


def join_messages(messages: List[Message]) -> Message:
    """Messages of one role, at least one, as one."""
    if len(messages) == 1:
        return messages[0]
    contents = (message["content"] for message in messages)
    joined = {**messages[0], "content": join_contents(*contents)}
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    if calls:
        joined["tool_calls"] = calls
    for name in REASONING:
        texts = [to_text(message[name]) for message in messages if message.get(name)]
        if texts:
            joined[name] = "\n\n".join(texts)
    return joined


def without_reasoning(message: Message) -> Message:
    """A message with its reasoning in its content."""
    texts = [message[name] for name in REASONING if message.get(name)]
    kept = {key: value for key, value in message.items() if key not in REASONING}
    content = message["content"]
    return {**kept, "content": join_contents(to_text(texts[0]), content)}


def name_results(messages: List[Message]) -> List[Message]:
    """Give each result of a tool the name of its call."""
    names: Dict[Optional[str], str] = {}
    named = []
    for message in messages:
        for call in message.get("tool_calls", []):
            names[call["id"]] = call["function"]["name"]
        id = message.get("tool_call_id")
        if message["role"] in RESULT_ROLES and "name" not in message and id in names:
            message = {**message, "name": names[id]}
        named.append(message)
    return named


def calls_to_text(message: Message) -> Message:
    """A message whose calls, if any, stand in its content."""
    if not message.get("tool_calls"):
        return message
    lines = [
        to_text({key: call["function"][key] for key in ("name", "arguments")})
        for call in message["tool_calls"]
    ]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": join_contents(message["content"], "\n".join(lines))}


def without_channels(message: Message) -> Message:
    """An answer that has the channels of gpt-oss in its content, with the analysis as its
    reasoning."""
    content = message["content"]
    if message["role"] != "assistant" or not isinstance(content, str):
        return message
    before, *parts = CHANNEL.split(content)
    if not parts:
        return message
    texts: Dict[bool, List[str]] = {True: [], False: [before]}
    for channel, text in zip(parts[::2], parts[1::2]):
        texts[channel == "analysis"].append(MARK.sub("", text))
    made = {**message, "content": "\n\n".join(filter(None, texts[False]))}
    thought = [to_text(message[key]) for key in REASONING[:1] if key in message]
    if reasoning := "\n\n".join(filter(None, [*thought, *texts[True]])):
        made.update(reasoning_content=reasoning, reasoning=reasoning)
    return made


def result_to_user(message: Message) -> Message:
    """The result of a tool as a message of the user's."""
    name = message.get("name")
    start = f"Result of the tool {name}:" if name else "Result of a tool:"
    return {"role": "user", "content": join_contents(start, message["content"])}


def orphans(messages: List[Message]) -> List[int]:
    """Where results stand that do not follow the message with their call."""
    found, pending = [], set()
    for i, message in enumerate(messages):
        if message["role"] != "tool":
            pending = {call["id"] for call in message.get("tool_calls", [])}
        elif message.get("tool_call_id") not in pending:
            found.append(i)
    return found


def split_content(message: Message) -> List[Message]:
    """A message with calls after one with what it says beside them, if it says anything."""
    if not (message.get("tool_calls") and message["content"]):
        return [message]
    said = {key: value for key, value in message.items() if key != "tool_calls"}
    rest = {key: value for key, value in message.items() if key not in REASONING}
    return [said, {**rest, "content": ""}]


def split_calls(messages: List[Message]) -> List[Message]:
    """One message for each call, each followed by its result."""
    split: List[Message] = []
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            split.append(message)
            continue
        results = []
        while rest and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        # Where the results of each call are, the last in front.
        places: Dict[Optional[str], List[int]] = {}
        for i in reversed(range(len(results))):
            places.setdefault(results[i].get("tool_call_id"), []).append(i)
        for call in calls:
            split.append({**message, "tool_calls": [call]})
            message = {"role": message["role"], "content": ""}
            if places.get(call["id"]):
                split.append(results[places[call["id"]].pop()])
        split += [results[i] for i in sorted(chain(*places.values()))]
    return split


def shorten_id(id: str) -> str:
    """An id of nine letters and digits, always the same for an id."""
    if SHORT_ID.fullmatch(id):
        return id
    return hashlib.sha256(id.encode()).hexdigest()[:9]
