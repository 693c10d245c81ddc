"""What a chat template can take, and histories in that shape.

Templates refuse messages, and some leave out without a word what they do not know. What one
does is found out with probes: small chats, of which each message has a word of its own that
must be in the prompt.

Rules:
1. What a template writes as it is stays as it is, so that prompts do not change.
2. Nothing of a history is left out: what a template cannot take is said in another way. Only
   a text beside calls is, if neither it nor a message of its own has a place there.
3. A probe is rendered when a history first needs to know, and has nothing of a request in
   it. What it shows is kept with the model.
"""

from functools import wraps
from itertools import product
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
    TypeVar,
    cast,
)

import numpy as np

from ..errors import RequestError
from . import reshaping
from .history import ALIASES, REASONING, Arguments, Message
from .json_text import to_text
from .reshaping import join_messages, kind_of

# Facts that are kept of a template. They are bounded because clients choose the roles.
MAX_FACTS = 1000
# Roles that are never refused: what a template lacks of them is said in another way.
STANDARD = ("system", "user", "assistant", "tool")
SYSTEMS = ("system", "developer")
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

# Stands for a content that is None, which DeepSeek's templates look for. Transformers drops
# the keys whose value is None, and turns this value into None after that.
NULL = np.datetime64("NaT")

# An argument of the probes, and their tool.
KEY, VALUE = "probekey", "probevalue"
TOOLS: List[Dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "Probe",
            "parameters": {
                "type": "object",
                "properties": {KEY: {"type": "string", "description": "Key"}},
                "required": [KEY],
            },
        },
    }
]
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


Method = TypeVar("Method", bound=Callable[..., Any])


def fact(find: Method) -> Method:
    """Make a method of ``TemplateShape`` find something out once for a template."""

    @wraps(find)
    def known(self: "TemplateShape", *args: Any) -> Any:
        key = find.__name__, *args
        try:
            return self.facts[key]
        except KeyError:
            pass  # found out now
        value = find(self, *args)
        if len(self.facts) >= MAX_FACTS:
            self.facts.clear()
        self.facts[key] = value
        return value

    return cast(Method, known)


