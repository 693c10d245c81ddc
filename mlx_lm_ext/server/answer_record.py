"""How one answer goes, as the handler of its connection sees it."""

from array import array
from typing import Optional

from ..interfaces import Clock


class AnswerRecord:
    """Tokens, times and the end of one answer.

    Args:
        clock (Clock): The clock of its request.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        # Tokens that were handed out: when it has ended, those of ``usage``.
        self.n_tokens = 0
        # Seconds before each token but those that came first.
        self.gaps = array("d")
        self.finish_reason = "error"
        # When the last tokens came, and when it has ended.
        self.last: Optional[float] = None
        self.ended: Optional[float] = None

    def add(self, n: int, is_timed: bool) -> None:
        """Note that ``n`` tokens have come together. Each has its share of the time.

        Args:
            n (int): Tokens.
            is_timed (bool): Whether they come as soon as they are made, so that the times
              between them say something.
        """
        self.n_tokens += n
        if not (n and is_timed):
            return
        now = self.clock()
        if self.last is not None:
            self.gaps.extend([(now - self.last) / n] * n)
        self.last = now

    def end(self, finish_reason: str) -> None:
        """Note how it has ended. Only the first time counts."""
        if self.ended is None:
            self.finish_reason = finish_reason
            self.ended = self.clock()
