"""The times between the tokens of an answer, as a client would see them."""

import time
from array import array
from typing import Optional


class TokenGaps:
    """The times between the tokens of one answer."""

    def __init__(self) -> None:
        # One for each token but those that came first.
        self.seconds = array("d")
        # When the last ones came.
        self.last: Optional[float] = None

    def add(self, n: int) -> None:
        """Note that ``n`` tokens have come together. Each has its share of the time."""
        if not n:
            return
        now = time.monotonic()
        if self.last is not None:
            self.seconds.extend([(now - self.last) / n] * n)
        self.last = now