class TemplateShape:
    """Gives histories in the shape that a chat template can take.

    Args:
        source (str): The text of the template, if it has one.
        facts (Dict): What is known of it, kept by the caller for all threads.
        render (Callable): Renders messages; None if the template fails.
        is_plain (bool): Whether to use only what every template takes: one message of the
          system's, and then the user's and the assistant's in turn.
    """

    def __init__(
        self,
        source: str,
        facts: Dict[Any, Any],
        render: Callable[[List[Message]], Optional[str]],
        is_plain: bool = False,
    ):
        self.source = source
        self.facts = facts
        self.render = render
        self.is_plain = is_plain

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
        plain = TemplateShape(self.source, self.facts, self.render, is_plain=True)
        plainly = plain.shape(messages)
        if plainly != shaped:
            yield plainly

    def shape(self, messages: List[Message]) -> List[Message]:
        """Give messages, as ``history`` makes them, in the shape of the template."""
        messages = self.with_known_roles(messages)
        form = CallForm()
        if any(kind_of(message) in ("call", "tool") for message in messages):
            form, messages = self.with_calls(messages)
        messages = self.with_systems(messages)
        messages = self.with_turns(messages)
        return self.typed(form.apply(messages))

    # Facts

    @property
    @fact
    def is_typed(self) -> bool:
        """Whether each content has to be a list of parts."""
        word = "probeword"
        is_text, is_list = (
            word in (self.render([{"role": "user", "content": content}]) or "")
            for content in (word, [{"type": "text", "text": word}])
        )
        return is_list and not is_text

    @property
    def is_known(self) -> bool:
        """Whether it can be found out what the template does."""
        return self.writes("user")

    @property
    @fact
    def offers_tools(self) -> bool:
        """Whether it writes the tools that it is given, as it is in the probes."""
        description = TOOLS[0]["function"]["description"]
        for kinds in (["user"], ["system", "user"]):
            chat = [make_message(kind, "probeword") for kind in kinds]
            text = self.render(self.typed(chat)) or ""
            if KEY in text or description in text:
                return True
        return False

    @fact
    def writes(self, *kinds: str) -> bool:
        """Whether the template writes the words of a chat of these kinds of messages."""
        words = [f"probeword{i}x" for i in range(len(kinds))]
        return self.writes_words(list(map(make_message, kinds, words)), words)

    def writes_words(self, messages: List[Message], words: List[str]) -> bool:
        has_calls = any(message.get("tool_calls") for message in messages)
        form = self.call_form[0] if has_calls else CallForm()
        text = self.render(self.typed(form.apply(messages)))
        return text is not None and all(word in text for word in words)

    def shows(self, *kinds: str) -> bool:
        """Whether a chat of these kinds of messages may stay as it is."""
        return (not self.is_plain or is_in_turn(kinds)) and self.writes(*kinds)

    @property
    @fact
    def call_form(self) -> Tuple[CallForm, bool, bool]:
        """The form in which it takes calls, and whether it writes calls and results."""
        best, score = (CallForm(), False, False), 0
        name, result = "probename", "proberesult"
        messages = list(
            map(make_message, ("user", "call", "tool"), ("x", name, result))
        )
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

    @fact
    def takes_parallel_calls(self) -> bool:
        words = ["probename0", "probename1", "proberesult0", "proberesult1"]
        kinds, ids = ("call", "call", "tool", "tool"), ("probe0", "probe1") * 2
        first, second, *results = map(make_message, kinds, words, ids)
        calls = join_messages([first, second])
        return self.writes_words([make_message("user", "x"), calls, *results], words)

    @fact
    def takes_reasoned_calls(self) -> bool:
        """Whether calls may come with both a reasoning and a content."""
        call = make_message("call", "probename")
        call |= {"content": "probe", **dict.fromkeys(REASONING, "probe")}
        user, result = make_message("user", "x"), make_message("tool", "x")
        return self.writes_words([user, call, result], ["probename"])

    @fact
    def takes_content(self, is_first: bool) -> bool:
        """Whether the first calls of a chat, or later ones, may come with a content, as far as
        this can be helped."""
        word, end = "probeword0x", "probeword1x"
        call, result = make_message("call", "probename"), make_message("tool", "x")
        before = [make_message("user", "x"), *([] if is_first else [call, result])]
        after = [result, make_message("assistant", end)]
        whole = {**call, "content": word}
        split = reshaping.split_content(whole)
        return self.writes_words([*before, whole, *after], [word]) or (
            not self.writes_words([*before, *split, *after], [word, end])
        )

    def takes_role(self, role: str) -> bool:
        """Whether it writes messages of a role."""
        places = [(role,), ("user", role), (role, "user")]
        places += [("user", "assistant", role), ("user", "assistant", role, "user")]
        places.append(("user", "call", role))
        return any(self.writes(*kinds) for kinds in places)

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

    def with_known_roles(self, messages: List[Message]) -> List[Message]:
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
                roles[role] = (
                    role if is_known and not (self.is_plain and alias) else alias
                )
            if not roles[role]:
                name = f"messages[{i}].role"
                text = f"{name} {role!r} is not known to the model's chat template"
                raise RequestError(400, text, name)
            changed.append({**message, "role": roles[role]})
        return changed

    def with_calls(self, messages: List[Message]) -> Tuple[CallForm, List[Message]]:
        """Say calls and results in a way that the template writes, and find their form."""
        form, shows_calls, shows_results = self.call_form
        if self.is_plain:
            shows_calls = shows_results = False
        if not shows_results:
            messages = [
                reshaping.result_to_user(m) if m["role"] == "tool" else m
                for m in reshaping.name_results(messages)
            ]
        if not shows_calls:
            messages = [reshaping.calls_to_text(message) for message in messages]
        if not (shows_calls and shows_results):
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
            parts, has_calls = [message], bool(message.get("tool_calls"))
            if has_calls and message["content"]:
                if message.get("reasoning") and not self.takes_reasoned_calls():
                    parts = [reshaping.without_reasoning(message)]
                elif not self.takes_content(is_first):
                    parts = reshaping.split_content(message)
            is_first = is_first and not has_calls
            made += parts
        return form, made

    def with_systems(self, messages: List[Message]) -> List[Message]:
        """Move what the system says to the start where the template wants it there, as
        Ollama and LiteLLM do."""
        is_system = [message["role"] in SYSTEMS for message in messages]
        n = (is_system + [False]).index(False)
        first, rest = messages[:n], messages[n:]
        late = {message["role"] for message in rest} & set(SYSTEMS)
        if not all(
            self.shows("system", "user", "assistant", role, "user") for role in late
        ):
            first += [message for message in rest if message["role"] in SYSTEMS]
            rest = [message for message in rest if message["role"] not in SYSTEMS]
        roles = [message["role"] for message in first[:3]]
        if len(first) > 1 and not self.shows(*roles, "user"):
            first = [join_messages(first)]
        if first and not self.shows(first[0]["role"], "user", *ending(rest)):
            said = {**SILENT_USER, "content": join_messages(first)["content"]}
            n = 1 if rest and rest[0]["role"] == "user" else 0
            return [join_messages([said, *rest[:n]]), *rest[n:]]
        return first + rest

    def with_turns(self, messages: List[Message]) -> List[Message]:
        """Let the user and the assistant speak in turn where the template wants it."""
        kinds = [kind_of(message) for message in messages]
        others = (i for i, kind in enumerate(kinds) if kind not in SYSTEMS)
        first = next(others, len(kinds))
        # Messages that are to be one.
        groups = [[message] for message in messages[:first]]
        last = kinds[first - 1] if first else ""
        if kinds[first : first + 1] != ["user"] and not self.may_start(kinds, first):
            groups.append([SILENT_USER])
            last = "user"
        for kind, message in zip(kinds[first:], messages[first:]):
            pair = last, kind
            if pair in JOINABLE and not self.takes_pair(pair):
                groups[-1].append(message)
                last = "call" if "call" in pair else kind
                continue
            if pair in (("tool", "user"), ("call", "user")) and self.wants_answer(pair):
                groups.append([SILENT_ASSISTANT])
            groups.append([message])
            last = kind
        return [join_messages(group) for group in groups]

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


def is_in_turn(kinds: Tuple[str, ...]) -> bool:
    """Whether the user begins, perhaps after the system, and takes turns with the
    assistant."""
    said = kinds[1:] if kinds[:1] == ("system",) else kinds
    turns = ("user", "assistant") * len(said)
    return bool(said) and said == turns[: len(said)]


def ending(messages: List[Message]) -> List[str]:
    """The kinds of the messages after the user's with which a chat like this ends."""
    kind = kind_of(messages[-1]) if messages else "user"
    endings = {"tool": ["call", "tool"], "call": ["call"], "assistant": ["assistant"]}
    return endings.get(kind, [])


def make_message(kind: str, word: str, id: str = "call_probe") -> Message:
    """A message of a probe, with a word that is to be in the prompt, and the id of a call."""
    if kind == "call":
        function = {"name": word, "arguments": Arguments({KEY: VALUE})}
        call = {"id": id, "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    message = {"role": kind, "content": word}
    return message | ({"tool_call_id": id} if kind == "tool" else {})


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
