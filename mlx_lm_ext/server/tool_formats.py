"""The formats in which models write tool calls, where upstream's parsers are not exact.

Those take a call that was cut off for a whole one, drop a broken call beside a good one,
strip texts, and take the text ``null`` for null. Here, as there, a call is a dictionary with
``name``, ``arguments`` and perhaps ``id``.

Rules:
1. A text is read to its end: what is neither a call nor white space is a ValueError.
2. The time is linear in the length of the text: patterns of white space and names take all
   or nothing (``*+``).
"""

import ast
import json
import re
from typing import Any, Callable, Dict, List, Tuple

from .tool_values import DECODER

Calls = List[Dict[str, Any]]


# An escape of JSON, or a backslash that is none: models write those in patterns and paths.
ESCAPE = re.compile(r"\\(?:[\"\\/bfnrt]|u[0-9a-fA-F]{4})?")


class Unfinished(Exception):
    """A text ends within a value. No ValueError, which upstream takes for a broken call."""


SPACE = re.compile(r"\s*")
# What may be between calls, and too many brackets.
BETWEEN = re.compile(r"[\s\]},]*+")


def after(pattern: re.Pattern, text: str, at: int) -> int:
    """Where a pattern ends that begins at a character, or that character."""
    match = pattern.match(text, at)
    return match.end() if match else at


def decode_at(text: str, at: int) -> Tuple[Any, int]:
    """The value of JSON that begins at a character, and where it ends.

    Raises:
        Unfinished: If the text ends within a string.
        ValueError: If it is not JSON.
    """
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError as e:
        # An escape that ends the text has an error of its own.
        if e.msg.startswith(("Unterminated string", r"Invalid \uXXXX")):
            raise Unfinished("a string does not end")
        raise


def with_escapes(text: str) -> str:
    """JSON whose backslashes are all escapes."""
    return ESCAPE.sub(lambda match: match[0] if match[0][1:] else r"\\", text)


def read_json(text: str) -> List[Any]:
    """The values of JSON that a text consists of, those of a list one by one."""
    text = with_escapes(text)
    at = after(SPACE, text, 0)
    values = []
    while at < len(text):
        value, at = decode_at(text, at)
        values += value if isinstance(value, list) else [value]
        at = after(BETWEEN, text, at)
    return values


class Headed:
    """A format in which a call is JSON after a header.

    Args:
        header (str): Pattern with the group ``name`` and perhaps ``id``.
        end (str): Pattern of the mark of a call's end, which may be missing.
        closing (str): Pattern of what may be between the arguments and that mark.
    """

    def __init__(self, header: str, end: str = "", closing: str = ""):
        self.start = re.compile(rf"\s*+{header}\s*+")
        self.start_of_object = re.compile(rf"{self.start.pattern}(?={{)")
        self.stop = re.compile(rf"\s*+{closing}(?:{end})?\s*+")
        self.end = re.compile(rf"{end}|\Z" if end else r"\Z")

    def read(self, text: str) -> Calls:
        """Read all calls of a text."""
        text = with_escapes(text)
        calls, at = [], 0
        while at < len(text):
            match = self.start.match(text, at)
            if match is None:
                raise ValueError(f"there is no call at character {at}")
            arguments, at = decode_at(text, match.end())
            calls.append(match.groupdict() | {"arguments": arguments})
            at = after(self.stop, text, at)
        return calls


# Gemma's notation: its marks of strings, and keys and words without any.
GEMMA_TOKEN = re.compile(
    r'(?P<json>"(?:[^"\\]|\\.)*")'
    r'|<escape>(?P<old>.*?)<escape>|<\|"\|>(?P<new>.*?)<\|"\|>'
    r'|(?P<open>"|<escape>|<\|"\|>)'
    r'|(?P<call>call:[^\s{}\[\],:<"]+(?=\s*\{))'
    r'|(?<=[{,])\s*(?P<key>[^\s{}\[\],:<"]+)\s*:'
    r'|(?<=[:\[,])\s*(?P<word>[^\s{}\[\],<"][^{}\[\],<"]*)',
    re.DOTALL,
)


GEMMA = Headed(r"call:(?P<name>[^\s{}]+)")


def gemma_token_to_json(token: re.Match) -> str:
    kind, text = token.lastgroup, token[token.lastgroup]
    if kind == "open":
        raise Unfinished("a string does not end")
    if kind == "key":
        return json.dumps(text) + ":"
    if kind == "word":
        try:
            DECODER.decode(text)
            kind = "json"
        except ValueError:
            text = text.strip()
    return text if kind in ("json", "call") else json.dumps(text)


