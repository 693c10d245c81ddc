"""What a chat template can take, and histories in that shape.

Templates refuse messages, and some leave out without a word what they do not know. What one
does is found out by rendering small chats with it, of which each message has a word of its
own that must be in the prompt.

Rules:
1. What a template writes as it is stays as it is, so that prompts do not change.
2. Nothing of a history is left out: what a template cannot take is said in another way.
3. A chat is rendered once for a model, when a history first needs to know, and knows nothing
   of the requests.
"""

from itertools import product
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from ..errors import RequestError
from . import reshaping
from .history import REASONING, Arguments, Message
from .json_text import to_text
from .reshaping import join_all, join_messages, kind_of

# Facts that are kept of a template: a client could ask for any number of roles.
MAX_FACTS = 1000
# The roles for which there is another one in each template.
STANDARD = ("system", "user", "assistant", "tool")
SYSTEMS = ("system", "developer")
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
# Two messages that some templates refuse one after the other, and can be one.
JOINABLE = {
    ("user", "user"),
    ("assistant", "assistant"),
    ("assistant", "call"),
    ("call", "assistant"),
    ("call", "call"),
}
# An empty message of the user's, and of the assistant's.
SILENT_USER: Message = {"role": "user", "content": ""}
SILENT_ASSISTANT: Message = {"role": "assistant", "content": ""}

# Transformers leaves out what is None, while DeepSeek's templates ask for a content that is
# none. It makes one of this value.
NULL = np.datetime64("NaT")

# What the tools of the probes are.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "Probe",
            "parameters": {
                "type": "object",
                "properties": {"probekey": {"type": "string", "description": "Key"}},
                "required": ["probekey"],
            },
        },
    }
]
KEY, VALUE = "probekey", "probevalue"
# How a template writes the key if it takes an object for a text, or a text for an object.
WRONG = (f"'{KEY}'", f'\\"{KEY}')


class CallForm(NamedTuple):
    """In which form a template takes calls and their results.

    Args:
        as_text (bool): Whether arguments are a text instead of an object.
        null (bool): Whether the content of a message with calls has to be null.
        short_ids (bool): Whether ids have nine letters and digits.
        names (bool): Whether results have the names of their tools.
    """

    as_text: bool = False
    null: bool = False
    short_ids: bool = False
    names: bool = False

    def apply(self, messages: List[Message]) -> List[Message]:
        """Give messages in this form."""
        if self.names:
            messages = reshaping.name_results(messages)
        return [made for message in messages for made in self._apply(message)]

    def _apply(self, message: Message) -> Iterator[Message]:
        if self.short_ids and "tool_call_id" in message:
            id = reshaping.shorten_id(message["tool_call_id"])
            message = {**message, "tool_call_id": id}
        if not message.get("tool_calls"):
            yield message
            return
        if self.null:
            # The template writes either a content or calls.
            *before, message = reshaping.split_content(message)
            yield from before
            message = {**message, "content": NULL}
        yield {
            **message,
            "tool_calls": list(map(self._apply_to_call, message["tool_calls"])),
        }

    def _apply_to_call(self, call: Dict[str, Any]) -> Dict[str, Any]:
        if self.short_ids:
            call = {**call, "id": reshaping.shorten_id(call["id"])}
        if self.as_text:
            text = call["function"]["arguments"].text
            call = {**call, "function": {**call["function"], "arguments": text}}
        return call


