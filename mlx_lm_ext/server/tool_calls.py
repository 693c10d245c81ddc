"""From the text of a tool call in an answer to calls in OpenAI's shape.

Rules:
1. The arguments are a text of JSON: an object whose values are as the client's schema has
   them, which is the job of ``tool_values``.
2. All calls of a text are whole, or the whole text stays text.
3. A tool of a request may have any schema or none: it never makes a call fail.
"""

import re
import string
from random import SystemRandom
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from mlx_lm.server import ToolCallFormatter

from .streamed_arguments import StreamedArguments
from .tool_formats import (
    HEADED,
    JSON,
    READERS,
    TAGS,
    Tags,
    check_kimi_k3,
    read_json,
)
from .tool_values import (
    Allowed,
    allowed_for,
    as_json,
    decode_object,
    fit,
    value_of,
    value_without_schema,
)

# Where the parsers are whose names are formats.
PARSER_PACKAGES = ("mlx_lm.tool_parsers", __package__)

# Characters of a call. While a pattern or JSON is read, all other threads wait.
MAX_CALL = 1 << 18
# Bounds of a text that is given to upstream's tool parsers: the time of some grows with
# the number of characters times the number of marks, and they cannot be interrupted.
MAX_TOOL_TEXT = 1 << 16
MAX_TOOL_MARKS = 64
TOOL_MARK = re.compile(r"call:|<\|open\|>|<\w*arg_key>|<atem:|<escape>")

# The keys under which models write the arguments of a call in JSON, and the other keys that
# a call may have.
ARGUMENTS = ("arguments", "parameters", "args", "input")
HEADER = ("name", "function", "id", "type", "index")

# Mistral's chat templates refuse ids other than 9 letters and digits. No client is known to
# need the "call_" with which OpenAI's begin.
ID_LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 9
choose = SystemRandom().choices


