"""The KV of sliding-window layers, kept in order: a batch that rows join and leave in place.

Rules:
1. Tokens that have left the window stay for a while; the mask hides them.
2. They are dropped between two steps, from all layers at once: a step's mask has one
   width.
"""

from typing import Any, List, Optional

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from . import growth
from .row_starts import Rows
from .segmented import Arrays, BatchSegmentedKVCache, SegmentedKVCache, n_tokens_of


def in_order(cache: RotatingKVCache) -> Arrays:
    """The keys and values in a window, the oldest first."""
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
    """What ``BatchRotatingKVCache`` is for, with the tokens in order.

    Args:
        left_padding (List[int]): Of each row.
        max_size (int): Tokens of the window.
    """

    def __init__(self, left_padding: List[int], max_size: int = 0):
        super().__init__(left_padding)
        self.max_size = max_size

    @classmethod
    def merge(cls, caches: List[RotatingKVCache]) -> "BatchSlidingKVCache":
        rows = []
        for cache in caches:
            parts = [] if cache.empty() else [in_order(cache)]
            rows.append(SegmentedKVCache(parts, sum(map(n_tokens_of, parts))))
        batch = super().merge(rows)
        batch.max_size = caches[0].max_size
        batch.rows = Rows([c.offset - batch.end for c in caches])
        return batch

    def drop_old(self, n_spare: int = 0) -> None:
        """Drop what has left the window, if that is more than ``n_spare`` tokens."""
        end = self.end
        n = end - self.max_size
        if n <= n_spare:
            return

        def newest(x: mx.array) -> mx.array:
            n_free = growth.window_capacity(self.max_size) - self.max_size
            room = mx.zeros((*x.shape[:2], n_free, x.shape[3]), x.dtype)
            return mx.concatenate([x[:, :, n:end], room], axis=2)

        self.state = (
            newest(self.keys),
            newest(self.values),
            self.rows.moved(-n),
            self.max_size,
        )

    def make_mask(
        self, N: int, return_array: bool = False, window_size: Optional[int] = None
    ) -> Any:
        return super().make_mask(N, return_array, window_size or self.max_size)

    def extend(self, other: "BatchSlidingKVCache") -> None:
        other.drop_old()
        super().extend(other)

    def extract(self, idx: int) -> SlidingKVCache:
        cache = super().extract(idx)
        offset = self.rows.starts[idx] + self.end
        state = (cache.keys, cache.values, offset, 0, self.max_size, cache.offset)
        return SlidingKVCache.from_state(state)
