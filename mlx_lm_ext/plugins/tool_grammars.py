"""Grammars for the tool calls of a request, in the format that its model writes.

Rules:
1. What a grammar accepts is read by the server as the calls that were meant: the formats
   here are those of mlx-lm's parsers and of ``server/tool_formats.py``.
2. All functions of a request are written in one way. Otherwise the first token of a call
   would choose between them.
3. A function whose schema the engine of grammars cannot do gets any object of arguments,
   or, if it is strict, the request is refused.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..errors import RequestError, one_line
from ..request.fields import ANY_OBJECT, parse_tool_choice
from ..server.harmony import Harmony, with_channels
from .grammar_rules import Marks, Rules, quoted
from .tool_arguments import (
    Arguments,
    GemmaArguments,
    PythonArguments,
    TaggedArguments,
    TagMarks,
)

NO_ARGUMENTS = {"type": "object", "properties": {}}
TOO_DEEP = "it is nested too deeply"

# The messages in which models with channels think before a call, and the header of the one with
# the call.
HARMONY = (
    '({channel} "analysis" {message} {said}? {end} {start} "assistant")* '
    '({channel} ("analysis" | "commentary"))?'
)
MUSE = '(/ ?to=self/ {message} {said}? {eom} {start} "assistant")* ({to} {message})?'


@dataclass(frozen=True)
class Format:
    """How a model writes calls, in marks as ``Rules.mark`` takes them.

    Args:
        start, end (str): The marks around calls. Without an end, nothing follows them.
        arguments (Callable): Makes what writes the arguments of a function.
        before_name, before_arguments, after (str): What is around the name and the arguments
          of a call.
        is_shared (bool): Whether the marks are around all calls instead of each one.
        comma (str): What is between calls that share the marks.
        around (Tuple[str, str]): What is around these, within the marks.
        is_json (bool): Whether names are texts of JSON.
        is_single (bool): Whether an answer has one call at most.
    """

    start: str
    end: str = ""
    arguments: Callable[[Rules, Any], Arguments] = Arguments
    before_name: str = ""
    before_arguments: str = ""
    after: str = ""
    is_shared: bool = False
    comma: str = "·"
    around: Tuple[str, str] = ("", "")
    is_json: bool = False
    is_single: bool = False


def json_calls(start: str, end: str) -> Format:
    """Calls as objects with ``name`` and ``arguments``, which are read whatever the format.
    Where nothing tells their end, they are in an array."""
    return Format(
        start,
        end,
        Arguments,
        '{·"name"·:·',
        '·,·"arguments"·:·',
        '⟦·,·"id"·:·"ANY_ID"⟧·}',
        is_shared=not end,
        comma="·,·",
        around=("", "") if end else ("[", "]"),
        is_json=True,
    )


def tagged(
    call: Tuple[str, str, str], tags: TagMarks, is_shared: bool = False
) -> Callable[[str, str], Format]:
    """A format with tags around the name and the arguments of a call."""
    arguments = partial(TaggedArguments, tags=tags)
    return partial(
        Format,
        arguments=arguments,
        before_name=call[0],
        before_arguments=call[1],
        after=call[2],
        is_shared=is_shared,
    )


def glm(prefix: str) -> Callable[[str, str], Format]:
    """GLM's format, in which some models mark the tags as their own."""
    key, value = f"{prefix}arg_key", f"{prefix}arg_value"
    tags = TagMarks(f"<{key}>", f"</{key}>·<{value}>", f"</{value}>", (f"<{key}>",))
    return tagged(("", "", ""), tags)


def gemma(quote: str) -> Callable[[str, str], Format]:
    arguments = partial(GemmaArguments, quote=quote)
    return partial(Format, arguments=arguments, before_name="call:")


