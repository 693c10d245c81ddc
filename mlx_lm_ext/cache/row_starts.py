"""Where the rows of a batch begin: known without the device, which may be a step behind."""

from dataclasses import dataclass
from functools import cached_property
from typing import List, Optional

import mlx.core as mx


@dataclass
class Rows:
    """Where the rows of a batch begin. Layers that agree share it.

    Args:
        starts (List[int]): Which token of each row has the first place. It is negative if
          so many places before the first token are empty.
    """

    starts: List[int]

    # The place that the offsets are for.
    end = -1

    @cached_property
    def padding(self) -> List[int]:
        return [max(0, -start) for start in self.starts]

    @cached_property
    def left_padding(self) -> Optional[mx.array]:
        return mx.array(self.padding) if any(self.padding) else None

    @cached_property
    def first(self) -> mx.array:
        return mx.array(self.starts)

    def offset(self, end: int) -> mx.array:
        """How many tokens each row has before the place ``end``."""
        if end != self.end:
            self.end, self.offsets = end, self.first + end
        return self.offsets

    def moved(self, n: int) -> "Rows":
        """The same rows, ``n`` places to the right."""
        return Rows([start - n for start in self.starts]) if n else self

    def filter(self, keep: List[int]) -> "Rows":
        return Rows([self.starts[i] for i in keep])