def read_gemma(text: str) -> Calls:
    return GEMMA.read(GEMMA_TOKEN.sub(gemma_token_to_json, text))


# What of a Python call may be no Python: names with dots, hyphens or keywords, the words of
# JSON, and line breaks in strings.
PYTHON_TOKEN = re.compile(
    r'(?P<string>"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')|(?P<open>["\'])'
    r"|(?<![\w.-])(?:(?P<name>[\w.-]+)\s*(?P<sign>[=(])|(?P<word>true|false|null)\b)",
    re.DOTALL,
)
PYTHON_WORDS = {"true": "True", "false": "False", "null": "None"}


def read_pythonic(text: str) -> Calls:
    """Calls as in Python: ``[f(a=1), g(b="x")]``."""
    names: List[str] = []

    def to_python(token: re.Match) -> str:
        if token["open"]:
            raise Unfinished("a string does not end")
        if token["string"]:
            return token[0].replace("\n", "\\n").replace("\r", "\\r")
        if token["word"]:
            return PYTHON_WORDS[token["word"]]
        names.append(token["name"])
        return f"_{len(names) - 1}{token['sign']}"

    source = PYTHON_TOKEN.sub(to_python, text).strip()
    body = ast.parse(source, mode="eval").body
    calls = []
    for node in body.elts if isinstance(body, ast.List) else [body]:
        if (
            not isinstance(node, ast.Call)
            or not isinstance(node.func, ast.Name)
            or node.args
        ):
            raise ValueError("there is something else than calls with named arguments")
        # A name that has not been replaced, or none, is no number.
        name, *keys = (
            names[int(str(n)[1:])]
            for n in (node.func.id, *(k.arg for k in node.keywords))
        )
        values = (ast.literal_eval(k.value) for k in node.keywords)
        calls.append({"name": name, "arguments": dict(zip(keys, values))})
    return calls


def check_kimi_k3(text: str, calls: List[Any]) -> None:
    """Check that upstream's parser has left out nothing.

    Raises:
        ValueError: If a call or an argument of the text is missing.
    """
    n_open, n_closed = (text.count(f"<|{s}|>argument") for s in ("open", "close"))
    if n_open != n_closed or text.count("<|open|>call") != len(calls):
        raise ValueError("a call is not whole")


class Tags:
    """A format with tags around the text of each argument, as in XML without its escapes.

    Args:
        start (str): Pattern of the start of a call, with the group ``name``.
        opening (str): Pattern of what an argument begins with.
        argument (str): Pattern of the rest of it, with the group ``name``, ``VALUE`` in place
          of its value, and perhaps the group ``data``, a value that is marked as text.
        end (str): Pattern of the end of a call.
        is_json (bool): Whether values that are no strings are written as JSON. If not, a
          value without a schema is a string.
        is_bare (bool): Whether a call has no tags but those of its arguments.
    """

    def __init__(
        self,
        start: str,
        opening: str,
        argument: str,
        end: str,
        is_json: bool = False,
        is_bare: bool = False,
    ):
        self.opening = opening
        self.start, self.opens, self.end = (
            re.compile(rf"\s*+{p}\s*+") for p in (start, opening, end)
        )
        # A value may have the closing tag in it: what follows tells which one is the last.
        # With another opening tag in it, a closing one is missing somewhere.
        value = rf"(?P<value>(?:(?!{opening}).)*?)"
        argument = argument.replace("VALUE", value)
        self.argument = re.compile(
            rf"\s*+{opening}{argument}(?=\s*+(?:{opening}|{end}))", re.DOTALL
        )
        self.is_json, self.is_bare = is_json, is_bare

    def read(self, text: str, is_cut: bool) -> Calls:
        """Read all calls; the arguments are the texts between the tags.

        Args:
            text (str): The text.
            is_cut (bool): Whether the answer has ended in the middle of the text. Then a
              call needs its own end.
        """
        calls, at = [], 0
        while at < len(text):
            start = self.start.match(text, at)
            if start is None:
                raise ValueError(f"there is no call at character {at}")
            at, arguments = start.end(), {}
            while match := self.argument.match(text, at):
                groups, at = match.groupdict(), match.end()
                data = groups.get("data")
                value = groups["value"] if data is None else data
                arguments[groups["name"].strip()] = value
            end = self.end.match(text, at)
            if end is None and self.opens.match(text, at):
                raise Unfinished(f"an argument does not end at character {at}")
            if end is None or (is_cut and not end[0].strip()):
                raise ValueError(f"a call does not end at character {at}")
            at = end.end()
            calls.append({"name": start["name"].strip(), "arguments": arguments})
        return calls


WORD = r"\s*+(?P<name>[^\s<>]++)"
QUOTED = r"""\s*+["']?(?P<name>[^"'<>]++)["']?\s*+"""


def arg_tags(prefix: str) -> Tags:
    """GLM's format, in which some models mark the tags as their own."""
    key, value = f"{prefix}arg_key", f"{prefix}arg_value"
    # White space between tags may be written as an escape.
    space = r"(?:\\n|\s)*+"
    return Tags(
        r"(?P<name>[^\s<]++)",
        f"<{key}>",
        rf"(?P<name>[^<]*)</{key}>{space}<{value}>VALUE</{value}>{space}",
        r"\Z",
        is_json=True,
        is_bare=True,
    )


TAGS = {
    "qwen3_coder": Tags(
        rf"<function={WORD}>?",
        "<parameter=",
        rf"{WORD}>?\n?VALUE\n?</parameter>",
        "</function>",
    ),
    "minimax_m2": Tags(
        rf"<invoke name={QUOTED}>",
        "<parameter name=",
        rf"{QUOTED}>VALUE</parameter>",
        "</invoke>",
    ),
    # The marks of the model are the start of the first call and the end of the last.
    "minicpm5": Tags(
        rf"(?:<function\s+name\s*=)?{QUOTED}>",
        r"<param\s+name\s*=",
        rf"{QUOTED}>(?:\s*<!\[CDATA\[(?P<data>(?:(?!\]\]>).)*)\]\]>\s*|VALUE)</param>",
        r"(?:</function>|\Z)",
    ),
    "muse_spark": Tags(
        r"(?:<atem:function_calls>\s*)?"
        r"<atem:invoke\b(?>[^>]*?\bname=\"(?P<name>[^\"]+)\")[^>]*+>",
        r"<atem:parameter\b",
        r"(?>[^>]*?\bname=\"(?P<name>[^\"]+)\")[^>]*+>VALUE</atem:parameter>",
        r"(?:</atem:invoke>(?:\s*</atem:function_calls>)?|\Z)",
        is_json=True,
    ),
    "glm47": arg_tags(""),
    "longcat": arg_tags("longcat_"),
}

# A call that is an object of JSON, up to its arguments; what a mark may begin with is in no
# text of it. Other keys may follow them, and too many brackets.
JSON = Headed(
    r"\[?\s*+\{\s*+(?:"
    r'"id"\s*+:\s*+"(?P<id>[^"\\<]*+)"\s*+,\s*+'
    r'|"(?:id|type|index)"\s*+:\s*+(?:"[^"\\<]*+"|\d++|null)\s*+,\s*+'
    r'|"(?:function|tool)"\s*+:\s*+\{\s*+'
    r'|"(?:name|function)"\s*+:\s*+"(?P<name>(?=\s*+[^\s"])[^"\\<]++)"\s*+,\s*+'
    r')*+(?(name)|(?!))"(?:arguments|parameters|args|input)"\s*+:',
    closing=r'(?:\s*+,\s*+"\w++"\s*+:\s*+(?:"[^"\\<]*+"|[\w.+-]++))*+[\s\]},]*+',
)

# The formats whose arguments are JSON.
HEADED = {
    "mistral": Headed(
        r"(?:\[TOOL_CALLS\])?\s*+(?P<name>[^\s\[\]{}]+)\s*"
        r"(?:\[CALL_ID\]\s*(?P<id>[^\s\[\]{}]+)\s*)?\[ARGS\]",
        r"(?=\[TOOL_CALLS\])",
    ),
    "kimi_k2": Headed(
        r"(?:<\|tool_call_begin\|>)?\s*+"
        r"(?P<id>(?:functions\.)?(?P<name>[^\s<]+):\d+)\s*"
        r"<\|tool_call_argument_begin\|>",
        r"<\|tool_call_end\|>",
    ),
    "harmony": Headed(
        r"(?P<name>[^\s<]+)(?:(?!<\|message\|>)[^{])*<\|message\|>",
        r"<\|(?:call|end)\|>",
    ),
}

READERS: Dict[str, Callable[[str], Calls]] = {
    "pythonic": read_pythonic,
    "gemma4": read_gemma,
    "function_gemma": read_gemma,
    **{name: headed.read for name, headed in HEADED.items()},
}