# By the names of mlx-lm's parsers.
FORMATS: Dict[str, Callable[[str, str], Format]] = {
    "json_tools": json_calls,
    "mistral": partial(Format, before_arguments="⟦[CALL_ID]ANY_ID⟧[ARGS]"),
    "kimi_k2": partial(
        Format,
        before_name="<|tool_call_begin|>functions.",
        before_arguments=":INDEX<|tool_call_argument_begin|>",
        after="<|tool_call_end|>",
        is_shared=True,
    ),
    "kimi_k3": tagged(
        (
            '<|open|>call tool="',
            '" index="INDEX"<|sep|>',
            "<|close|>call<|sep|>",
        ),
        TagMarks(
            '<|open|>argument key="',
            '" type="KIND"<|sep|>',
            "<|close|>argument<|sep|>",
            ("<|open|>", "<|close|>"),
            (("string",), ("number", "integer", "boolean", "object", "array", "null")),
        ),
        is_shared=True,
    ),
    "pythonic": partial(
        Format,
        arguments=PythonArguments,
        before_arguments="(",
        after=")",
        is_shared=True,
        comma=",·",
        around=("[", "]"),
    ),
    "gemma4": gemma('<|"|>'),
    "function_gemma": gemma("<escape>"),
    "qwen3_coder": tagged(
        ("<function=", ">", "·</function>"),
        TagMarks(
            "<parameter=",
            ">\n",
            "\n</parameter>",
            ("<parameter=", "</parameter>"),
        ),
    ),
    "minimax_m2": tagged(
        ('<invoke name="', '">', "·</invoke>"),
        TagMarks('<parameter name="', '">', "</parameter>", ("<parameter name=",)),
        is_shared=True,
    ),
    "minicpm5": tagged(
        ('"', '">', ""),
        TagMarks('<param name="', '">', "</param>", ("<",), data=("<![CDATA[", "]]>")),
    ),
    "glm47": glm(""),
    "longcat": glm("longcat_"),
    "muse_spark": tagged(
        ('<atem:invoke name="', '">', "·</atem:invoke>"),
        TagMarks(
            '<atem:parameter name="',
            '">',
            "</atem:parameter>",
            ("<atem:parameter",),
        ),
        is_shared=True,
    ),
}


# Each header may name the channel, and the type of the arguments.
HARMONY_CALLS = partial(
    Format,
    before_arguments="⟦<|channel|>commentary⟧⟦ json⟧⟦ ⟧⟦<|constrain|>json⟧"
    "<|message|>",
    is_single=True,
)


@dataclass(frozen=True)
class Function:
    """A function that may be called.

    Args:
        field (str): Its place in the request.
        name (str): Its name.
        parameters (Any): The schema of its arguments.
        is_strict (bool): Whether the schema is held in any case.
    """

    field: str
    name: str
    parameters: Any
    is_strict: bool


def tool_grammar(
    body: Dict[str, Any],
    tokenizer: Any,
    check: Callable[[str], str],
    text: Optional[str] = None,
) -> Optional[str]:
    """The grammar of the answers that the tools of a request allow.

    Args:
        body (Dict[str, Any]): The body of a chat, checked.
        tokenizer (TokenizerWrapper): The model's tokenizer.
        check (Callable): Says what is wrong with a grammar, or nothing.
        text (Optional[str]): Rules of Lark, with one named ``text``, which an answer without
          calls has to follow. Their names must not be a letter and a number.

    Returns:
        A grammar in llguidance's Lark; None if nothing has to be restricted.

    Raises:
        RequestError: If a strict function has a schema that cannot be done.
    """
    choice, marks = parse_tool_choice(body), Marks.of(tokenizer)
    tokenizer = with_channels(tokenizer)
    is_forced = choice.mode == "required"
    if choice.mode == "none" or not body.get("tools"):
        return None
    if not is_forced and not tokenizer.has_tool_calling:
        # Its calls stay text.
        return None
    functions: Dict[str, Function] = {}
    for i, tool in enumerate(body["tools"]):
        function, field = tool["function"], f"tools[{i}].function.parameters"
        name, parameters = function["name"], function.get("parameters")
        if choice.allows(name):
            is_strict = function.get("strict") is True
            functions[name] = Function(field, name, parameters, is_strict)
    is_free = not is_forced and text is None and choice.names is None
    if is_free and not any(function.is_strict for function in functions.values()):
        return None
    wanted = [
        f if is_forced or f.is_strict else replace(f, parameters={})
        for f in functions.values()
    ]
    once = choice.is_named or body.get("parallel_tool_calls") is False

    def write(functions: List[Function]) -> str:
        return ToolGrammar(tokenizer, marks, functions, is_forced, once, text).write()

    grammar = write(wanted)
    if not check(grammar):
        return grammar
    wanted = [check_function(function, check) for function in wanted]
    # Each of them may be possible, and all be too much.
    plain = [f if f.is_strict else replace(f, parameters={}) for f in wanted]
    for attempt in (wanted, plain):
        grammar = write(attempt)
        wrong = check(grammar)
        if not wrong:
            return grammar
    raise RequestError(400, f"tools cannot be done: {shorten(wrong)}", "tools")