class TemplateShape:
    """Gives histories in the shape that a chat template can take.

    Args:
        source (str): The text of the template, if it has one.
        facts (Dict): What is known of it, kept by the caller.
        render (Callable): Renders messages; None if the template fails.
    """

    def __init__(
        self,
        source: str,
        facts: Dict[Any, Any],
        render: Callable[[List[Message]], Optional[str]],
    ):
        self.source = source
        self.facts = facts
        self.render = render

    def attempts(self, messages: List[Message]) -> Iterator[List[Message]]:
        """Give the messages in the shapes to try until one can be rendered.

        Raises:
            RequestError: If a role means nothing to the template.
        """
        if not self.is_known:
            yield self.with_known_roles(messages)
            return
        shaped = self.shape(messages)
        yield shaped
        # The template of gpt-oss refuses what its model writes.
        others = list(map(reshaping.without_channels, messages))
        if others != messages:
            messages = others
            yield self.shape(messages)
        plain = self.shape(messages, is_plain=True)
        if plain != shaped:
            yield plain

    def shape(self, messages: List[Message], is_plain: bool = False) -> List[Message]:
        """Give messages in the shape of the template.

        Args:
            messages (List[Message]): As ``history`` makes them.
            is_plain (bool): Whether to use only what every template takes: one message of
              the system's, and then the user's and the assistant's in turn.
        """
        messages = self.with_known_roles(messages, is_plain)
        form = CallForm()
        if any(kind_of(message) in ("call", "tool") for message in messages):
            form, messages = self.with_calls(messages, is_plain)
        messages = self.with_systems(messages, is_plain)
        messages = self.with_turns(messages, is_plain)
        return self.typed(form.apply(messages))

    # Facts

    def fact(self, key: Any, find: Callable[[], Any]) -> Any:
        """What is known by ``key``, or else found out now."""
        if key not in self.facts:
            if len(self.facts) >= MAX_FACTS:
                self.facts.clear()
            self.facts[key] = find()
        return self.facts[key]

    @property
    def is_typed(self) -> bool:
        """Whether each content has to be a list of parts."""

        def find() -> bool:
            word = "probeword"
            parts = [{"type": "text", "text": word}]
            texts = (
                self.render([{"role": "user", "content": content}]) or ""
                for content in (word, parts)
            )
            is_text, is_list = (word in text for text in texts)
            return is_list and not is_text

        return bool(self.fact("typed", find))

    @property
    def is_known(self) -> bool:
        """Whether it can be found out what the template does."""
        return self.shows("user")

    def shows(self, *kinds: str) -> bool:
        """Whether the template writes the words of a chat of these kinds of messages."""

        def find() -> bool:
            words, messages = [], []
            for i, kind in enumerate(kinds):
                words.append(f"probeword{i}x")
                messages.append(make_message(kind, words[-1]))
            return self.shows_words(messages, words)

        return bool(self.fact(kinds, find))

    def shows_words(self, messages: List[Message], words: List[str]) -> bool:
        has_calls = any(message.get("tool_calls") for message in messages)
        form = self.call_form[0] if has_calls else CallForm()
        text = self.render(self.typed(form.apply(messages)))
        return text is not None and all(word in text for word in words)

    @property
    def call_form(self) -> Tuple[CallForm, bool, bool]:
        """The form in which it takes calls, and whether it writes calls and results."""

        def find() -> Tuple[CallForm, bool, bool]:
            best, score = (CallForm(), False, False), 0
            name, result = "probename", "proberesult"
            messages = [make_message("user", "probe"), make_message("call", name)]
            messages.append(make_message("tool", result))
            # In this order, the usual form is the first of those that are equally good.
            for names, short, null, as_text in product((False, True), repeat=4):
                form = CallForm(as_text, null, short, names)
                text = self.render(self.typed(form.apply(messages)))
                if text is None:
                    continue
                calls, results = name in text and VALUE in text, result in text
                is_right = not any(wrong in text for wrong in WRONG)
                if 2 * (calls + results) + is_right > score:
                    score = 2 * (calls + results) + is_right
                    best = form, calls, results
                if score == 5:
                    break
            return best

        found: Tuple[CallForm, bool, bool] = self.fact("calls", find)
        return found

    def takes_parallel_calls(self) -> bool:
        def find() -> bool:
            words = ["probename0", "probename1", "proberesult0", "proberesult1"]
            first, second = (make_message("call", word) for word in words[:2])
            results = [make_message("tool", word) for word in words[2:]]
            for i, (call, result) in enumerate(
                zip(first["tool_calls"] + second["tool_calls"], results)
            ):
                call["id"] = result["tool_call_id"] = f"call_probe_{i}"
            calls = join_messages(first, second)
            user = make_message("user", "probe")
            return self.shows_words([user, calls, *results], words)

        return bool(self.fact("parallel", find))

    def takes_reasoned_calls(self) -> bool:
        """Whether calls may come with both a reasoning and a content."""

        def find() -> bool:
            call = make_message("call", "probename")
            call |= {"content": "probe", **dict.fromkeys(REASONING, "probe")}
            user, result = make_message("user", "x"), make_message("tool", "x")
            return self.shows_words([user, call, result], ["probename"])

        return bool(self.fact("reasoned", find))

    def takes_content(self, is_first: bool) -> bool:
        """Whether the first calls of a chat, or later ones, may come with a content, as far as
        this can be helped."""

        def find() -> bool:
            word, end = "probeword0x", "probeword1x"
            call, result = make_message("call", "probename"), make_message("tool", "x")
            before = [make_message("user", "x"), *([] if is_first else [call, result])]
            after = [result, make_message("assistant", end)]
            whole = {**call, "content": word}
            split = reshaping.split_content(whole)
            return self.shows_words([*before, whole, *after], [word]) or (
                not self.shows_words([*before, *split, *after], [word, end])
            )

        return bool(self.fact(("content", is_first), find))

    def takes_role(self, role: str) -> bool:
        """Whether it writes messages of a role."""
        places = [(role,), ("user", role), (role, "user")]
        places += [("user", "assistant", role), ("user", "assistant", role, "user")]
        places.append(("user", "call", role))
        return any(self.shows(*kinds) for kinds in places)

    # Steps. Each gives new messages.

    def typed(self, messages: List[Message]) -> List[Message]:
        if not self.is_typed:
            return messages
        return [
            (
                {**m, "content": [{"type": "text", "text": m["content"]}]}
                if isinstance(m["content"], str)
                else m
            )
            for m in messages
        ]

    def with_known_roles(
        self, messages: List[Message], is_plain: bool = False
    ) -> List[Message]:
        """Give other roles to messages whose role the template does not write."""
        roles: Dict[str, str] = {}
        changed = []
        for i, message in enumerate(messages):
            role = message["role"]
            if role not in roles:
                # Templates that write any role may not know what a developer is.
                is_known = role in STANDARD or (
                    (role != "developer" or role in self.source)
                    and (self.takes_role(role) or not self.is_known)
                )
                alias = ALIASES.get(role, "")
                roles[role] = role if is_known and not (is_plain and alias) else alias
            if not roles[role]:
                name = f"messages[{i}].role"
                text = f"{name} {role!r} is not known to the model's chat template"
                raise RequestError(400, text, name)
            changed.append({**message, "role": roles[role]})
        return changed

    def with_calls(
        self, messages: List[Message], is_plain: bool
    ) -> Tuple[CallForm, List[Message]]:
        """Say calls and results in a way that the template writes, and find their form."""
        form, shows_calls, shows_results = self.call_form
        if is_plain or not shows_results:
            messages = [
                reshaping.result_to_user(m) if m["role"] == "tool" else m
                for m in reshaping.name_results(messages)
            ]
        if is_plain or not shows_calls:
            messages = [reshaping.calls_to_text(message) for message in messages]
        if is_plain or not (shows_calls and shows_results):
            return form, messages
        if (
            any(len(message.get("tool_calls", [])) > 1 for message in messages)
            and not self.takes_parallel_calls()
        ):
            messages = reshaping.split_calls(messages)
        lost = reshaping.orphans(messages)
        if lost and not self.shows("user", "assistant", "tool"):
            messages = list(messages)
            for i in lost:
                messages[i] = reshaping.result_to_user(messages[i])
        made: List[Message] = []
        is_first = True
        for message in messages:
            parts = [message]
            if message.get("tool_calls"):
                if not message["content"]:
                    pass
                elif message.get("reasoning") and not self.takes_reasoned_calls():
                    parts = [reshaping.without_reasoning(message)]
                elif not self.takes_content(is_first):
                    parts = reshaping.split_content(message)
                is_first = False
            made += parts
        return form, made

    def with_systems(self, messages: List[Message], is_plain: bool) -> List[Message]:
        """Move what the system says to the start where the template wants it there, as
        Ollama and LiteLLM do."""
        is_system = [message["role"] in SYSTEMS for message in messages]
        n = (is_system + [False]).index(False)
        first, rest = messages[:n], messages[n:]
        late = {message["role"] for message in rest} & set(SYSTEMS)
        if late and (
            is_plain
            or not all(
                self.shows("system", "user", "assistant", role, "user") for role in late
            )
        ):
            first += [message for message in rest if message["role"] in SYSTEMS]
            rest = [message for message in rest if message["role"] not in SYSTEMS]
        roles = [message["role"] for message in first[:3]]
        if len(first) > 1 and (is_plain or not self.shows(*roles, "user")):
            first = join_all(first)
        if first and not self.shows(first[0]["role"], "user", *ending(rest)):
            said = {**SILENT_USER, "content": join_all(first)[0]["content"]}
            n = 1 if rest and rest[0]["role"] == "user" else 0
            return join_all([said, *rest[:n]]) + rest[n:]
        return first + rest

    def with_turns(self, messages: List[Message], is_plain: bool) -> List[Message]:
        """Let the user and the assistant speak in turn where the template wants it."""
        kinds = [kind_of(message) for message in messages]
        others = (i for i, kind in enumerate(kinds) if kind not in SYSTEMS)
        first = next(others, len(kinds))
        made = messages[:first]
        if kinds[first : first + 1] != ["user"] and (
            is_plain or not self.may_start(kinds, first)
        ):
            made.append(SILENT_USER)
        for message in messages[first:]:
            pair = (kind_of(made[-1]), kind_of(message)) if made else ("", "")
            if pair in JOINABLE and (is_plain or not self.takes_pair(pair)):
                made[-1] = join_messages(made[-1], message)
                continue
            if pair in (("tool", "user"), ("call", "user")) and self.wants_answer(pair):
                made.append(SILENT_ASSISTANT)
            made.append(message)
        return made

    def may_start(self, kinds: List[str], first: int) -> bool:
        """Whether the first message after the system's need not be the user's."""
        if first == len(kinds):
            return self.shows("system")
        start = ["call", "tool"] if kinds[first] == "call" else ["assistant"]
        return self.shows(*start, *(["user"] if "user" in kinds else []))

    def takes_pair(self, pair: Tuple[str, str]) -> bool:
        if pair == ("user", "user"):
            return self.shows(*pair)
        return self.shows("user", *pair, *(["tool"] if pair[1] == "call" else []))

    def wants_answer(self, pair: Tuple[str, str]) -> bool:
        """Whether the assistant must speak between a call or a result and the user."""
        before = ("user", "call", "tool") if pair[0] == "tool" else ("user", "call")
        return not self.shows(*before, "user") and self.shows(
            *before, "assistant", "user"
        )


