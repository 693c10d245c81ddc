"""Writes the arguments of tool calls as rules of a grammar: JSON, and the notations of models
that write something else.

Rules:
1. What the rules accept is valid, or ``is_exact`` becomes false: the notation cannot hold a
   part of the schema. Where a schema allows several ways to write a value, one is enough.
2. Nothing is accepted that its reader in ``server/tool_formats.py`` would not find again.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

from .grammar_rules import Rules, quoted
from .schema_parts import (
    Fields,
    Schema,
    Schemas,
    copied,
    is_text,
    keywords,
)

SCALARS = {
    "null": '"null"',
    "boolean": '("true" | "false")',
    "integer": "/-?(0|[1-9][0-9]{0,30})/",
    "number": r"/-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?/",
}
# A character in a text of JSON, of which none is half of a surrogate pair. An escaped slash is
# none in Python.
CHARACTER = (
    r"""([^"\\\x00-\x1f\x7f]|\\["\\bfnrt]|\\u([0-9a-cA-CefEF][0-9a-fA-F]{3}"""
    r"""|[dD][0-7][0-9a-fA-F]{2}))"""
)
ARRAY, TEXT = {"type", "items", "minItems", "maxItems"}, {"type"}
LENGTHS = ("minLength", "maxLength")
# The most that a length in a grammar may be, and values in each other.
MAX_LENGTH, MAX_DEPTH = 4096, 64
# A key that no schema lists, where keys are not in quotes.
KEY = "/[A-Za-z_][A-Za-z0-9_-]{0,63}/"


def is_scalar(leaf: Dict[str, Any]) -> bool:
    """Whether all values of a simple type are allowed."""
    return keywords(leaf) == {"type"} and leaf["type"] in SCALARS


def bounds(leaf: Dict[str, Any], names: Tuple[str, str]) -> Optional[Tuple[int, str]]:
    """The least and the most of a length, or nothing; None if they cannot be held."""
    least, most = leaf.get(names[0], 0), leaf.get(names[1], MAX_LENGTH)
    if type(least) is not int or type(most) is not int:
        return None
    if not 0 <= least <= most <= MAX_LENGTH:
        return None
    return least, str(most) if names[1] in leaf else ""


class Arguments:
    """Writes the arguments of one function as JSON. Subclasses write other notations.

    Args:
        rules (Rules): Where the rules go.
        parameters (Schema): The schema of the function.
    """

    # What names of functions and of arguments look like that can be written.
    names = re.compile(r"[^\s<>\[\]{}()\"'`,:=&|]+")

    def __init__(self, rules: Rules, parameters: Schema):
        self.rules = rules
        self.schemas = Schemas(parameters)
        self.is_exact = True

    def write(self) -> str:
        """The name of the rule of all arguments."""
        return self.rules.json(copied(self.closed()))

    def closed(self) -> Schema:
        """The schema as that of an object, without other keys than it lists."""
        root = self.schemas.root
        fields = self.schemas.fields(root)
        if fields is not None and fields.extra is None and "$ref" not in root:
            return {**root, "type": "object", "additionalProperties": False}
        kinds = root.get("type", "object")
        if kinds == "object" or (isinstance(kinds, list) and "object" in kinds):
            return {**root, "type": "object"}
        # Nothing fits it: the arguments of a call are an object.
        return {"type": "object", "allOf": [{"type": kinds}]}

    def fields(self) -> Fields:
        """The arguments one by one, as far as that can be said."""
        fields = self.schemas.fields(self.schemas.root)
        if fields is None or not all(self.names.fullmatch(k) for k, *_ in fields.named):
            self.is_exact = False
            return Fields([], {})
        return fields

    def other_key(self, fields: Fields) -> str:
        """A terminal for the names that are not listed."""
        listed = " | ".join(quoted(key) for key, *_ in fields.named)
        return self.rules.terminal(f"{KEY} & ~({listed})" if listed else KEY)


class Values:
    """Writes values as JSON without some texts in it, which would end it too early.

    Args:
        arguments (Arguments): Those that the values are for.
        lacks (Tuple[str, ...]): The texts.
    """

    def __init__(self, arguments: Arguments, lacks: Tuple[str, ...] = ()):
        self.arguments, self.lacks = arguments, lacks
        self.rules, self.schemas = arguments.rules, arguments.schemas
        # The rules of what is referred to.
        self.referred: Dict[int, str] = {}
        self.depth = 0
        self.any_name = ""

    def write(self, schema: Schema) -> str:
        """The name of the rule of a value."""
        target = self.schemas.resolve(schema)
        if target is schema:
            return self.write_leaves(schema)
        if id(target) not in self.referred:
            name = self.referred[id(target)] = self.rules.reserve()
            self.rules.reserved[name] = self.write_leaves(target)
        return self.referred[id(target)]

    def write_leaves(self, schema: Schema) -> str:
        leaves = self.schemas.leaves(schema)
        if leaves is None:
            return self.write_other(schema)
        if {} in leaves:
            return self.write_any()
        return self.rules.either(self.write_leaf(leaf) for leaf in leaves)

    def write_leaf(self, leaf: Dict[str, Any]) -> str:
        self.depth += 1
        written = self.write_one(leaf) if self.depth <= MAX_DEPTH else None
        self.depth -= 1
        return self.write_other(leaf) if written is None else written

    def write_one(self, leaf: Dict[str, Any]) -> Optional[str]:
        if is_scalar(leaf):
            return SCALARS[leaf["type"]]
        kind = leaf.get("type", "")
        write = {"object": self.write_object, "array": self.write_array}.get(kind)
        if is_text(leaf):
            write = self.write_text
        return write(leaf) if write else None

    def write_other(self, schema: Schema) -> str:
        """What is no list of keys or alternatives."""
        # A type of a wrong schema may be anything, and have no hash.
        if isinstance(schema, dict) and (
            "enum" in schema or schema.get("type") in tuple(SCALARS)
        ):
            return self.rules.json(schema)
        self.arguments.is_exact = False
        return self.write_any()

    def write_object(self, leaf: Dict[str, Any]) -> Optional[str]:
        fields = self.schemas.fields(leaf)
        if fields is None:
            return None
        space, extra = self.rules.space, None
        items = [
            (f"{self.key(key)} {self.write(schema)}", is_needed)
            for key, schema, is_needed in fields.named
        ]
        if fields.extra is not None:
            name = self.other_key(fields)
            extra = f'{name} {space} ":" {space} {self.write(fields.extra)}'
        body = self.rules.listed(items, extra)
        return self.rules.add(f'"{{" {space} {body} {space} "}}"')

    def write_array(self, leaf: Dict[str, Any]) -> Optional[str]:
        length = bounds(leaf, ("minItems", "maxItems"))
        if keywords(leaf) - ARRAY or length is None:
            return None
        space, (least, most) = self.rules.space, length
        item = self.write(leaf.get("items", {}))
        rest = f"{{{max(least - 1, 0)},{int(most) - 1 if most else ''}}}"
        body = f'{item} ({space} "," {space} {item}){rest}'
        if most == "0":
            body = '""'
        elif least == 0:
            body = f"({body})?"
        return self.rules.add(f'"[" {space} {body} {space} "]"')

    def write_any(self) -> str:
        """Any value, written once."""
        if not self.any_name:
            space, name = self.rules.space, self.rules.reserve()
            pair = f'{self.any_key()} {space} ":" {space} {name}'
            some, pairs = self.rules.listed([], name), self.rules.listed([], pair)
            self.rules.reserved[name] = (
                f'{self.any_text()} | {SCALARS["number"]} | "true" | "false" | "null" '
                f'| "[" {space} {some} {space} "]" | "{{" {space} {pairs} {space} "}}"'
            )
            self.any_name = name
        return self.any_name

    # Texts and keys

    def write_text(self, leaf: Dict[str, Any]) -> Optional[str]:
        if "enum" in leaf:
            if keywords(leaf) - TEXT - {"enum"}:
                return None
            texts = [json.dumps(text, ensure_ascii=False) for text in leaf["enum"]]
            texts = [t for t in texts if not any(lack in t for lack in self.lacks)]
            return self.rules.either(map(quoted, texts)) if texts else None
        length = bounds(leaf, LENGTHS)
        if keywords(leaf) - TEXT - {*LENGTHS} or length is None:
            return None
        return self.text_terminal(*length)

    def any_text(self) -> str:
        return self.text_terminal()

    def any_key(self) -> str:
        return self.text_terminal()

    def text_terminal(self, least: int = 0, most: str = "") -> str:
        count = f"{{{least},{most}}}" if least or most else "*"
        return self.rules.lacking(f'/"{CHARACTER}{count}"/', self.lacks)

    def key(self, key: str) -> str:
        """A key, and the colon after it."""
        space = self.rules.space
        text = quoted(json.dumps(key, ensure_ascii=False))
        return f'{text} {space} ":" {space}'

    def other_key(self, fields: Fields) -> str:
        """A terminal for the keys that are not listed."""
        listed = " | ".join(
            quoted(json.dumps(key, ensure_ascii=False)) for key, *_ in fields.named
        )
        # Not with escapes, in which a listed key could be written.
        text = self.rules.lacking(r'/"[^"\\\x00-\x1f\x7f]*"/', self.lacks)
        return self.rules.terminal(f"{text} & ~({listed})") if listed else text


class PythonArguments(Arguments):
    """``a=1, b="x"``: the values are JSON."""

    names = re.compile(r"[\w.-]+")

    def write(self) -> str:
        fields, values = self.fields(), Values(self)
        items = [
            (f'{quoted(key)} "=" {values.write(schema)}', is_needed)
            for key, schema, is_needed in fields.named
        ]
        extra = None
        if fields.extra is not None:
            extra = f'{self.other_key(fields)} "=" {values.write(fields.extra)}'
        return self.rules.listed(items, extra)


@dataclass(frozen=True)
class TagMarks:
    """Tags around the texts of arguments.

    Args:
        before_key, before_value, after_value (str): The marks, as ``Rules.mark`` takes them.
        lacks (Tuple): What a value may not have in it.
        kinds (Tuple): What stands for ``KIND`` before values that are texts or are not.
        data (Optional[Tuple]): Marks around texts that may have all in them but the second.
    """

    before_key: str
    before_value: str
    after_value: str
    lacks: Tuple[str, ...]
    kinds: Tuple[Tuple[str, ...], Tuple[str, ...]] = (("",), ("",))
    data: Optional[Tuple[str, str]] = None


class TaggedArguments(Arguments):
    """Tags around texts, of which those that are no strings are JSON."""

    def __init__(self, rules: Rules, parameters: Schema, tags: TagMarks):
        super().__init__(rules, parameters)
        self.tags = tags
        self.values = Values(self, (*tags.lacks, tags.after_value.strip()))

    def write(self) -> str:
        fields = self.fields()
        space = self.rules.space
        parts = [
            f"({space} {self.item(quoted(key), schema)}){'' if is_needed else '?'}"
            for key, schema, is_needed in fields.named
        ]
        if fields.extra is not None:
            item = self.item(self.other_key(fields), fields.extra)
            parts.append(f"({space} {item})*")
        return self.rules.add(" ".join(parts) or '""')

    def item(self, key: str, schema: Schema) -> str:
        choices = []
        for kinds, body in zip(self.tags.kinds, self.bodies(schema)):
            for kind in kinds if body else ():
                between = self.tags.before_value.replace("KIND", kind)
                choices.append(f"{key} {self.rules.mark(between)} {body}")
        mark = self.rules.mark(self.tags.before_key)
        return self.rules.add(f"{mark} ({' | '.join(choices)})")

    def bodies(self, schema: Schema) -> Tuple[Optional[str], Optional[str]]:
        """A value that is a text, and one that is JSON, each with the mark after it. One of
        them may be None."""
        end = self.rules.mark(self.tags.after_value)
        is_told = self.tags.kinds[0] != self.tags.kinds[1]
        leaves = self.schemas.leaves(schema)
        if leaves is None:
            self.is_exact = False
        if leaves is None or {} in leaves:
            value = f"{self.values.write_any()} {end}" if is_told else None
            return self.free_text(), value
        texts = [leaf for leaf in leaves if is_text(leaf)]
        others = [leaf for leaf in leaves if not is_text(leaf)]
        if not texts:
            return None, f"{self.values.write(schema)} {end}"
        choices = [choice for leaf in texts for choice in self.texts(leaf)]
        # Where nothing tells the type, a text that is JSON of another one is read as such.
        if not choices or not (is_told or all(map(is_scalar, others))):
            self.is_exact = False
            return self.free_text(), None
        if not is_told and any(keywords(leaf) == TEXT for leaf in texts):
            others = []
        value = " | ".join(map(self.values.write_leaf, others))
        return self.rules.either(choices), f"({value}) {end}" if others else None

    def texts(self, leaf: Dict[str, Any]) -> List[str]:
        """The texts that a schema allows."""
        length = bounds(leaf, LENGTHS)
        if "enum" in leaf:
            if keywords(leaf) - TEXT - {"enum"}:
                self.is_exact = False
            return self.listed_texts(leaf["enum"])
        if keywords(leaf) <= {*TEXT, *LENGTHS} and length is not None:
            return [self.free_text(*length)]
        self.is_exact = False
        return [self.free_text()]

    def free_text(self, least: int = 0, most: str = "") -> str:
        end = self.tags.after_value
        text = self.rules.text_until(end, self.tags.lacks, least, most)
        if self.tags.data is None:
            return self.rules.add(text)
        before, after = self.tags.data
        data = self.rules.text_until(after + end, (after,), least, most)
        return self.rules.either([text, f"{self.rules.mark(before)} {data}"])

    def listed_texts(self, values: List[str]) -> List[str]:
        end = self.rules.mark(self.tags.after_value)
        return [
            f"{quoted(value)} {end}" if value else end
            for value in values
            if not any(lack in value for lack in self.values.lacks)
        ]


class GemmaValues(Values):
    """Writes values in Gemma's notation: ``{key:<|"|>text<|"|>,n:5}``. What it cannot hold is
    JSON, which its reader takes as well."""

    def __init__(self, arguments: Arguments, quote: str):
        super().__init__(arguments)
        self.quote = quote

    def write_other(self, schema: Schema) -> str:
        alone = self.schemas.alone(schema)
        if alone is None:
            self.arguments.is_exact = False
            return self.write_any()
        return self.rules.json(alone)

    def write_text(self, leaf: Dict[str, Any]) -> Optional[str]:
        if keywords(leaf) == TEXT:
            return self.any_text()
        mark = self.rules.mark(self.quote)
        texts = leaf.get("enum", [self.quote])
        is_listed = keywords(leaf) <= {*TEXT, "enum"}
        if not is_listed or any(self.quote in text for text in texts):
            return None
        return self.rules.either(
            f"{mark} {quoted(text) if text else ''} {mark}" for text in texts
        )

    def key(self, key: str) -> str:
        if not self.arguments.names.fullmatch(key):
            return super().key(key)
        space = self.rules.space
        return f'{quoted(key)} {space} ":" {space}'

    def other_key(self, fields: Fields) -> str:
        return self.arguments.other_key(fields)

    def any_key(self) -> str:
        return self.rules.terminal(KEY)

    def any_text(self) -> str:
        text = self.rules.text_until(self.quote, (self.quote,))
        return f"{self.rules.mark(self.quote)} {text}"


class GemmaArguments(Arguments):
    """Gemma's notation of an object.

    Args:
        rules (Rules): Where the rules go.
        parameters (Schema): The schema of the function.
        quote (str): The mark around texts.
    """

    def __init__(self, rules: Rules, parameters: Schema, quote: str):
        super().__init__(rules, parameters)
        self.quote = quote

    def write(self) -> str:
        return GemmaValues(self, self.quote).write(self.closed())
