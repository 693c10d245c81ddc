"""What arguments of the command line may be.

Rule: an argument that is wrong ends the start with one line that says what would be right.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any, Callable, Dict, List

from jinja2 import Environment, TemplateSyntaxError


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(
    kind: type, minimum: float, maximum: float = math.inf
) -> Callable[[str], Any]:
    """An argument type: a number in a range, its ends included."""

    def parse(text: str) -> Any:
        value = kind(text)
        # Written so that NaN fails too.
        if not minimum <= value <= maximum:
            limit = f"at most {maximum}" if value > maximum else f"at least {minimum}"
            raise argparse.ArgumentTypeError(f"{text} must be {limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def size(text: str) -> int:
    """An argument type: bytes, as ``1073741824``, ``512MB`` or ``2GB``."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; write bytes, or 512MB, or 2GB"
        )
    if len(text) > 20:
        raise argparse.ArgumentTypeError(f"{text[:20]}... is too large")
    return int(float(match[1]) * units[match[2]])


def names(text: str) -> List[str]:
    """An argument type: names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def json_object(text: str) -> Dict[str, Any]:
    """An argument type: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {e}")
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def chat_template(text: str) -> str:
    """An argument type: a chat template, or the path of a file that holds one."""
    try:
        is_file = text and Path(text).is_file()
    except (OSError, ValueError):
        is_file = False  # a text that can be no path
    try:
        if is_file:
            text = Path(text).read_text(encoding="utf-8")
        # Every template has a {{ }} or a {% %}.
        elif text and "{" not in text:
            raise argparse.ArgumentTypeError(f"{text!r} is no file and no template")
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError) as e:
        raise argparse.ArgumentTypeError(f"the file cannot be read: {e}")
    except TemplateSyntaxError as e:
        # Transformers has tags of its own.
        if "unknown tag" not in str(e):
            raise argparse.ArgumentTypeError(f"the template is wrong: {e}")
    return text
