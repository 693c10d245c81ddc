"""The values of tool calls: JSON, and texts that become what the client's schema says.

Rules:
1. A value is changed only if the schema does not allow it as it is, and stays as it is if
   nothing that the schema allows can be made of it.
2. A text that the schema allows stays that text, character by character, unless it also is
   JSON of another allowed type: ``5`` for an integer or a string is the integer.
3. No schema is wrong enough to raise, and none takes long.
"""

import ast
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Dict, FrozenSet, Iterator, List, Union
from urllib.parse import unquote

from ..request.json_text import well_formed

# Schemas that are looked at for one argument, references and alternatives included.
MAX_SCHEMAS = 256

ALTERNATIVES = ("anyOf", "oneOf", "allOf")

# How names of types begin, those of Python and of databases included.
TYPE_NAMES = re.compile(
    "(?P<string>str|text|varchar|char|enum)|(?P<integer>u?int|long|short|unsigned)|"
    "(?P<number>num|float|double)|(?P<boolean>bool|binary)|(?P<object>obj|dict)|"
    "(?P<array>arr|list)|(?P<null>null|none)",
    re.I,
)
WORDS = dict.fromkeys(("true", "yes", "on", "1"), True)
WORDS |= dict.fromkeys(("false", "no", "off", "0"), False)
INTEGER = re.compile(r"([+-]?\d+)(\.0*)?", re.A)
NUMBER = re.compile(r"[+-]?(\d++\.?\d*|\.\d+)(e[+-]?\d+)?", re.A | re.I)


def finite(digits: str) -> Union[float, str]:
    """The number, or its digits if it has no place among the finite ones."""
    number = float(digits)
    return number if math.isfinite(number) else digits


# Models write line breaks in strings. NaN and the infinities are no JSON: they become
# texts, which no client can take for another number.
DECODER = json.JSONDecoder(strict=False, parse_constant=str, parse_float=finite)


def as_json(value: Any) -> Any:
    """The value as a client gets it: numbers are finite, halves of characters are joined or
    U+FFFD.

    Raises:
        TypeError: If JSON has no such value.
    """
    return DECODER.decode(well_formed(json.dumps(value, ensure_ascii=False)))


def decode_object(value: Any) -> Dict[str, Any]:
    """The arguments of a call. Some models write them as a text of JSON, or null for none.

    Raises:
        ValueError: If they are no object.
    """
    if isinstance(value, str):
        value = DECODER.decode(value) if value.strip() else None
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return value


@dataclass(frozen=True)
class Allowed:
    """What a schema allows.

    Args:
        types (FrozenSet[str]): The types of JSON. Without any, the schema does not tell.
        values (List[Any]): Those that it lists.
    """

    types: FrozenSet[str]
    values: List[Any]

    def has_type_of(self, value: Any) -> bool:
        kind = type_of(value)
        return kind in self.types or (kind == "integer" and "number" in self.types)


def type_of(value: Any) -> str:
    """The type of a value of JSON."""
    if value is None:
        return "null"
    # The order matters: a bool is an int.
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    kinds |= {dict: "object", list: "array", tuple: "array"}
    return next((kinds[cls] for cls in kinds if isinstance(value, cls)), "")


