"""The arguments of a tool call, an object of JSON, in the pieces in which the model writes it.

Rules:
1. The pieces add up to what a call that is parsed whole has: spaces, numbers, escapes and
   halves of characters are the same, and values are as the schema has them. Only a key that
   comes twice is there twice.
2. A value that the schema may change is held back until it has ended.
3. Each character is looked at once, however few come at a time.
"""

import json
import re
from typing import Callable, List, Optional

from ..request.json_text import well_formed
from .tool_formats import with_escapes
from .tool_values import DECODER, Allowed, as_json, fit

# A sign, or a number or word, which ends only where something else begins.
TOKEN = re.compile(r'([{}\[\],:"])|([^ \t\n\r{}\[\],:"]++)(?=[ \t\n\r{}\[\],:"])')
SPACE = re.compile(r"[ \t\n\r]*+")
# The characters of a string, without the start of an escape at the end.
STRING = re.compile(
    r'(?:[^"\\]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}|(?!u[0-9a-fA-F]{0,3}\Z|\Z)))*+'
)
# Characters of a number or word: Python's limit for the digits of an integer.
MAX_WORD = 4300

# The signs that may come next; ``w`` is a number or word.
FIRST_KEY, KEY = '"}', '"'
VALUE, FIRST_ITEM = '"{[w', '"{[w]'
AFTER_VALUE = {"{": ",}", "[": ",]"}
KINDS = {'"': "string", "{": "object", "[": "array"}
SPACED = {",": ", ", ":": ": "}


class StreamedArguments:
    """Makes pieces of a client's text from those of the model's.

    Args:
        allowed_for (Callable): What the schema allows for an argument, by its name.

    Attributes:
        text (str): What has come and was not read: the start of something, what follows the
          end, or what is no JSON.
        in_string (bool): Whether the text that was read ends within a string.
        is_done (bool): Whether the object has ended.
        is_broken (bool): Whether what follows is no JSON.
    """

    def __init__(self, allowed_for: Callable[[str], Allowed]):
        self.allowed_for = allowed_for
        self.text, self.at = "", 0
        self.in_string = self.is_done = self.is_broken = False
        # The objects and lists that are open, and what may come next.
        self.open: List[str] = []
        self.expected = "{"
        self.key, self.is_key = "", False
        self.held: Optional[List[str]] = None

    def add(self, text: str) -> str:
        """Read the next text of the model; gives the next piece."""
        self.text += text
        self.at = 0
        pieces: List[str] = []
        while not (self.is_done or self.is_broken):
            piece = self.read_string() if self.in_string else self.read_token()
            if piece is None:
                break
            if self.held is None:
                pieces.append(piece)
            else:
                self.held.append(piece)
                if len(self.open) == 1 and self.expected == AFTER_VALUE["{"]:
                    pieces.append(self.take_held())
        self.text = self.text[self.at :]
        return "".join(pieces)

    def rest(self) -> str:
        """What the model has written beyond the pieces, if no more comes."""
        return "".join(self.held or []) + self.text

    def read_token(self) -> Optional[str]:
        self.at = SPACE.match(self.text, self.at).end()
        match = TOKEN.match(self.text, self.at)
        if match is None:
            self.is_broken = len(self.text) - self.at > MAX_WORD
            return None
        sign, word = match[1], match[2]
        if (sign or "w") not in self.expected or len(word or "") > MAX_WORD:
            self.is_broken = True
            return None
        if len(self.open) == 1 and self.expected == VALUE:
            types = self.allowed_for(self.key).types
            self.held = [] if types and KINDS.get(sign) not in types else None
        piece = SPACED.get(sign, sign)
        if word:
            try:
                piece = json.dumps(DECODER.decode(word))
            except ValueError:
                self.is_broken = True
                return None
            self.end_value()
        elif sign == '"':
            self.in_string = True
            self.is_key = self.expected in (KEY, FIRST_KEY)
            if self.is_key and len(self.open) == 1:
                self.key = ""
        elif sign == ",":
            self.expected = KEY if self.open[-1] == "{" else VALUE
        elif sign == ":":
            self.expected = VALUE
        elif sign in AFTER_VALUE:
            self.open.append(sign)
            self.expected = FIRST_KEY if sign == "{" else FIRST_ITEM
        else:
            self.open.pop()
            self.end_value()
        self.at = match.end()
        return piece

    def read_string(self) -> Optional[str]:
        end = STRING.match(self.text, self.at).end()
        value = DECODER.decode(f'"{with_escapes(self.text[self.at : end])}"')
        ends = self.text.startswith('"', end)
        if not ends and "\ud800" <= value[-1:] <= "\udbff":
            # The other half of the character may follow.
            value, end = value[:-1], end - len(r"\ud800")
        if not (value or ends):
            return None
        self.at = end + ends
        if self.is_key and len(self.open) == 1:
            self.key += value
        if ends:
            self.in_string = False
            if self.is_key:
                self.expected = ":"
            else:
                self.end_value()
        text = json.dumps(well_formed(value), ensure_ascii=False)
        return text[1:] if ends else text[1:-1]

    def end_value(self) -> None:
        self.is_done = not self.open
        self.expected = AFTER_VALUE[self.open[-1]] if self.open else ""

    def take_held(self) -> str:
        """The argument that has ended, as the schema has it."""
        text = "".join(self.held or [])
        self.held = None
        try:
            value = as_json(fit(DECODER.decode(text), self.allowed_for(self.key)))
            return json.dumps(value, ensure_ascii=False)
        except (ValueError, RecursionError):
            return text
