"""Makes text of token ids as they come: joined, it is what ``decode`` gives for all of them.

Rules:
1. Only ``decode`` says what tokens are, because tokenizers have decoders of many kinds, or
   code of their own. Special tokens are not skipped.
2. Only text that the next tokens may change is held back.
3. The cost of a token does not grow with the answer: ``decode`` gets its last ids only.
"""

import re
from typing import Any, Callable, Dict, List, Optional, Pattern, Sequence, Set

# If there are more ids than this, the first are dropped, and as many of the last stay as
# give the same end of the text: the first of these numbers that do.
MAX_CONTEXT = 8
CONTEXTS = (2, 3, 4, MAX_CONTEXT)
# After so many byte tokens in a row, the characters that are complete are given out.
MAX_BYTES = 64
# After so many ids, what is still held back is given out as it is.
MAX_IDS = 256

# Texts that some tokenizers change after decoding, and the ends of texts that they may still
# change: transformers takes out the space before a sign, NewlineTokenizer writes a newline
# for each <n>.
CHANGES = {"a ,b": r"(?<! ) +(?:'[vr]?|n *'?)?$", "<n>": r"<n?$"}


class Decoder:
    """What a tokenizer makes of token ids. Shared by all threads.

    Args:
        tokenizer (TokenizerWrapper): The tokenizer of a model.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.decode_ids: Callable[[List[int]], str] = tokenizer.decode
        # Ids that it refuses: a model may have more than its tokenizer.
        self.refused: Set[int] = set()
        vocabulary = tokenizer.get_vocab()
        self.known = frozenset(vocabulary.values())
        self.bytes = self.find_bytes(vocabulary)
        self.unsettled = self.find_unsettled()

    def find_bytes(self, vocabulary: Dict[str, int]) -> Dict[int, bytes]:
        """The bytes by their ids, if a row of byte tokens becomes text together: one that is
        wrong makes the others wrong too."""
        names = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        found = {vocabulary[x]: raw for x, raw in names.items() if x in vocabulary}
        # Some decoders take the names for text.
        is_text = self.decode([*found][:1]).startswith("<0x")
        return {} if is_text else found

    def find_unsettled(self) -> Optional[Pattern[str]]:
        """What matches the end of a text that the next tokens may change."""
        ends = [
            end
            for text, end in CHANGES.items()
            if text not in self.decode(self.encode(text))
        ]
        return re.compile("|".join(ends)) if ends else None

    def encode(self, text: str) -> List[int]:
        ids: List[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: List[int]) -> str:
        """The text of some ids. Those that the tokenizer does not have give nothing."""
        if self.refused:
            ids = [i for i in ids if i not in self.refused]
        try:
            return self.decode_ids(ids)
        except Exception:
            if len(ids) < 2:
                self.refused.update(ids)
                return ""
        for i in ids:
            self.decode([i])
        return self.decode_ids([i for i in ids if i not in self.refused])

    def count_settled(self, text: str) -> int:
        """How many characters of a text the next tokens cannot change."""
        n = len(text)
        if text.endswith("\ufffd"):
            # An incomplete character decodes to up to three of these.
            n = max(len(text.rstrip("\ufffd")), n - 3)
            # It may become white space, and some tokenizers strip the end of a text.
            n = len(text[:n].rstrip())
        match = self.unsettled and self.unsettled.search(text)
        return min(n, match.start()) if match else n


class Detokenizer:
    """Makes the text of one answer.

    Args:
        decoder (Decoder): That of the model's tokenizer.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        # The last ids, how many characters of their text were given out, and how many of
        # them are byte tokens without another one after them.
        self.ids: List[int] = []
        self.n_given = 0
        self.n_bytes = 0

    def add(self, ids: Sequence[int]) -> str:
        """Take the next ids; gives the text that they settle."""
        # Only ids from earlier calls were held back: any number may come in this one.
        text, is_overdue = "", len(self.ids) > MAX_IDS
        for i in ids:
            self.ids.append(i)
            if i in self.decoder.bytes:
                self.n_bytes += 1
                if self.n_bytes >= MAX_BYTES:
                    text += self.settle(is_overdue)
            elif i in self.decoder.known:
                self.n_bytes = 0
        return text if self.n_bytes else text + self.settle(is_overdue)

    def skip(self, ids: Sequence[int]) -> None:
        """Take ids whose text is known, and is not given out."""
        self.ids = list(ids[-MAX_CONTEXT:])
        self.n_given = len(self.decoder.decode(self.ids))

    def settle(self, is_overdue: bool) -> str:
        """Give out the text that is settled, or all of it if it was held back for long, and drop
        ids that are not needed for more."""
        text = self.decoder.decode(self.ids)
        start, end = self.n_given, self.decoder.count_settled(text)
        if self.n_bytes and "\ufffd" in text[start:end]:
            end = start
        if is_overdue:
            end = len(text)
        self.n_given = max(start, end)
        if len(self.ids) > MAX_CONTEXT:
            self.drop(text, is_overdue)
        return text[start:end]

    def drop(self, text: str, is_overdue: bool) -> None:
        """Drop ids that do not matter for the end of the text."""
        n_held = len(text) - self.n_given
        for n in CONTEXTS:
            last = self.decoder.decode(self.ids[-n:])
            # Some of it was given out: decoders treat the start of a text in another way.
            if len(last) > n_held and text.endswith(last):
                self.ids = self.ids[-n:]
                self.n_given = len(last) - n_held
                self.n_bytes = min(self.n_bytes, n_held)
                return
        if is_overdue:
            self.ids = self.ids[:MAX_CONTEXT]
            self.n_given = len(self.decoder.decode(self.ids))

    def end(self) -> str:
        """Give out what was held back: no more ids will come."""
        return self.decoder.decode(self.ids)[self.n_given :]