class ToolCallParser:
    """Parses the tool calls of one answer.

    Args:
        parser (Optional[Callable]): The model's parser of mlx-lm, whose module names the
          format.
        tools (Optional[List[Dict]]): The tools of the request.
    """

    def __init__(
        self, parser: Optional[Callable], tools: Optional[List[Dict[str, Any]]]
    ):
        self.parser = parser
        package, _, name = (getattr(parser, "__module__", "") or "").rpartition(".")
        self.format = name if package in PARSER_PACKAGES else ""
        # Models of all formats write JSON now and then.
        self.headed = [JSON, *filter(None, [HEADED.get(self.format)])]
        self.parameters = {}
        for tool in tools or []:
            function = tool.get("function")
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                self.parameters[function["name"]] = function.get("parameters")
        self.allowed: Dict[Tuple[str, str], Allowed] = {}
        self.ids: Set[str] = set()
        self.n_calls = 0
        self.is_cut = False
        self.to_openai = ToolCallFormatter(self.read, tools)

    def parse(self, text: str, is_cut: bool = False) -> List[Dict[str, Any]]:
        """Parse what is between the marks of a tool call.

        Args:
            text (str): The text.
            is_cut (bool): Whether the answer has ended in the middle of it, for lack of
              tokens.

        Returns:
            The calls. If there are none, or something is raised, it is no tool call.
        """
        if len(text) > MAX_CALL:
            raise ValueError(f"it has {len(text)} characters")
        self.is_cut = is_cut
        return self.to_openai([text])

    def begin_streamed(
        self, call: Dict[str, Any], parts: List[Dict[str, Any]]
    ) -> StreamedArguments:
        """Begin a call that is sent in parts.

        Args:
            call (Dict): Its ``name``, and perhaps its ``id``.
            parts (List[Dict]): What its first part is added to.

        Returns:
            What makes the pieces of its arguments.
        """
        name = call["name"]
        self.begin(name, self.make_id(call.get("id")), parts)
        return StreamedArguments(lambda argument: self.allowed_for(name, argument))

    def begin(self, name: str, id: str, parts: List[Dict[str, Any]]) -> None:
        """Add the first part of a call, which has all but the arguments."""
        function = {"name": name, "arguments": ""}
        parts.append(
            {"index": self.n_calls, "id": id, "type": "function", "function": function}
        )
        self.n_calls += 1

    def go_on(self, arguments: str, parts: List[Dict[str, Any]]) -> None:
        """Add more of the arguments of the last call."""
        if parts and "id" not in parts[-1]:
            parts[-1]["function"]["arguments"] += arguments
        else:
            index = self.n_calls - 1
            parts.append({"index": index, "function": {"arguments": arguments}})

    def add_whole(self, call: Dict[str, Any], parts: List[Dict[str, Any]]) -> None:
        """Add the parts of a whole call in OpenAI's shape."""
        function = call["function"]
        self.begin(function["name"], call["id"], parts)
        self.go_on(function["arguments"], parts)

    def read(self, text: str, tools: Any) -> List[Dict[str, Any]]:
        """The calls of a text: what upstream's formatter expects of a parser."""
        return [self.finish(call) for call in self.find(text, tools)]

    def find(self, text: str, tools: Any) -> List[Any]:
        """The calls of a text as the model wrote them."""
        if text.lstrip()[:1] in ("{", "["):
            # Now and then, models write JSON in place of their own format.
            try:
                return read_json(text)
            except ValueError:
                pass
        tags = TAGS.get(self.format)
        if tags is not None:
            if tags.is_bare and tags.opening not in text:
                return self.find_bare(text)
            return self.find_tagged(text, tags)
        if self.format in READERS:
            return READERS[self.format](text)
        check_marks(text)
        calls = self.parser(text, tools)
        calls = calls if isinstance(calls, list) else [calls]
        if self.format == "kimi_k3":
            check_kimi_k3(text, calls)
        return calls

    def find_tagged(self, text: str, tags: Tags) -> List[Dict[str, Any]]:
        """Calls whose arguments are texts, with the values that these stand for."""
        calls = tags.read(text, self.is_cut)
        for call in calls:
            for name, value in call["arguments"].items():
                allowed = self.allowed_for(call["name"], name)
                call["arguments"][name] = (
                    value_of(value, allowed)
                    if allowed.types
                    else value_without_schema(value, tags.is_json)
                )
        return calls

    def find_bare(self, text: str) -> List[Any]:
        """The call of a text without tags, of which upstream makes one whatever it is. Only
        the name of a tool tells it from other text."""
        name, *rest = text.split(None, 1)
        if self.is_cut or name not in self.parameters:
            raise ValueError("there is no call of a tool")
        if not rest:
            return [{"name": name}]
        check_marks(text)
        call = self.parser(text, None)
        if call["arguments"] == {"raw": rest[0].strip()}:
            raise ValueError("the arguments are no object")
        return [call]

    def finish(self, call: Any) -> Dict[str, Any]:
        """A call with its name, the arguments that the client's schema wants, and an id.

        Raises:
            ValueError: If it has no name, or the arguments are no object.
        """
        if not isinstance(call, dict):
            raise ValueError("a call is no object")
        for wrapper in ("function", "tool"):
            if isinstance(call.get(wrapper), dict):
                call = {"id": call.get("id")} | call[wrapper]
        sent = (call.get(key) for key in ARGUMENTS)
        arguments = next((value for value in sent if value is not None), None)
        name = call.get("name", call.get("function"))
        if arguments is None and not call.keys() <= {*HEADER, *ARGUMENTS}:
            raise ValueError("a call has other keys than arguments")
        if name is None and arguments is not None and len(self.parameters) == 1:
            # It can only be of the one tool that there is.
            (name,) = self.parameters
        if not isinstance(name, str) or not name.strip():
            raise ValueError("a call has no name")
        arguments = {
            key: fit(value, self.allowed_for(name, key))
            for key, value in decode_object(arguments).items()
        }
        return {
            "id": self.make_id(call.get("id")),
            "name": as_json(name),
            "arguments": as_json(arguments),
        }

    def allowed_for(self, tool: str, argument: str) -> Allowed:
        """What the client's schema allows for an argument."""
        key = tool, argument
        if key not in self.allowed:
            self.allowed[key] = allowed_for(argument, self.parameters.get(tool))
        return self.allowed[key]

    def make_id(self, written: Any) -> str:
        """The id that the model wrote, if it is new, or else another."""
        found = written if isinstance(written, str) else ""
        while not found or found in self.ids:
            found = "".join(choose(ID_LETTERS, k=ID_LENGTH))
        self.ids.add(found)
        return found


def check_marks(text: str) -> None:
    """Check that a tool parser of upstream takes little time for a text.

    Raises:
        ValueError: If it is too long, or has too many marks.
    """
    if len(text) > MAX_TOOL_TEXT:
        raise ValueError(f"it has {len(text)} characters")
    n_marks = len(TOOL_MARK.findall(text))
    if "<atem:" in text:
        n_marks += text.count('name="')
    if n_marks > MAX_TOOL_MARKS:
        raise ValueError(f"it has {n_marks} marks")
