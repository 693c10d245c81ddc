"""Restricts the rows of a batch that have a constraint to the tokens that they may have next.

Rules:
1. Masks are filled on one thread of their own, while the device runs the model. They are
   waited for only when the logits of the next step are there.
2. A constraint that fails is kept with its error, and its row gets any token. Whoever runs
   the batch ends its request.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from typing import Any, List, Optional, Protocol, Sequence

import mlx.core as mx
import numpy as np

# Its thread starts with the first constraint.
WORKER = ThreadPoolExecutor(1, "constraints")
BITS = 32
# To pick rows and put them back takes as long as to restrict so many times more of them.
FEW = 4


class RowConstraint(Protocol):
    """Which tokens one row may have.

    Args:
        mask (np.ndarray): Of type uint32 and shape (ceil(vocabulary / 32),). Bit ``i % 32`` of
          word ``i // 32`` is set if token ``i`` is allowed next.
        error (Optional[BaseException]): What has failed, if something has.
    """

    mask: np.ndarray
    error: Optional[BaseException]

    def copy(self) -> "RowConstraint":
        """One in the same state, for another row."""

    def advance(self, token: int) -> None:
        """The row has got this token."""

    @classmethod
    def fill_all(cls, constraints: Sequence[Any]) -> None:
        """Set the masks of several rows."""


class Constraints:
    """The constraints of the rows of a batch.

    Args:
        rows (List[Optional[RowConstraint]]): One for each row; None for a row without.
        tokens (Sequence[Sequence[int]]): The tokens of its answer that each row has already.
    """

    def __init__(
        self, rows: List[Optional[RowConstraint]], tokens: Sequence[Sequence[int]]
    ):
        self.rows = rows
        # Masks that are being filled.
        self.pending: List["Future[None]"] = []
        self.begin_to_fill(self.constrained, tokens)

    @property
    def constrained(self) -> List[int]:
        """The rows that have a constraint."""
        return [i for i, row in enumerate(self.rows) if row is not None]

    def extend(self, other: "Constraints") -> None:
        """Add the rows of another batch after these."""
        self.rows += other.rows
        self.pending += other.pending

    def filter(self, keep: List[int]) -> None:
        """Keep only the rows of these indices, in this order."""
        self.rows = [self.rows[i] for i in keep]

    def copy(self) -> "Constraints":
        """The same rows for another batch. Both wait for the masks that are being filled."""
        other = copy(self)
        other.rows, other.pending = self.rows[:], self.pending[:]
        return other

    def advance(self, tokens: Sequence[Sequence[int]]) -> None:
        """Tell the constraints the tokens that each row has got, and begin to fill the masks
        of the tokens after them. Rows that have got none keep their masks."""
        self.begin_to_fill([i for i in self.constrained if tokens[i]], tokens)

    def begin_to_fill(self, rows: List[int], tokens: Sequence[Sequence[int]]) -> None:
        if rows:
            constraints = [self.rows[i] for i in rows]
            news = [[*tokens[i]] for i in rows]
            self.pending.append(WORKER.submit(fill, constraints, news))

    def __call__(self, logits: mx.array) -> mx.array:
        """Give the tokens that are not allowed a logit of minus infinity.

        Args:
            logits (mx.array): Of shape (rows, vocabulary). They may be changed in place.

        Returns:
            mx.array: The new logits.
        """
        rows = self.constrained
        if not rows:
            return logits
        # The device makes them while the masks are waited for.
        mx.async_eval(logits)
        for future in self.pending:
            future.result()
        self.pending.clear()
        if len(rows) * FEW < len(self.rows):
            places, masks = mx.array(rows), stack([self.rows[i] for i in rows])
            logits[places] = apply_masks(logits[places], masks)
            return logits
        return apply_masks(logits, stack(self.rows))

    @property
    def errors(self) -> List[Optional[BaseException]]:
        """What has failed in the constraint of each row, when its last mask was filled."""
        return [None if row is None else row.error for row in self.rows]


def fill(constraints: List[RowConstraint], tokens: List[List[int]]) -> None:
    """Give each constraint its new tokens, and fill all masks."""
    for constraint, news in zip(constraints, tokens):
        for token in news:
            constraint.advance(token)
    constraints[0].fill_all(constraints)


def stack(rows: Sequence[Optional[RowConstraint]]) -> mx.array:
    """The masks of several rows, of shape (rows, ceil(vocabulary / 32)). A row without a
    constraint may have all tokens."""
    n_bytes = max(row.mask.nbytes for row in rows if row is not None)
    every = b"\xff" * n_bytes
    # numpy gives up the interpreter lock to copy this much, and gets it back milliseconds
    # later if the threads of the connections are busy.
    joined = b"".join(every if row is None else row.mask.data for row in rows)
    return mx.array(np.frombuffer(joined, np.uint32).reshape(len(rows), -1))


@mx.compile
def apply_masks(logits: mx.array, masks: mx.array) -> mx.array:
    """Logits of shape (rows, vocabulary), with minus infinity where the bit of a token is not
    set in ``masks``, of shape (rows, ceil(vocabulary / 32))."""
    bits = (masks[:, :, None] >> mx.arange(BITS, dtype=mx.uint32)) & 1
    is_allowed = bits.reshape(len(masks), -1)[:, : logits.shape[1]]
    return mx.where(is_allowed.astype(mx.bool_), logits, -mx.inf)
