"""A ``KVCache`` made of segments, and a batch of such rows that changes in place.

Rules:
1. Segments are shared and are never written to: a cache writes into arrays of its own.
2. A row joins or leaves a batch with one copy of one row.
3. The arrays that ``extract`` gives are views of the batch's arrays. Who keeps them copies
   them, and evaluates the copies, before the next step of the batch. While a view or a
   copy that is not evaluated exists, MLX cannot write in place: the step copies all rows.
"""

from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    create_attention_mask,
    dynamic_roll,
)

from . import growth
from .row_starts import RowStarts

# The arrays of one layer. Those of a segment have the shape (..., tokens, dim).
Arrays = List[Optional[mx.array]]


def slices(arrays: Arrays, start: int, stop: int) -> Arrays:
    """The tokens from ``start`` to ``stop``, as views."""
    return [x[..., start:stop, :] for x in arrays]


def n_tokens_of(segment: Arrays) -> int:
    first, *_ = segment
    return first.shape[-2]


def concatenate(segments: List[Arrays], n: int) -> Arrays:
    """The first ``n`` tokens of consecutive segments.

    Returns:
        Arrays: New array objects, also for a single segment. A cache assigns to slices of
        its arrays, which must not change the arrays of the segment.
    """
    whole = [mx.concatenate(x, axis=-2) if len(x) > 1 else x[0] for x in zip(*segments)]
    return slices(whole, 0, n)


class RowMove(NamedTuple):
    """Neighbouring rows of a batch that move together.

    Args:
        source (int): The index of the first of them.
        target (int): Its index after the move.
        n (int): How many rows move.
    """

    source: int
    target: int
    n: int


def row_moves(batch_indices: List[int]) -> List[RowMove]:
    """The moves after which the rows at these indices are the first ones, in this order."""
    moves: List[RowMove] = []
    for target, source in enumerate(batch_indices):
        if source == target:
            continue
        last = moves[-1] if moves else RowMove(0, 0, 0)
        if last.n and (source, target) == (last.source + last.n, last.target + last.n):
            moves[-1] = last._replace(n=last.n + 1)
        else:
            moves.append(RowMove(source, target, 1))
    return moves


class SegmentedKVCache(KVCache):
    """A ``KVCache`` whose first tokens are still in the segments of the prompt cache.

    ``merge`` copies the segments straight into the arrays of a batch. If the cache is used
    without a batch, they are concatenated first.

    Args:
        segments (Iterable[Arrays]): Consecutive segments: keys and values of each.
        n (int): How many of their tokens the cache has.
    """

    segments: List[Arrays] = []
    # How many tokens are about to follow: ``merge`` makes room for them.
    n_to_come = 0

    def __init__(self, segments: Iterable[Arrays] = (), n: int = 0):
        super().__init__()
        self.segments = list(segments)
        self.offset = n

    def leave_segments(self) -> None:
        """Copy the segments into arrays of this cache."""
        if self.segments:
            self.keys, self.values = concatenate(self.segments, self.offset)

    @property
    def keys(self) -> Optional[mx.array]:
        self.leave_segments()
        return self.own_keys

    @keys.setter
    def keys(self, value: Optional[mx.array]) -> None:
        self.segments = []
        self.own_keys = value

    @property
    def values(self) -> Optional[mx.array]:
        self.leave_segments()
        return self.own_values

    @values.setter
    def values(self, value: Optional[mx.array]) -> None:
        self.own_values = value

    def empty(self) -> bool:
        return not self.segments and super().empty()

    @property
    def nbytes(self) -> int:
        """Bytes of its own arrays. Segments are counted by the prompt cache."""
        return 0 if self.segments else super().nbytes

    @classmethod
    def merge(cls, caches: List[KVCache]) -> "BatchSegmentedKVCache":
        return BatchSegmentedKVCache.merge(caches)


@dataclass
class SharedSegment:
    """A segment that neighbouring rows of a batch have in the same columns.

    Args:
        segment (Arrays): The segment.
        start (int): Its first column.
        row (int): The first of the rows.
        stop (int): The row after the last of them.
    """

    segment: Arrays
    start: int
    row: int
    stop: int


