"""The parts of a JSON schema, for notations that are not JSON.

Rule: what is not known to be held by a list of keys or of alternatives is None.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Set, Tuple

from ..server.tool_values import type_of

Schema = Any

# Keywords that say nothing about a value.
NOTES = set(
    "title description default examples example deprecated readOnly writeOnly $comment "
    "$schema $id $defs definitions".split()
)
OBJECT = {"type", "properties", "required", "additionalProperties"}
# References that are followed one after the other, and alternatives of one value.
MAX_REFERENCES, MAX_LEAVES = 32, 256
# Keys of one object.
MAX_KEYS = 256
# Characters of copies of a schema, for the references of its parts.
MAX_COPIES = 1 << 20


@dataclass
class Fields:
    """The keys of an object.

    Args:
        named (List[Tuple]): Name, schema and whether it is needed.
        extra (Optional[Schema]): The schema of other ones, if there may be any.
    """

    named: List[Tuple[str, Schema, bool]]
    extra: Optional[Schema]


class Schemas:
    """Looks at the parts of a schema.

    Args:
        root (Schema): The whole of it, to which references are relative.
    """

    def __init__(self, root: Schema):
        self.root = root
        self.n_copied = 0

    def resolve(self, schema: Schema) -> Schema:
        """What a schema refers to, if it does nothing else."""
        for _ in range(MAX_REFERENCES):
            if not isinstance(schema, dict) or keywords(schema) != {"$ref"}:
                return schema
            schema = self.find(schema["$ref"])
        return None

    def find(self, reference: Any) -> Schema:
        if not isinstance(reference, str) or not re.match(r"#(/|\Z)", reference):
            return None
        part = self.root
        for name in reference.split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            part = part.get(name) if isinstance(part, dict) else None
        return part

    def alone(self, schema: Schema) -> Schema:
        """A part of the whole as a schema of its own; None if that is too much."""
        if '"$ref"' not in json.dumps(schema):
            return copied(schema)
        self.n_copied += len(json.dumps(self.root))
        if self.n_copied > MAX_COPIES:
            return None
        root = "#/$defs/root"
        return {**copied(schema, root), "$defs": {"root": copied(self.root, root)}}

    def fields(self, schema: Schema) -> Optional[Fields]:
        """The keys of an object. Those that it does not list are allowed only if it says so, or
        lists none."""
        schema = self.resolve(schema)
        if (
            not isinstance(schema, dict)
            or keywords(schema) - OBJECT
            or schema.get("type", "object") != "object"
        ):
            return None
        properties, needed = schema.get("properties"), schema.get("required", [])
        extra = schema.get("additionalProperties", properties is None)
        properties = {} if properties is None else properties
        if not isinstance(properties, dict) or not is_texts(needed):
            return None
        if len(properties) + len(needed) > 2 * MAX_KEYS:
            return None
        other = {} if extra is False else extra
        named = {key: properties.get(key, other) for key in [*properties, *needed]}
        return Fields(
            [(key, part, key in needed) for key, part in named.items()],
            None if extra is False else {} if extra is True else extra,
        )

    def leaves(self, schema: Schema) -> Optional[List[Dict[str, Any]]]:
        """The alternatives of a schema: each is for one type of values, or for any."""
        todo, found, n = [schema], [], 0
        while todo:
            n += 1
            schema = self.resolve(todo.pop(0))
            schema = {} if schema is True else schema
            if not isinstance(schema, dict) or n > MAX_LEAVES:
                return None
            keys = keywords(schema)
            first, *others = [*keys, ""] if keys else ["", ""]
            if first in ("anyOf", "oneOf", "allOf") and others == [""]:
                parts = schema[first]
                is_held = isinstance(parts, list) and parts
                if not is_held or (first != "anyOf" and len(parts) > 1):
                    return None
                todo = parts[:MAX_LEAVES] + todo
                continue
            leaves = split_types(schema, keys)
            if leaves is None:
                return None
            found += leaves
        return found


def keywords(schema: Dict[str, Any]) -> Set[str]:
    """Those that say something about a value."""
    return schema.keys() - NOTES


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def split_types(
    schema: Dict[str, Any], keys: Set[str]
) -> Optional[List[Dict[str, Any]]]:
    """A schema for each type of values that it allows."""
    if not keys:
        return [{}]
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds is not None and not is_texts(kinds):
        return None
    if keys - {"type"} in ({"enum"}, {"const"}):
        return split_values(schema.get("enum", [schema.get("const")]), kinds)
    if kinds is None:
        kinds = ["object"] if keys <= OBJECT else None
    return None if kinds is None else [{**schema, "type": kind} for kind in kinds]


def split_values(
    values: Any, kinds: Optional[List[str]]
) -> Optional[List[Dict[str, Any]]]:
    """Schemas for the texts, for null, and for the other ones of some values."""
    if not isinstance(values, list):
        return None
    if kinds is not None:
        kinds = [*kinds, "integer"] if "number" in kinds else kinds
        values = [value for value in values if type_of(value) in kinds]
    texts = [value for value in values if isinstance(value, str)]
    others = [v for v in values if v is not None and not isinstance(v, str)]
    leaves: List[Dict[str, Any]] = [{"enum": part} for part in (texts, others) if part]
    leaves += [{"type": "null"}] if None in values else []
    # No value at all is no alternative.
    return leaves or None


def copied(schema: Schema, root: str = "#") -> Schema:
    """A schema without its descriptions, which a client may have written at length.

    Args:
        schema (Schema): The schema.
        root (str): What its references to ``#`` point to.
    """
    if isinstance(schema, list):
        return [copied(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if isinstance(value, str):
            if key in ("description", "title"):
                continue
            if key == "$ref" and re.match(r"#(/|\Z)", value):
                value = root + value[1:]
        elif key not in ("enum", "const", "default", "examples"):
            value = copied(value, root)
        made[key] = value
    return made


def is_text(leaf: Dict[str, Any]) -> bool:
    """Whether an alternative is for texts."""
    if "enum" in leaf:
        return isinstance(leaf["enum"][0], str)
    return leaf.get("type") == "string"
