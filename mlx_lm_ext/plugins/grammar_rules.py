"""A grammar while it is written: the rules, and the tokens that no text is made of.

The language is the Lark of llguidance, which has JSON schemas (``%json``), tokens
(``<[7]>``) and lexemes that end at the first place where they can (``[lazy]``).

Rule: a lexeme goes on as long as it can, so what ends a text is not possible within it, or the
lexeme is lazy and ends with it.
"""

import json
import re
from typing import Any, Collection, Dict, Iterable, List, Optional, Tuple
from weakref import WeakKeyDictionary

# White space between the parts of calls: a model might write it without end.
SPACE = r"/[ \n]{1,4}|\r?\n[ \t]{1,32}/"
# What stands between the parts of JSON: nothing, a space, or a line break and an indent.
# With any number of them, a model could write nothing else for ever.
JSON_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\n[ \t]{0,32}",
    # What cannot be checked is refused, and not left out.
    "coerce_one_of": False,
    "lenient": False,
    # Python writes all characters but those of ASCII so.
    "json_allow_general_unicode_escapes": True,
}


def quoted(text: str) -> str:
    """A text as a literal of Lark."""
    return json.dumps(text)


class Marks:
    """The tokens of a tokenizer that no text is made of, as llguidance has them.

    Args:
        ids (Dict[str, int]): Their ids.
        ends (Collection[int]): Those that end an answer.
    """

    known: "WeakKeyDictionary[Any, Marks]" = WeakKeyDictionary()

    def __init__(self, ids: Dict[str, int], ends: Collection[int]):
        self.ids = ids
        self.ends = ends
        self.pieces: Dict[str, List[str]] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> "Marks":
        """Those of a tokenizer. Some have thousands, which are looked at once."""
        if tokenizer not in cls.known:
            ids = {
                str(token): i
                for i, token in tokenizer.added_tokens_decoder.items()
                if token.special or re.fullmatch("(?s)<.*>", str(token))
            }
            cls.known[tokenizer] = cls(ids, tokenizer.eos_token_ids)
        return cls.known[tokenizer]

    def split(self, text: str) -> List[str]:
        """The tokens in a text of a format, and what is between them."""
        if text not in self.pieces:
            found = sorted((m for m in self.ids if m in text), key=len, reverse=True)
            pattern = "|".join(map(re.escape, found)) or r"\Z."
            self.pieces[text] = [p for p in re.split(f"({pattern})", text) if p]
        return self.pieces[text]

    def token(self, mark: str) -> str:
        return f"<[{self.ids[mark]}]>"

    def write(self, text: str) -> str:
        """A text of a format as the parts of a rule."""
        return " ".join(
            self.token(piece) if piece in self.ids else quoted(piece)
            for piece in self.split(text)
        )

    def others(self, *marks: str) -> str:
        """All but these and those that end an answer; empty if there are none."""
        ids = {i for mark, i in self.ids.items() if mark not in marks}
        ranges: List[List[int]] = []
        for i in sorted(ids.difference(self.ends)):
            if ranges and i == ranges[-1][1] + 1:
                ranges[-1][1] = i
            else:
                ranges.append([i, i])
        return f"<[{','.join(f'{a}-{b}' for a, b in ranges)}]>" if ranges else ""


class Rules:
    """The rules of a grammar. Equal ones are one.

    Args:
        marks (Marks): The tokens of the model.
    """

    def __init__(self, marks: Marks):
        self.marks = marks
        self.names: Dict[str, str] = {}
        # Rules that may be parts of themselves, by their names.
        self.reserved: Dict[str, str] = {}
        self.any = self.terminal("/(?s:.*)/")
        self.space = self.terminal(SPACE) + "?"

    def add(self, body: str, kind: str = "r", options: str = "") -> str:
        body = f"{options}: {body}"
        if body not in self.names:
            self.names[body] = f"{kind}{len(self.names)}"
        return self.names[body]

    def reserve(self) -> str:
        """The name of a rule whose body is set in ``reserved`` later."""
        name = f"s{len(self.reserved)}"
        self.reserved[name] = '""'
        return name

    def terminal(self, body: str) -> str:
        return self.add(body, "T")

    def either(self, choices: Iterable[str]) -> str:
        return self.add(" | ".join(choices))

    def lines(self) -> str:
        rules = [name + body for body, name in self.names.items()]
        rules += [f"{name}: {body}" for name, body in self.reserved.items()]
        return "\n".join(rules)

    def mark(self, text: str) -> str:
        """A text of a format as the parts of a rule. In it ``·`` stands for white space, INDEX
        for a number and ANY_ID for an id, and what is between ``⟦`` and ``⟧`` may be missing.
        """
        fixed = {"·": self.space, "⟦": "(", "⟧": ")?"}
        fixed |= {"ANY_ID": "/[a-zA-Z0-9_-]{1,40}/", "INDEX": "/[0-9]{1,3}/"}
        pieces = re.split("([·⟦⟧]|ANY_ID|INDEX)", text)
        parts = (fixed.get(piece) or self.marks.write(piece) for piece in pieces)
        return " ".join(filter(None, parts))

    def json(self, schema: Any) -> str:
        """A value of JSON."""
        schema = {} if schema is True else schema
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": JSON_OPTIONS}
        return self.add(f"%json {json.dumps(schema)}")

    def lacking(self, body: str, texts: Iterable[str]) -> str:
        """A terminal that has none of these texts in it."""
        lacks = " | ".join(map(quoted, texts))
        refused = f" & ~({self.any} ({lacks}) {self.any})" if lacks else ""
        return self.terminal(f"({body}){refused}")

    def text_until(
        self, end: str, lacks: Iterable[str], least: int = 0, most: str = ""
    ) -> str:
        """Any text, and the mark after it.

        Args:
            end (str): The mark.
            lacks (Iterable[str]): What the text may not have in it.
            least (int): The fewest characters.
            most (str): The most, or nothing.
        """
        first, *rest = self.marks.split(end)
        if first in self.marks.ids:
            body = f"/(?s:.{{{max(least, 1)},{most}}})/"
            text = self.lacking(body, [end, first, *lacks])
            return f"{text}{'' if least else '?'} {self.marks.write(end)}"
        text = self.lacking(f"/(?s:.{{{least},{most}}})/", lacks)
        head = self.add(f"{text} {quoted(first)}", options="[lazy]")
        return " ".join([head, *map(self.marks.write, rest)])

    def listed(self, items: List[Tuple[str, bool]], extra: Optional[str] = None) -> str:
        """Items with commas between them, in their order, of which some may be missing.

        Args:
            items (List[Tuple]): The items, and whether each is needed.
            extra (Optional[str]): What may follow any number of times.
        """
        comma = f'{self.space} "," {self.space}'
        more = f"({comma} {extra})*" if extra else '""'
        tails = [more]
        for item, is_needed in reversed(items):
            tail = f"({comma} {item}){'' if is_needed else '?'}"
            tails.append(self.add(f"{tail} {tails[-1]}"))
        tails.reverse()
        starts = []
        for i, (item, is_needed) in enumerate(items):
            starts.append(f"{item} {tails[i + 1]}")
            if is_needed:
                break
        else:
            starts += [f"{extra} {more}"] if extra else []
            starts.append('""')
        return self.either(starts)
