"""The KV of sliding-window layers: batches that rows join and leave in place.

Rules:
1. The tokens are in order, unlike in a ``RotatingKVCache``. Those that have left the
   window stay for a while, hidden by the mask.
2. They are dropped between two steps, in all layers at once. The layers share one mask in
   a step, and so must have the same width.
"""

from typing import Any, List, Optional

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from . import growth
from .row_starts import RowStarts
from .segmented import Arrays, BatchSegmentedKVCache, SegmentedKVCache, n_tokens_of


def in_order(cache: RotatingKVCache) -> Arrays:
    """The keys and values of a window, the oldest token first."""
    keys, values, offset, keep, max_size, index = cache.state

    def ordered(x):
        if index < min(offset, x.shape[-2]):
            # It has wrapped: the next token is written at index.
            parts = [x[..., :keep, :], x[..., index:, :], x[..., keep:index, :]]
            x = mx.concatenate(parts, axis=-2)
        else:
            x = x[..., :index, :]
        excess = x.shape[-2] - max_size
        if excess > 0:
            parts = [x[..., :keep, :], x[..., keep + excess :, :]]
            x = mx.concatenate(parts, axis=-2)
        return x

    return [ordered(keys), ordered(values)]


class SlidingKVCache(RotatingKVCache):
    """A ``RotatingKVCache`` that merges into a ``BatchSlidingKVCache``."""

    @classmethod
    def merge(cls, caches: List[RotatingKVCache]) -> "BatchSlidingKVCache":
        return BatchSlidingKVCache.merge(caches)


class BatchSlidingKVCache(BatchSegmentedKVCache):
    """Takes the place of ``BatchRotatingKVCache``, with the tokens in order.

    Args:
        left_padding (List[int]): Columns of padding before the first token of each row.
        max_size (int): Tokens of the window.
    """

    def __init__(self, left_padding: List[int], max_size: int = 0):
        super().__init__(left_padding)
        self.max_size = max_size

    @classmethod
    def merge(cls, caches: List[RotatingKVCache]) -> "BatchSlidingKVCache":
        rows = []
        for cache in caches:
            segments = [] if cache.empty() else [in_order(cache)]
            rows.append(SegmentedKVCache(segments, sum(map(n_tokens_of, segments))))
        batch = super().merge(rows)
        batch.max_size = caches[0].max_size
        batch.row_starts = RowStarts([c.offset - batch.end for c in caches])
        return batch

    def drop_old(self, slack: int = 0) -> None:
        """Drop the tokens that have left the window, if they are more than ``slack``."""
        end = self.end
        n = end - self.max_size
        if n <= slack:
            return

        def newest(x: mx.array) -> mx.array:
            n_free = growth.window_capacity(self.max_size) - self.max_size
            # All rows are copied in any case, so that spare ones cost nothing to give up.
            rows = x[: self.n_rows]
            room = mx.zeros((*rows.shape[:2], n_free, x.shape[3]), x.dtype)
            return mx.concatenate([rows[:, :, n:end], room], axis=2)

        self.state = (
            newest(self.keys),
            newest(self.values),
            self.row_starts.shift(-n),
            self.max_size,
        )

    def finalize(self) -> None:
        self.settle()

    def make_mask(
        self, N: int, return_array: bool = False, window_size: Optional[int] = None
    ) -> Any:
        return super().make_mask(N, return_array, window_size or self.max_size)

    def extend(self, other: "BatchSlidingKVCache") -> None:
        other.drop_old()
        super().extend(other)

    def extract(self, idx: int) -> SlidingKVCache:
        keys, values, n_kept = super().extract(idx).state
        offset = self.row_starts.starts[idx] + self.end
        state = (keys, values, offset, 0, self.max_size, n_kept)
        return SlidingKVCache.from_state(state)
