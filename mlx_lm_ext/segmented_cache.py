"""A ``KVCache`` made of segments, and the batch that its rows join and leave in place.

Rules:
1. What is shared is not written to: a cache writes into arrays of its own.
2. A row joins a batch, or leaves it, with one copy of one row.
"""

from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional, Tuple

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

# The arrays of one layer. Those of a segment have the tokens on the last axis but one.
Arrays = List[Optional[mx.array]]


def slices(arrays: Arrays, start: int, stop: int) -> Arrays:
    return [x[..., start:stop, :] for x in arrays]


def join(parts: List[Arrays], n: int) -> Arrays:
    """The first ``n`` tokens of consecutive segments, in new arrays.

    A cache writes into its arrays in place; those of the segments must stay as they are.
    """
    joined = [mx.concatenate(x, axis=-2) if len(x) > 1 else x[0] for x in zip(*parts)]
    return slices(joined, 0, n)


class SegmentedKVCache(KVCache):
    """A ``KVCache`` whose first tokens are still in the segments that it was made of.

    ``merge`` copies them straight into a batch. They are joined when it is used alone.

    Args:
        parts (List[Arrays]): Consecutive segments: keys and values of each.
        n (int): How many of their tokens it has.
    """

    parts: List[Arrays] = []
    # Tokens that are about to follow: a batch makes room for them.
    n_to_come = 0

    def __init__(self, parts: Iterable[Arrays] = (), n: int = 0):
        super().__init__()
        self.parts = list(parts)
        self.offset = n

    def join(self) -> None:
        if self.parts:
            self.keys, self.values = join(self.parts, self.offset)

    @property
    def keys(self) -> Optional[mx.array]:
        self.join()
        return self.joined_keys

    @keys.setter
    def keys(self, value: Optional[mx.array]) -> None:
        self.parts = []
        self.joined_keys = value

    @property
    def values(self) -> Optional[mx.array]:
        self.join()
        return self.joined_values

    @values.setter
    def values(self, value: Optional[mx.array]) -> None:
        self.joined_values = value

    def empty(self) -> bool:
        return not self.parts and super().empty()

    @property
    def nbytes(self) -> int:
        """Bytes of its own: segments belong to who keeps them."""
        return 0 if self.parts else super().nbytes

    @classmethod
    def merge(cls, caches: List[KVCache]) -> "BatchSegmentedKVCache":
        return BatchSegmentedKVCache.merge(caches)


@dataclass
class Run:
    """Neighbouring rows of a batch that begin a segment at the same token.

    Args:
        row (int): The first of them.
        start (int): The token.
        part (Arrays): The segment.
        stop (int): The row after the last.
    """

    row: int
    start: int
    part: Arrays
    stop: int


