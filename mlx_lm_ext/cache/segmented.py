"""A ``KVCache`` made of segments, and the batch that its rows join and leave in place.

Rules:
1. What is shared is not written to: a cache writes into arrays of its own.
2. A row joins a batch, or leaves it, with one copy of one row.
3. The arrays that ``extract`` gives are views of the batch's arrays. Who keeps them copies
   them, and evaluates the copies, before the next step of the batch: while a view or a
   copy that is not evaluated exists, MLX cannot write in place, and that step copies all
   rows.
"""

from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Tuple

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    create_attention_mask,
    dynamic_roll,
)

from . import growth
from .row_starts import Rows

# The arrays of one layer. Those of a segment have the tokens on the last axis but one.
Arrays = List[Optional[mx.array]]


def slices(arrays: Arrays, start: int, stop: int) -> Arrays:
    return [x[..., start:stop, :] for x in arrays]


def n_tokens_of(segment: Arrays) -> int:
    first, *_ = segment
    return first.shape[-2]


def join(parts: List[Arrays], n: int) -> Arrays:
    """The first ``n`` tokens of consecutive segments, in new arrays.

    A cache writes into its arrays in place; those of the segments must stay as they are.
    """
    joined = [mx.concatenate(x, axis=-2) if len(x) > 1 else x[0] for x in zip(*parts)]
    return slices(joined, 0, n)


