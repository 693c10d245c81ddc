"""The log probabilities of an answer, in OpenAI's shape.

Rules:
1. The tokens of an answer add up to its text, and their bytes to the bytes of the text. The
   token that completes a character has it; those before it have an empty text.
2. What is not part of the answer has no entry: the end of the text, and a stop word.
"""

import codecs
from typing import Any, Dict, List, NamedTuple, Optional

from ..request.request import Token
from ..request.token_bytes import TokenBytes

# The value of OpenAI's API for the log probability of a token that cannot be chosen.
LEAST_LOGPROB = -9999.0


class ChosenToken(NamedTuple):
    """A token of an answer.

    Args:
        token (Token): Its id and its log probabilities.
        text (str): What it adds to the text.
        raw (Optional[bytes]): Its bytes, if known.
        offset (int): Where its text begins, in characters.
        is_first (bool): Whether it is the first of the answer.
    """

    token: Token
    text: str
    raw: Optional[bytes]
    offset: int
    is_first: bool

    @property
    def end(self) -> int:
        return self.offset + len(self.text)

    def up_to(self, end: int) -> "ChosenToken":
        """The token without what is after the first ``end`` characters of the text."""
        text = self.text[: max(0, end - self.offset)]
        if text == self.text:
            return self
        cut = len(self.text[len(text) :].encode())
        return self._replace(text=text, raw=self.raw and self.raw[:-cut])


class ChosenTokens:
    """The tokens of an answer, from when they are made until their text is given out.

    Args:
        token_bytes (TokenBytes): The bytes of the model's tokens.
    """

    def __init__(self, token_bytes: TokenBytes):
        self.token_bytes = token_bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.row: List[Token] = []
        self.waiting: List[ChosenToken] = []
        self.n_characters = 0
        self.is_first = True

    def add(self, tokens: List[Token]) -> None:
        decoder = self.token_bytes.decoder
        for token in tokens:
            if token.id in decoder.known and token.id not in decoder.bytes:
                self.end_row()
            elif self.row or token.id in decoder.bytes:
                self.row.append(token)
                continue
            self.append(token)

    def add_prompt(self, tokens: List[Token], text: Optional[str], bos: str) -> None:
        """Add the tokens of a prompt, which come before those of the answer.

        Args:
            tokens (List[Token]): Its tokens.
            text (Optional[str]): What they were made of, if it was a text.
            bos (str): The text of the token that the tokenizer puts before a text.
        """
        if text is None:
            self.add(tokens)
            return
        name = self.token_bytes.text(tokens[0].id)
        if name == bos and not text.startswith(bos):
            self.append(tokens[0], "")
            self.is_first, tokens = True, tokens[1:]
        self.add(tokens)
        self.end_row()
        # The tokens of some models do not add up to the text.
        self.n_characters = len(text)

    def end_row(self) -> None:
        """Add the byte tokens in a row, which are characters or, if one of them is wrong,
        none."""
        row, self.row = self.row, []
        raw = [self.token_bytes.get(token.id) for token in row]
        try:
            b"".join(raw).decode()
        except UnicodeDecodeError:
            texts = ["\ufffd" * len(r) for r in raw]
        else:
            texts = [None] * len(raw)
        for token, text in zip(row, texts):
            self.append(token, text)

    def append(self, token: Token, text: Optional[str] = None) -> None:
        raw = self.token_bytes.get(token.id, self.is_first)
        if text is None:
            text = self.utf8.decode(raw or b"", final=raw is None)
            if raw is None:
                text += self.token_bytes.text(token.id)
        self.waiting.append(
            ChosenToken(token, text, raw, self.n_characters, self.is_first)
        )
        self.n_characters += len(text)
        # Those that the tokenizer does not have are no tokens for its decoder.
        if token.id in self.token_bytes.decoder.known:
            self.is_first = False

    def take(self, n_characters: int) -> List[ChosenToken]:
        """Give out the tokens of the first ``n_characters`` of the text."""
        n = 0
        for i, chosen in enumerate(self.waiting):
            if chosen.text and chosen.end <= n_characters:
                n = i + 1
        taken, self.waiting = self.waiting[:n], self.waiting[n:]
        return taken

    def end(self, n_characters: Optional[int]) -> List[ChosenToken]:
        """Give out the rest of the tokens.

        Args:
            n_characters (Optional[int]): The length of the text, if a stop word has cut it.
        """
        self.end_row()
        rest, self.waiting = self.waiting, []
        if n_characters is not None:
            return [c.up_to(n_characters) for c in rest if c.offset < n_characters]
        if rest:
            text = rest[-1].text + self.utf8.decode(b"", final=True)
            rest[-1] = rest[-1]._replace(text=text)
        return rest


def in_json(logprob: float) -> float:
    """A log probability as a number of JSON, which has no -inf and no NaN: for them it is
    ``LEAST_LOGPROB``."""
    # The order matters: ``max(x, nan)`` is x, and ``max(nan, x)`` is nan.
    return max(LEAST_LOGPROB, logprob)


def chat_logprobs(chosen: List[ChosenToken], tokens: TokenBytes) -> Dict[str, Any]:
    """The ``logprobs`` of a chat choice."""

    def entry(i: int, logprob: float, text: str, raw: Optional[bytes]) -> Dict:
        return {
            "id": i,
            "token": text,
            "bytes": None if raw is None else list(raw),
            "logprob": in_json(logprob),
        }

    def top(c: ChosenToken, i: int, logprob: float) -> Dict:
        if i == c.token.id:
            return entry(i, logprob, c.text, c.raw)
        text, raw = tokens.name(i, c.is_first), tokens.get(i, c.is_first)
        return entry(i, logprob, text, raw)

    return {
        "content": [
            entry(c.token.id, c.token.logprob, c.text, c.raw)
            | {"top_logprobs": [top(c, *pair) for pair in c.token.top]}
            for c in chosen
        ],
        "refusal": None,
    }


def text_logprobs(chosen: List[ChosenToken], tokens: TokenBytes) -> Dict[str, Any]:
    """The ``logprobs`` of a text completion choice."""

    def top(c: ChosenToken) -> Optional[Dict[str, float]]:
        if c.token.logprob is None:
            return None
        names = {c.text: c.token.id}
        for i, _ in c.token.top:
            if i != c.token.id:
                # Two tokens may have the same text, at the start or at all.
                name = tokens.name(i, c.is_first)
                if name in names:
                    name = tokens.name(i)
                names[f"token_id:{i}" if name in names else name] = i
        logprobs = {c.token.id: c.token.logprob, **dict(c.token.top)}
        return {name: in_json(logprobs[i]) for name, i in names.items()}

    return {
        "tokens": [c.text for c in chosen],
        # That of a prompt's first token is not known.
        "token_logprobs": [
            None if c.token.logprob is None else in_json(c.token.logprob)
            for c in chosen
        ],
        "top_logprobs": [top(c) for c in chosen],
        "text_offset": [c.offset for c in chosen],
    }