class BatchSegmentedKVCache(BatchKVCache):
    """A ``BatchKVCache`` that rows join and leave without a copy of the others.

    Its arrays may have spare rows. What it extracts is a view of a row, of which the
    prompt cache copies what it lacks.
    """

    # Copies of the rows that ``filter`` is about to move: of keys, and of values.
    movers: Optional[List[List[mx.array]]] = None

    @property
    def n_rows(self) -> int:
        return self.offset.shape[0]

    def drop_spare_rows(self) -> None:
        if self.keys is not None and self.keys.shape[0] > self.n_rows:
            self.keys = self.keys[: self.n_rows]
            self.values = self.values[: self.n_rows]

    @classmethod
    def merge(cls, caches: List[KVCache]) -> "BatchSegmentedKVCache":
        length = max(c.size() for c in caches)
        padding = [length - c.size() for c in caches]
        batch = cls(padding)
        if length == 0:
            return batch
        rows = [
            getattr(c, "parts", None) or ([(c.keys, c.values)] if c.size() else [])
            for c in caches
        ]
        n_to_come = max(getattr(c, "n_to_come", 0) for c in caches)
        # An array without room would be copied for the next token.
        capacity = ((length + n_to_come) // cls.step + 1) * cls.step

        # Neighbours that share a segment get it with one copy.
        runs: List[Run] = []
        found: Dict[Tuple[int, int], Run] = {}
        for row, (parts, start) in enumerate(zip(rows, padding)):
            for part in parts:
                run = found.get((id(part), start))
                if run is None or run.stop < row:
                    run = found[id(part), start] = Run(row, start, part, row + 1)
                    runs.append(run)
                run.stop = row + 1
                start += part[0].shape[2]

        def merged(i: int) -> mx.array:
            like = runs[0].part[i]
            shape = (len(rows), like.shape[1], capacity, like.shape[3])
            x = mx.zeros(shape, like.dtype)
            for run in runs:
                end = min(run.start + run.part[i].shape[2], length)
                part = run.part[i][..., : end - run.start, :]
                x[run.row : run.stop, :, run.start : end] = part
            return x

        left_padding = mx.array(padding)
        batch.state = (
            merged(0),
            merged(1),
            length - left_padding,
            left_padding,
            length,
        )
        return batch

    def keys_and_values(self) -> Tuple[mx.array, mx.array]:
        n, end = self.n_rows, self.size()
        return self.keys[:n, :, :end], self.values[:n, :, :end]

    def prepare(self, **kwargs) -> None:
        self.drop_spare_rows()
        super().prepare(**kwargs)

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> Tuple[mx.array, mx.array]:
        n = self.n_rows
        if self.keys is None or self.keys.shape[0] == n:
            return super().update_and_fetch(keys, values)
        start, length = self.size(), keys.shape[2]
        end = start + length
        if end > self.keys.shape[2]:
            more = -(-length // self.step) * self.step
            self.keys, self.values = (
                mx.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)])
                for x in (self.keys, self.values)
            )
        self.keys[:n, :, start:end] = keys
        self.values[:n, :, start:end] = values
        offset = self.offset + length
        self.state = (self.keys, self.values, offset, self.left_padding, end)
        return self.keys_and_values()

    def extend(self, other: "BatchSegmentedKVCache") -> None:
        end, length = self.size(), other.size()
        if self.keys is None or other.keys is None or length > end:
            # The rows are wider than the batch: all have to move.
            self.drop_spare_rows()
            other.drop_spare_rows()
            super().extend(other)
            return
        n = self.n_rows
        total = n + other.n_rows
        if total > self.keys.shape[0]:
            spare = total - n + n // 4
            self.keys, self.values = (
                mx.concatenate([x[:n], mx.zeros((spare, *x.shape[1:]), x.dtype)])
                for x in (self.keys, self.values)
            )
        start = end - length
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[n:total, :, start:end] = theirs[: other.n_rows, :, :length]
        self.offset = mx.concatenate([self.offset, other.offset])
        self.left_padding = mx.concatenate(
            [self.left_padding, other.left_padding + start]
        )

    def stage(self, batch_indices: List[int]) -> List[mx.array]:
        """Prepare for ``filter``; gives what is best evaluated for all layers at once."""
        if self.keys is None:
            return []
        if 2 * len(batch_indices) < self.keys.shape[0]:
            return [self.left_padding]
        self.movers = [
            [mx.contiguous(x[i : i + 1]) for j, i in enumerate(batch_indices) if i != j]
            for x in (self.keys, self.values)
        ]
        return [self.left_padding, *self.movers[0], *self.movers[1]]

    def filter(self, batch_indices: List[int]) -> None:
        """Keep these rows, in this order. Only those that move are copied, unless few are
        left or all have much padding."""
        if self.keys is None:
            super().filter(batch_indices)
            return
        n, end = len(batch_indices), self.size()
        paddings = self.left_padding.tolist()
        padding = min(paddings[i] for i in batch_indices)
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]
        narrow = padding >= max(32, end // 4)
        if narrow or 2 * n < self.keys.shape[0]:
            # Worth a copy of all that stay.
            self.movers = None
            start = padding if narrow else 0
            self.state = (
                self.keys[batch_indices, :, start:],
                self.values[batch_indices, :, start:],
                self.offset,
                self.left_padding - start,
                end - start,
            )
            return
        # While one of them is lazy, the write would copy all rows.
        mx.eval(self.movers or self.stage(batch_indices))
        places = [j for j, i in enumerate(batch_indices) if i != j]
        for x, rows in zip((self.keys, self.values), self.movers):
            for j, row in zip(places, rows):
                x[j : j + 1] = row
        self.movers = None

    def extract(self, idx: int) -> KVCache:
        start, end = self.left_padding.tolist()[idx], self.size()
        keys, values = (
            x[idx : idx + 1, :, start:end] for x in (self.keys, self.values)
        )
        return KVCache.from_state((keys, values, keys.shape[2]))