def moves(batch_indices: List[int]) -> List[Tuple[int, int, int]]:
    """The rows that are to move, as runs of neighbours: the first of each, where it goes,
    and how many they are."""
    runs: List[Tuple[int, int, int]] = []
    for place, row in enumerate(batch_indices):
        if row == place:
            continue
        first, to, n = runs[-1] if runs else (0, 0, 0)
        if n and (row, place) == (first + n, to + n):
            runs[-1] = first, to, n + 1
        else:
            runs.append((row, place, 1))
    return runs


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

    Args:
        left_padding (List[int]): Of each row.
    """

    # Where ``filter`` is about to move rows, with copies of their keys and values.
    movers: Optional[List[Tuple[int, mx.array, mx.array]]] = None
    # Of the tokens that are about to come.
    right_padding: Optional[List[int]] = None

    def __init__(self, left_padding: List[int]):
        self.state = None, None, Rows([-n for n in left_padding]), 0

    @property
    def state(self) -> Tuple[Optional[mx.array], Optional[mx.array], Rows, int]:
        return self.keys, self.values, self.rows, self.end

    @state.setter
    def state(self, v: Tuple[Optional[mx.array], Optional[mx.array], Rows, int]):
        self.keys, self.values, self.rows, self.end = v

    @property
    def offset(self) -> mx.array:
        """How many tokens each row has."""
        return self.rows.offset(self.end)

    @property
    def n_rows(self) -> int:
        return len(self.rows.starts)

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
            getattr(c, "parts", None) or ([(c.keys, c.values)] if c.size() else [])
            for c in caches
        ]
        n_to_come = max(getattr(c, "n_to_come", 0) for c in caches)
        capacity = growth.merged_capacity(length, n_to_come)

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
                start += n_tokens_of(part)

        def merged(i: int) -> mx.array:
            like = runs[0].part[i]
            shape = (len(rows), like.shape[1], capacity, like.shape[3])
            x = mx.zeros(shape, like.dtype)
            for run in runs:
                end = min(run.start + run.part[i].shape[2], length)
                part = run.part[i][..., : end - run.start, :]
                x[run.row : run.stop, :, run.start : end] = part
            return x

        batch.state = merged(0), merged(1), batch.rows, length
        return batch

    def keys_and_values(self) -> Tuple[mx.array, mx.array]:
        n, end = self.n_rows, self.end
        return self.keys[:n, :, :end], self.values[:n, :, :end]

    def make_mask(
        self, N: int, return_array: bool = False, window_size: Optional[int] = None
    ) -> Any:
        """What ``N`` more tokens of each row see. As in a ``KVCache``, it is an array only
        if it has to be one: other masks have faster kernels."""
        if window_size is not None and self.end + N <= window_size:
            window_size = None
        padding = self.rows.left_padding
        if padding is None:
            return create_attention_mask(N, self.end, return_array, window_size)
        return create_causal_mask(N, self.end, window_size, left_padding=padding)

    def prepare(self, *, lengths: List[int], right_padding: List[int]) -> None:
        if self.keys is not None and self.keys.shape[0] > self.n_rows:
            # The spare rows would have to be rolled as well.
            self.keys = self.keys[: self.n_rows]
            self.values = self.values[: self.n_rows]
        self.right_padding = right_padding

    def finalize(self) -> None:
        padding, self.right_padding = self.right_padding, None
        if padding is not None:
            shifts = mx.array(padding)[:, None]
            self.keys = dynamic_roll(self.keys, shifts, axis=2)
            self.values = dynamic_roll(self.values, shifts, axis=2)
            self.rows = Rows([s - n for s, n in zip(self.rows.starts, padding)])

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> Tuple[mx.array, mx.array]:
        n, start = self.n_rows, self.end
        end = self.end = start + keys.shape[2]
        capacity = growth.capacity(end)
        if self.keys is None:
            self.keys, self.values = (
                mx.zeros((n, x.shape[1], capacity, x.shape[3]), x.dtype)
                for x in (keys, values)
            )
        elif end > self.keys.shape[2]:
            more = capacity - self.keys.shape[2]
            self.keys, self.values = (
                mx.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)])
                for x in (self.keys, self.values)
            )
        self.keys[:n, :, start:end] = keys
        self.values[:n, :, start:end] = values
        return self.keys_and_values()

    def extend(self, other: "BatchSegmentedKVCache") -> None:
        n, more = self.n_rows, other.n_rows
        n_wider = other.end - self.end
        if n_wider > 0:
            self.widen(n_wider, other)
        elif self.keys is not None and n + more > self.keys.shape[0]:
            n_new = growth.grown_rows(n, more) - n
            self.keys, self.values = (
                mx.concatenate([x[:n], mx.zeros((n_new, *x.shape[1:]), x.dtype)])
                for x in (self.keys, self.values)
            )
        start, end = self.end - other.end, self.end
        if other.end:
            for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
                mine[n : n + more, :, start:end] = theirs[:more, :, : other.end]
        self.rows = Rows([*self.rows.starts, *other.rows.moved(start).starts])

    def widen(self, n: int, other: "BatchSegmentedKVCache") -> None:
        """Move all rows ``n`` places to the right, with room for the rows of ``other``."""

        def wider(mine: Optional[mx.array], theirs: mx.array) -> mx.array:
            if mine is None:
                shape = (self.n_rows, theirs.shape[1], 0, theirs.shape[3])
                mine = mx.zeros(shape, theirs.dtype)
            room = theirs.shape[2] - other.end
            pads = [(0, other.n_rows), (0, 0), (n, room), (0, 0)]
            return mx.pad(mine[: self.n_rows, :, : self.end], pads)

        self.state = (
            wider(self.keys, other.keys),
            wider(self.values, other.values),
            self.rows.moved(n),
            other.end,
        )

    def stage(self, batch_indices: List[int]) -> List[mx.array]:
        """Prepare for ``filter``; gives what is best evaluated for all layers at once."""
        if self.keys is None or growth.are_few(len(batch_indices), len(self.keys)):
            return []
        self.movers = [
            (to, *(mx.contiguous(x[i : i + n]) for x in (self.keys, self.values)))
            for i, to, n in moves(batch_indices)
        ]
        return [x for _, *copies in self.movers for x in copies]

    def filter(self, batch_indices: List[int]) -> None:
        """Keep these rows, in this order. Only those that move are copied, unless few are
        left or all have much padding."""
        rows = self.rows.filter(batch_indices)
        if self.keys is None:
            self.rows = rows
            return
        padding = min(rows.padding)
        narrow = growth.is_excess(padding, self.end)
        if narrow or growth.are_few(len(batch_indices), len(self.keys)):
            # Worth a copy of all that stay.
            self.movers = None
            start = padding if narrow else 0
            self.state = (
                self.keys[batch_indices, :, start:],
                self.values[batch_indices, :, start:],
                rows.moved(-start),
                self.end - start,
            )
            return
        if self.movers is None:
            # While one of them is lazy, the write would copy all rows.
            mx.eval(self.stage(batch_indices))
        for to, keys, values in self.movers:
            self.keys[to : to + len(keys)] = keys
            self.values[to : to + len(values)] = values
        self.rows, self.movers = rows, None

    def extract(self, idx: int) -> KVCache:
        start, end = self.rows.padding[idx], self.end
        keys, values = (
            x[idx : idx + 1, :, start:end] for x in (self.keys, self.values)
        )
        return KVCache.from_state((keys, values, end - start))
