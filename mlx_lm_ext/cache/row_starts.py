"""At which place of the batch's arrays the tokens of each row start. This is known in Python,
so that no array has to be read from the device."""

from dataclasses import dataclass
from functools import cached_property
from typing import List, Optional

import mlx.core as mx


@dataclass
class RowStarts:
    """Where the rows of a batch start. Layers whose rows start alike share one object, so
    that its arrays are made once a step.

    Args:
        starts (List[int]): For each row, the index of the token in the first column of
          the KV arrays. It is negative if the row has so many columns of padding before
          its first token, and positive if so many tokens of a window were dropped.
    """

    starts: List[int]

    # The column for which ``offsets`` were computed.
    end = -1

    @cached_property
    def padding(self) -> List[int]:
        """Columns before the first token of each row."""
        return [max(0, -start) for start in self.starts]

    @cached_property
    def left_padding(self) -> Optional[mx.array]:
        """``padding`` as an array of shape (rows,), or ``None`` if no row has any."""
        return mx.array(self.padding) if any(self.padding) else None

    @cached_property
    def first(self) -> mx.array:
        return mx.array(self.starts)

    def offset(self, end: int) -> mx.array:
        """How many tokens each row has seen if its next one goes into column ``end``:
        an array of shape (rows,)."""
        if end != self.end:
            self.end, self.offsets = end, self.first + end
        return self.offsets

    def shift(self, n: int) -> "RowStarts":
        """The starts of the same rows after they were moved ``n`` columns to the right."""
        return RowStarts([start - n for start in self.starts]) if n else self

    def filter(self, keep: List[int]) -> "RowStarts":
        """The starts of the rows at these indices."""
        return RowStarts([self.starts[i] for i in keep])