class BatchSegmentedKVCache(BatchKVCache):
    """A ``BatchKVCache`` that rows join and leave without a copy of the other rows.

    Its arrays have the shape (rows, heads, columns, dim). They may have spare rows and
    columns after those in use: ``cache/growth.py`` says how many.

    Args:
        left_padding (List[int]): Columns of padding before the first token of each row.
    """

    # Copies of the rows that ``filter`` is about to move: where to, keys and values.
    staged: Optional[List[Tuple[int, mx.array, mx.array]]] = None
    # Whether the attention gets the arrays as they are, see ``whole``.
    is_whole = False
    # Columns of padding after the tokens of each row, between ``prepare`` and ``settle``.
    right_padding: Optional[List[int]] = None
    # Rows that are about to join, and that will do so later: arrays that grow get room for them.
    n_to_join = 0
    n_to_follow = 0

    def __init__(self, left_padding: List[int]):
        self.state = None, None, RowStarts([-n for n in left_padding]), 0

    @property
    def state(self) -> Tuple[Optional[mx.array], Optional[mx.array], RowStarts, int]:
        return self.keys, self.values, self.row_starts, self.end

    @state.setter
    def state(self, v: Tuple[Optional[mx.array], Optional[mx.array], RowStarts, int]):
        # ``end`` is the first column that is not in use.
        self.keys, self.values, self.row_starts, self.end = v

    @property
    def offset(self) -> mx.array:
        """How many tokens each row has seen."""
        return self.row_starts.offset(self.end)

    @property
    def n_rows(self) -> int:
        return len(self.row_starts.starts)

    def size(self) -> int:
        return self.end

    def trim(self, n: int) -> int:
        n = min(self.end, n)
        self.end -= n
        return n

    @classmethod
    def merge(cls, caches: List[KVCache]) -> "BatchSegmentedKVCache":
        length = max(c.size() for c in caches)
        padding = [length - c.size() for c in caches]
        batch = cls(padding)
        if length == 0:
            return batch
        rows = [
            getattr(c, "segments", None) or ([(c.keys, c.values)] if c.size() else [])
            for c in caches
        ]
        n_to_come = max(getattr(c, "n_to_come", 0) for c in caches)
        capacity = growth.merged_capacity(length, n_to_come)

        # One copy writes a segment into all neighbouring rows that share it.
        shared: List[SharedSegment] = []
        latest: Dict[Tuple[int, int], SharedSegment] = {}
        for row, (segments, start) in enumerate(zip(rows, padding)):
            for segment in segments:
                if start >= length:
                    # The cache was trimmed.
                    break
                s = latest.get((id(segment), start))
                if s is None or s.stop < row:
                    s = SharedSegment(segment, start, row, row + 1)
                    latest[id(segment), start] = s
                    shared.append(s)
                s.stop = row + 1
                start += n_tokens_of(segment)

        def merged(i: int) -> mx.array:
            like = shared[0].segment[i]
            shape = (len(rows), like.shape[1], capacity, like.shape[3])
            x = mx.zeros(shape, like.dtype)
            for s in shared:
                end = min(s.start + n_tokens_of(s.segment), length)
                part = s.segment[i][..., : end - s.start, :]
                x[s.row : s.stop, :, s.start : end] = part
            return x

        batch.state = merged(0), merged(1), batch.row_starts, length
        return batch

    def keys_and_values(self) -> Tuple[mx.array, mx.array]:
        n, end = self.n_rows, self.end
        if self.is_whole:
            end = self.keys.shape[2]
        return self.keys[:n, :, :end], self.values[:n, :, :end]

    @classmethod
    @contextmanager
    def whole(cls, layers: "List[BatchSegmentedKVCache]") -> Iterator[int]:
        """Meanwhile, the attention gets all rows and columns of the arrays, the unused ones hidden
        by the mask: its shapes stay the same from step to step.

        Args:
            layers (List[BatchSegmentedKVCache]): The layers of a model, with the same shapes.

        Yields:
            int: The rows that there are, spare ones included.
        """
        first, *_ = layers
        n_rows, starts = len(first.keys), first.row_starts
        every = RowStarts(starts.starts + [0] * (n_rows - len(starts.starts)))
        for c in layers:
            c.row_starts, c.is_whole = every, True
        try:
            yield n_rows
        finally:
            for c in layers:
                c.row_starts, c.is_whole = starts, False

    def make_mask(
        self, N: int, return_array: bool = False, window_size: Optional[int] = None
    ) -> Any:
        """What the next ``N`` tokens of each row attend to.

        As in a ``KVCache``, the mask is an array only if it has to be one: the attention
        is faster without.
        """
        if self.is_whole:
            return self.whole_mask(N)
        if window_size is not None and self.end + N <= window_size:
            window_size = None
        padding = self.row_starts.left_padding
        if padding is None:
            return create_attention_mask(N, self.end, return_array, window_size)
        return create_causal_mask(N, self.end, window_size, left_padding=padding)

    def whole_mask(self, N: int) -> mx.array:
        """What is added to the scores of the next ``N`` tokens, of shape (rows, 1, N, columns of
        the arrays): a mask of that type is used as it is."""
        n_columns = growth.grown_columns(self.keys.shape[2], self.end + N)
        columns, queries = mx.arange(n_columns), mx.arange(N)
        first = mx.array(self.row_starts.padding)
        is_seen = columns >= first[:, None, None]
        is_seen = is_seen & (columns <= self.end + queries[:, None])
        seen, hidden = mx.array([0, -mx.inf], self.keys.dtype)
        return mx.where(is_seen, seen, hidden)[:, None]

    def prepare(self, *, lengths: List[int], right_padding: List[int]) -> None:
        self.right_padding = right_padding

    def finalize(self) -> None:
        """The padding stays until the rows are used again. Rows of which only the last token
        is left go to another batch before that, and ``extend`` does not copy it."""

    def settle(self) -> None:
        """Move the padding after the tokens of the rows to the left of them."""
        padding, self.right_padding = self.right_padding, None
        if padding is None or not any(padding):
            return
        n, shifts = self.n_rows, mx.array(padding)[:, None]
        self.keys = dynamic_roll(self.keys[:n], shifts, axis=2)
        self.values = dynamic_roll(self.values[:n], shifts, axis=2)
        starts = [s - n for s, n in zip(self.row_starts.starts, padding)]
        self.row_starts = RowStarts(starts)

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> Tuple[mx.array, mx.array]:
        n, start = self.n_rows, self.end
        end = self.end = start + keys.shape[2]
        if self.keys is None:
            capacity = growth.capacity(end)
            self.keys, self.values = (
                mx.zeros((n, x.shape[1], capacity, x.shape[3]), x.dtype)
                for x in (keys, values)
            )
        elif end > self.keys.shape[2]:
            # All rows are copied in any case, so that spare ones cost nothing to give up.
            n_columns = self.keys.shape[2]
            more = growth.grown_columns(n_columns, end) - n_columns
            self.keys, self.values = (
                mx.pad(x[:n], [(0, 0), (0, 0), (0, more), (0, 0)])
                for x in (self.keys, self.values)
            )
        self.keys[:n, :, start:end] = keys
        self.values[:n, :, start:end] = values
        return self.keys_and_values()

    def extend(self, other: "BatchSegmentedKVCache") -> None:
        self.settle()
        padding = other.right_padding or [0] * other.n_rows
        n, n_new = self.n_rows, max(other.n_rows, self.n_to_join)
        n_wider = other.end - min(padding) - self.end
        is_widened = False
        if n_wider > 0 or (
            self.keys is not None and n + other.n_rows > self.keys.shape[0]
        ):
            n_new = growth.grown_rows(n, n_new, self.n_to_follow) - n
            self.widen(max(0, n_wider), n_new, other)
            is_widened = True
        starts = list(self.row_starts.starts)
        for n_right, rows in groupby(range(other.n_rows), padding.__getitem__):
            i, *others = rows
            j = i + len(others) + 1
            used = other.end - n_right
            start = self.end - used
            for x, y in ((self.keys, other.keys), (self.values, other.values)):
                if used:
                    x[n + i : n + j, :, start : self.end] = y[i:j, :, :used]
                if start and not is_widened:
                    # A weight of 0 does not remove the NaN of a row that was there before.
                    x[n + i : n + j, :, :start] = 0
            starts += [s - start for s in other.row_starts.starts[i:j]]
        self.row_starts = RowStarts(starts)

    def widen(self, n: int, n_new: int, other: "BatchSegmentedKVCache") -> None:
        """Copy all rows, ``n`` columns to the right, into arrays with room for ``n_new`` rows
        like ``other``'s."""

        def wider(mine: Optional[mx.array], theirs: mx.array) -> mx.array:
            if mine is None:
                shape = (self.n_rows, theirs.shape[1], 0, theirs.shape[3])
                mine = mx.zeros(shape, theirs.dtype)
            end = self.end + n
            n_columns = (theirs if n else mine).shape[2]
            # Those of arrays that had padding may be more than were planned for.
            n_columns = min(n_columns, growth.capacity(end + growth.STEP))
            n_spare = growth.roomy_columns(n_columns, end) - end
            pads = [(0, n_new), (0, 0), (n, n_spare), (0, 0)]
            return mx.pad(mine[: self.n_rows, :, : self.end], pads)

        self.state = (
            wider(self.keys, other.keys),
            wider(self.values, other.values),
            self.row_starts.shift(n),
            self.end + n,
        )

    def stage(self, batch_indices: List[int]) -> List[mx.array]:
        """Copy the rows that ``filter`` will move.

        Returns:
            List[mx.array]: The copies. The caller evaluates those of all layers in one
            call before it calls ``filter``.
        """
        if self.keys is None or growth.are_few(len(batch_indices), len(self.keys)):
            return []
        self.staged = [
            (to, *(mx.contiguous(x[i : i + n]) for x in (self.keys, self.values)))
            for i, to, n in row_moves(batch_indices)
        ]
        return [x for _, *copies in self.staged for x in copies]

    def filter(self, batch_indices: List[int]) -> None:
        """Keep these rows, in this order.

        Only the rows that move are copied, unless so few are left, or all have so much
        padding, that smaller arrays are worth a copy of all rows.
        """
        row_starts, padding = self.row_starts.filter(batch_indices), self.right_padding
        if padding is not None:
            padding = [padding[i] for i in batch_indices]
        if self.keys is None:
            self.row_starts = row_starts
            return
        has_excess = growth.is_excess(min(row_starts.padding), self.end)
        if has_excess or growth.are_few(len(batch_indices), len(self.keys)):
            self.staged, self.state = None, self.take(batch_indices).state
            self.right_padding = padding
            return
        if self.staged is None:
            # While one of the copies is lazy, writing a row would copy all rows.
            mx.eval(self.stage(batch_indices))
        for to, keys, values in self.staged:
            self.keys[to : to + len(keys)] = keys
            self.values[to : to + len(values)] = values
        self.row_starts, self.staged = row_starts, None
        self.right_padding = padding

    def take(self, batch_indices: List[int]) -> "BatchSegmentedKVCache":
        """A batch of copies of these rows, in this order, without padding that all have. The
        copies are lazy: the caller evaluates them before the next step."""
        batch = copy(self)
        batch.staged, batch.row_starts = None, self.row_starts.filter(batch_indices)
        if self.right_padding is not None:
            batch.right_padding = [self.right_padding[i] for i in batch_indices]
        if self.keys is not None:
            start = growth.dropped(min(batch.row_starts.padding), self.end)
            batch.state = (
                self.keys[batch_indices, :, start:],
                self.values[batch_indices, :, start:],
                batch.row_starts.shift(-start),
                self.end - start,
            )
        return batch

    def extract(self, idx: int) -> KVCache:
        """One row, as views of the batch's arrays: see rule 3 above."""
        start, end = self.row_starts.padding[idx], self.end
        if self.right_padding is not None:
            end -= self.right_padding[idx]
        keys, values = (
            x[idx : idx + 1, :, start:end] for x in (self.keys, self.values)
        )
        return KVCache.from_state((keys, values, end - start))
