"""JSON as clients send it, and as a model is to see it.

Rule: no text that comes out of here has half of a surrogate pair, which no tokenizer and no
answer could encode.
"""

import json
import re
from ast import literal_eval
from typing import Any, Union

# Escapes and characters of which lone surrogates are made.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
# The parts of a Python literal: its strings, its words, and what is the same in JSON.
PYTHON = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\b(?:True|False|None)\b|[^'"TFN]+|.""",
    re.DOTALL,
)
WORDS = {"True": "true", "False": "false", "None": "null"}


def load_json(raw: Union[str, bytes]) -> Any:
    """Parse a JSON text, with a replacement character for each lone surrogate.

    Raises:
        RecursionError: If it is nested too deeply.
        ValueError: If it is not JSON.
    """
    text = raw
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    # A line break within a text is no reason to refuse it.
    value = json.loads(text, strict=False)
    if SURROGATE.search(text):
        value = json.loads(well_formed(json.dumps(value, ensure_ascii=False)))
    return value


def well_formed(text: str) -> str:
    """A text with a replacement character for each lone surrogate."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load_python(text: str) -> Any:
    """Parse a dictionary as Python writes it, of strings, numbers, lists and the like.

    Raises:
        RecursionError: If it is nested too deeply.
        ValueError: If it is none.
    """

    def to_json(match: "re.Match[str]") -> str:
        part = match[0]
        if part[0] not in "'\"":
            return WORDS.get(part, part)
        # A single string, so that nothing can be nested in what is evaluated.
        return json.dumps(literal_eval(part))

    try:
        return load_json(PYTHON.sub(to_json, text))
    except SyntaxError as e:
        raise ValueError(e)


def to_text(value: Any) -> str:
    """A JSON value as a text: a string is one, others are written as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