def ending(messages: List[Message]) -> List[str]:
    """The kinds of the messages after the user's with which a chat like this ends."""
    kind = kind_of(messages[-1]) if messages else "user"
    return {"tool": ["call", "tool"], "call": ["call"], "assistant": ["assistant"]}.get(
        kind, []
    )


def make_message(kind: str, word: str) -> Message:
    """A message of a probe, with a word that is to be in the prompt."""
    if kind != "call":
        message = {"role": kind, "content": word}
        return message | ({"tool_call_id": "call_probe"} if kind == "tool" else {})
    function = {"name": word, "arguments": Arguments({KEY: VALUE})}
    call = {"id": "call_probe", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tool_forms(tools: Any) -> Iterator[Any]:
    """Give tools as they are, and then with all that a template may read of them."""
    yield tools
    complete = [
        {
            **tool,
            "type": tool.get("type", "function"),
            "function": {
                "description": "",
                "parameters": {"type": "object", "properties": {}},
                **{k: v for k, v in tool["function"].items() if v is not None},
            },
        }
        for tool in tools or []
    ]
    if complete and complete != tools:
        yield complete


def without_template(
    messages: List[Message], role_mapping: Optional[Dict[str, str]]
) -> List[Message]:
    """Messages for a model without a chat template, which get a prefix for each role."""
    made = []
    for message in messages:
        message = reshaping.calls_to_text(message)
        role = message["role"]
        if role not in (role_mapping or {}) and role in ALIASES:
            message = {**message, "role": ALIASES[role]}
        made.append({**message, "content": to_text(message["content"])})
    return made