def list_of(schema: Dict[str, Any], name: str) -> List[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def all_of(schema: Any, root: Any) -> Iterator[Dict[str, Any]]:
    """A schema, what it refers to in ``root``, and its alternatives."""
    todo, seen = [schema], set()
    while todo and len(seen) < MAX_SCHEMAS:
        part = todo.pop()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        for name in ALTERNATIVES:
            if len(todo) < MAX_SCHEMAS:
                todo += list_of(part, name)[:MAX_SCHEMAS]
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            todo.append(find(root, reference))


def find(root: Any, reference: str) -> Any:
    """What a reference such as ``#/$defs/name`` points to, or None."""
    for name in unquote(reference).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        root = root.get(name) if isinstance(root, dict) else None
    return root


def allowed_for(name: str, parameters: Any) -> Allowed:
    """What the schema of a tool's parameters allows for the argument ``name``."""
    objects = list(all_of(parameters, parameters))
    schemas = []
    for part in objects:
        properties = part.get("properties")
        if isinstance(properties, dict) and name in properties:
            schemas.append(properties[name])
    schemas = schemas or [part.get("additionalProperties") for part in objects]
    types, values = set(), []
    for part in all_of({"anyOf": schemas}, parameters):
        values += list_of(part, "enum")
        values += [part["const"]] if "const" in part else []
        found = {"null"} if part.get("nullable") is True else set()
        for kind in list_of(part, "type") or [part.get("type")]:
            if isinstance(kind, str) and (match := TYPE_NAMES.match(kind)):
                found.add(match.lastgroup)
        if "type" not in part:
            found |= {"object"} if "properties" in part else set()
            found |= {"array"} if "items" in part else set()
        types |= found
    types |= {type_of(value) for value in values}
    return Allowed(frozenset(types), values)


def value_of(text: str, allowed: Allowed) -> Any:
    """What a text that a model has written as a value stands for.

    A listed text comes first, then JSON of an allowed type, then the text if it is allowed.
    What models write instead of JSON comes last: ``True``, ``007``, ``{'a': 1}``.

    Args:
        text (str): The text, as it is.
        allowed (Allowed): What the schema allows: some types.
    """
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError):
        value = text
    for choice in (text, text.strip(), value):
        if isinstance(choice, str) and choice in allowed.values:
            return choice
    if not isinstance(value, str) and allowed.has_type_of(value):
        return value
    if value is None and "string" not in allowed.types:
        # As in formats of JSON: models write it for what is left out.
        return None
    return text if "string" in allowed.types else guess(text, allowed)


def guess(text: str, allowed: Allowed) -> Any:
    """The value of an allowed type that a text which is no JSON of one means, or the text."""
    word = text.strip()
    lower = word.lower()
    if "null" in allowed.types and lower in ("null", "none", "nil"):
        return None
    if "boolean" in allowed.types and lower in WORDS:
        return WORDS[lower]
    if allowed.types & {"integer", "number"} and NUMBER.fullmatch(word):
        number = guess_number(word, allowed)
        return text if isinstance(number, str) else number
    value = literal(word)
    return value if allowed.has_type_of(value) else text


def guess_number(word: str, allowed: Allowed) -> Any:
    """The number of an allowed type that is written as no number of JSON, or the word."""
    match = INTEGER.fullmatch(word)
    number = finite(word)
    if match and ("integer" in allowed.types or match[2] is None):
        # Not by way of a float, which is exact to 2**53 only.
        with suppress(ValueError):
            return int(match[1])
    elif "number" in allowed.types:
        return number
    elif isinstance(number, float) and number.is_integer():
        return int(number)
    return word


def literal(text: str) -> Any:
    """The object, array, boolean or null that a text of Python stands for, or the text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return (
        value if value is None or isinstance(value, (dict, list, tuple, bool)) else text
    )


def value_without_schema(text: str, is_json: bool) -> Any:
    """What a text stands for if the client does not tell its type.

    Args:
        text (str): The text.
        is_json (bool): Whether the model's format has JSON for all but strings. If not,
          only objects, arrays and null are told from texts.
    """
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError):
        return literal(text.strip()) if is_json else text
    return value if is_json or isinstance(value, (dict, list, type(None))) else text


def fit(value: Any, allowed: Allowed) -> Any:
    """A value of JSON as the schema has it. A number for a string becomes its text, and a
    text for another type what it stands for: some models put arrays into strings. Null
    stays, because models write it for what is left out."""
    if not allowed.types or value is None or allowed.has_type_of(value):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    found = value_of(text, allowed)
    return found if found is not text or "string" in allowed.types else value
