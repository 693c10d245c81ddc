"""Estimates how many tokens an answer takes, from the answers that have ended.

``max_tokens`` says little about it: many clients send a cap that no answer reaches.
"""

from collections import deque
from typing import Deque

from ..cache.growth import STEP
from ..interfaces import RequestInfo

# How many of the last answers count, and the share of them that take no more tokens than
# the estimate.
N_ANSWERS, QUANTILE = 128, 0.9


class AnswerLengths:
    """The lengths of the last answers of a model."""

    def __init__(self) -> None:
        self.lengths: Deque[int] = deque(maxlen=N_ANSWERS)
        # The estimate. At first, what the arrays of a row have room for in any case.
        self.usual = STEP

    def add(self, n_tokens: int) -> None:
        """An answer has ended by itself, after ``n_tokens``."""
        self.lengths.append(n_tokens)
        ordered = sorted(self.lengths)
        self.usual = ordered[int(QUANTILE * len(ordered))]

    def expected(self, request: RequestInfo) -> int:
        """How many tokens the answer to a request takes. One that is longer than usual is
        expected to go on for another ``STEP``."""
        n_tokens = max(self.usual, request.n_generated + STEP)
        return min(request.max_tokens, n_tokens)
