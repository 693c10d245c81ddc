"""Finds the first stop word in a text that comes in pieces, and cuts the text before it.

Rules:
1. The word that ends first counts; of those that end at the same place, the longest.
2. Only text that may still become a word is held back.
3. The words are sorted and nothing else is built of them. The automaton of upstream's
   ``TextStateMachine`` takes 0.3 s to build for 128 words of 1,000 characters, during which
   other threads get little time, and it consists of reference cycles.
"""

from bisect import bisect_right
from typing import List, Optional


class StopWords:
    """The stop words of one answer.

    Args:
        words (List[str]): None of them empty.
        includes (bool): Whether the text is cut after the word instead.
    """

    def __init__(self, words: List[str], includes: bool = False):
        # A text can only begin with the last of the sorted words that does not come after it, or
        # with a word with which that word begins. Only the next word can begin with the text.
        self.words = sorted({*words})
        # The longest other word with which each word begins.
        self.shorter: List[Optional[int]] = []
        for i, word in enumerate(self.words):
            place = i - 1 if i else None
            while place is not None and not word.startswith(self.words[place]):
                place = self.shorter[place]
            self.shorter.append(place)
        self.longest = max(map(len, self.words), default=0)
        self.includes = includes
        self.held = ""
        # How many of the characters that are held no word may end in.
        self.n_passed = 0
        self.found = False

    def split(self, text: str, counts: bool = True) -> str:
        """Take the next piece of a text.

        Args:
            text (str): The piece.
            counts (bool): Whether a word may end in it.

        Returns:
            The next part of the answer, which ends before the first word. Once a word is
            ``found``, the answer has ended.
        """
        if not self.words:
            return text
        text = self.held + text
        start = held = len(text)
        n_passed = self.n_passed if counts else len(text)
        end = start + 1
        for i in range(len(text)):
            if i >= end:
                break
            rest = text[i : i + self.longest]
            after = bisect_right(self.words, rest)
            place = after - 1 if after else None
            while place is not None:
                word = self.words[place]
                if rest.startswith(word) and n_passed < i + len(word) < end:
                    start, end, self.found = i, i + len(word), True
                place = self.shorter[place]
            if after < len(self.words) and self.words[after].startswith(rest):
                held = min(held, i)
        if self.found:
            self.held = ""
            return text[: end if self.includes else start]
        self.held, self.n_passed = text[held:], max(0, n_passed - held)
        return text[:held]

    def flush(self) -> str:
        """What was held back: no more text will come."""
        text, self.held = self.held, ""
        return text