def check_function(function: Function, check: Callable[[str], str]) -> Function:
    """A function with a schema that can be done: its own, or that of any object."""
    rules = Rules(Marks({}, ()))
    try:
        arguments = Arguments(rules, schema_of(function)).write()
        wrong = check(f"start: {arguments}\n{rules.lines()}")
    except RecursionError:
        wrong = TOO_DEEP
    if wrong and function.is_strict:
        message = f"{function.field} cannot be done with strict: {shorten(wrong)}"
        raise RequestError(400, message, function.field)
    return replace(function, parameters={}) if wrong else function


def shorten(wrong: str) -> str:
    """The part of an error of llguidance that is about the schema."""
    wrong = re.split(r"\s+\d+ \| ", wrong)[0]
    return one_line(ValueError(wrong.partition("JSON schema: ")[2] or wrong))


def schema_of(function: Function) -> Any:
    """The schema of its arguments. A function without one has none."""
    return (
        NO_ARGUMENTS
        if function.parameters is None
        else function.parameters or ANY_OBJECT
    )


class ToolGrammar:
    """Writes a grammar.

    Args:
        tokenizer (TokenizerWrapper): The model's tokenizer.
        marks (Marks): Its tokens that are no text.
        functions (List[Function]): The functions that may be called.
        is_forced (bool): Whether the answer must be calls.
        once (bool): Whether it may have one call only.
        text (Optional[str]): The rules for an answer without calls.
    """

    def __init__(
        self,
        tokenizer: Any,
        marks: Marks,
        functions: List[Function],
        is_forced: bool,
        once: bool,
        text: Optional[str],
    ):
        self.tokenizer = tokenizer
        self.functions = functions
        self.is_forced = is_forced
        self.once = once
        self.text = text
        self.marks, self.rules = marks, Rules(marks)

    def write(self) -> str:
        form, calls = self.write_calls()
        once = self.once or form.is_single
        rules, mark = self.rules, self.rules.mark
        call = rules.either(calls)
        start, end = mark(form.start), mark(form.end)
        # All that follows the first mark.
        inside = [call]
        if form.is_shared and not once:
            inside.append(f"({mark(form.comma)} {call})*")
        first, last = map(mark, form.around)
        inside = [rules.space, first, rules.space, *inside, rules.space, last, end]
        rest = rules.add(" ".join(filter(None, inside)))
        has_more = not form.is_shared and not once
        more = f"({rules.space} {start} {rest})*" if has_more else ""
        # A header ends right at the mark.
        lead = self.write_lead() or rules.space
        calls_only = f"{lead} {start} {rest} {more} {rules.space}"
        if self.is_forced:
            top = calls_only
        elif self.text is not None:
            top = f"text | {calls_only}"
        else:
            top = self.write_free(form.start, rest, more, bool(form.end))
        return "\n".join([f"start: {top}", rules.lines(), self.text or ""])

    def write_calls(self) -> Tuple[Format, List[str]]:
        """The calls of all functions, in the format of the model if it can hold them."""
        tokenizer = self.tokenizer
        start, end = tokenizer.tool_call_start or "", tokenizer.tool_call_end or ""
        if not tokenizer.has_tool_calling:
            start = end = ""
        make = self.find_format()
        if make is not None:
            form = make(start, end)
            calls = [self.write_call(form, function) for function in self.functions]
            if None not in calls:
                return form, list(filter(None, calls))
        # Without the rules of the format.
        self.rules = Rules(self.marks)
        form = json_calls(start, end)
        calls = [self.write_call(form, function) for function in self.functions]
        return form, list(filter(None, calls))

    def find_format(self) -> Optional[Callable[[str, str], Format]]:
        """The format of the model; None if it is not known, and calls are JSON."""
        module = getattr(self.tokenizer.tool_parser, "__module__", None) or ""
        package, _, name = module.rpartition(".")
        if self.tokenizer.tool_parser is Harmony.tool_parser:
            return HARMONY_CALLS
        if package != "mlx_lm.tool_parsers":
            return None
        if name == "mistral" and "[ARGS]" not in self.marks.ids:
            return None
        return FORMATS.get(name)

    def write_call(self, form: Format, function: Function) -> Optional[str]:
        """The call of a function; None if the format cannot hold it."""
        arguments = form.arguments(self.rules, schema_of(function))
        name, mark = function.name, self.rules.mark
        if form.is_json:
            name = json.dumps(name, ensure_ascii=False)
        elif not arguments.names.fullmatch(name):
            return None
        try:
            written = arguments.write()
        except RecursionError:
            if form.is_json and function.is_strict:
                message = f"{function.field} cannot be done with strict: {TOO_DEEP}"
                raise RequestError(400, message, function.field)
            arguments = form.arguments(self.rules, ANY_OBJECT)
            written, arguments.is_exact = arguments.write(), False
        if function.is_strict and not arguments.is_exact:
            return None
        before = form.before_arguments
        parts = [mark(form.before_name), quoted(name), mark(before), written]
        return self.rules.add(" ".join(filter(None, [*parts, mark(form.after)])))

    def write_lead(self) -> str:
        """What models with channels may write before the first mark."""
        if self.tokenizer.tool_parser is Harmony.tool_parser:
            lead = HARMONY
        elif "header" in self.tokenizer.response_transitions:
            lead = MUSE
        else:
            return ""
        tokens = "channel message start end eom".split()
        marks = {name: self.rules.mark(f"<|{name}|>") for name in tokens}
        lacks = [*(f"<|{name}|>" for name in tokens), self.tokenizer.tool_call_start]
        said = self.rules.lacking("/(?s:.+)/", lacks)
        to = self.rules.terminal("/ ?to=[A-Za-z0-9_.-]{1,64}/")
        return lead.format_map({**marks, "said": said, "to": to})

    def write_free(self, start: str, rest: str, more: str, has_end: bool) -> str:
        """Any text, with calls in it that follow the rules.

        Args:
            start (str): The mark of a call.
            rest (str): The rule of what follows this mark.
            more (str): Calls that follow it.
            has_end (bool): Whether text may follow them.
        """
        rules, marks = self.rules, self.marks
        first, *others = marks.split(start)
        # Without the mark in other spellings. No two texts may stand side by side: the second
        # one could go on with a mark.
        text = rules.lacking("/(?s:.+)/", [start])
        after = f"{text}?" if has_end else '""'
        special = marks.others(first)
        if first not in marks.ids:
            head = rules.add(f"{rules.any} {quoted(first)}", options="[lazy]")
            call = " ".join([head, *map(marks.write, others), rest])
            if self.once or not has_end:
                lead = f"({text}? {special})*" if special else ""
                return f"{lead} ({text}? | {call} {more} {after})"
            part = rules.add(f"({call})* {text}?")
            return f"{part} ({special} {part})*" if special else part
        items = [f"{special} {text}?"] if special else []
        if others:
            # The first token alone begins other things, too.
            other = rules.terminal(
                f"/(?s:.+)/ & ~({quoted(others[0])} {rules.any}) "
                f"& ~({rules.any} {quoted(start)} {rules.any})"
            )
            items.append(f"{marks.token(first)} {other}?")
        call = " ".join([marks.write(start), rest])
        if self.once or not has_end:
            lead = f"({' | '.join(items)})*" if items else ""
            return f"{text}? {lead} ({call} {more} {after})?"
        items.append(f"{call} {text}?")
        return f"{text}? ({' | '.join(items)})*"
