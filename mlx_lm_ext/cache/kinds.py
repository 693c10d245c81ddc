"""How each of upstream's cache types is cut into segments, joined again and frozen.

Rules:
1. A segment is the KV of a run of tokens in one layer, in arrays of its own: an MLX
   slice would keep all of its parent in memory.
2. What cannot be cut, or has dropped tokens, is frozen: its state after n tokens.
3. The arrays are lazy. Who keeps them evaluates them.
"""

from dataclasses import dataclass
from typing import Any, Iterable, Iterator, List, Optional, Tuple

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from . import growth
from .row_starts import Rows
from .segmented import (
    Arrays,
    BatchSegmentedKVCache,
    SegmentedKVCache,
    join,
    n_tokens_of,
    slices,
)
from .sliding import BatchSlidingKVCache, SlidingKVCache, in_order


def copy(arrays: Arrays, start: int = 0, stop: Optional[int] = None) -> Arrays:
    """Copies of the arrays, or of their tokens from ``start`` to ``stop``."""
    if stop is not None:
        arrays = slices(arrays, start, stop)

    def copied(x):
        # What is contiguous already, as a row's state or a slice of one head,
        # mx.contiguous would leave in the buffer of a parent that is only a little larger.
        if stop is None or x.shape[1] == 1:
            return mx.concatenate([x, x[:0]])
        return mx.contiguous(x)

    return [None if x is None else copied(x) for x in arrays]


def nbytes(arrays: Arrays) -> int:
    return sum(x.nbytes for x in arrays if x is not None)


def nbytes_of_layers(layers: Iterable[Optional[Arrays]]) -> int:
    return sum(nbytes(arrays) for arrays in layers if arrays is not None)


@dataclass(frozen=True)
class Kind:
    """A cache type, with the settings that two caches must share to share segments."""

    def n_tokens(self, cache: Any) -> Optional[int]:
        """How many tokens a cache has seen, or ``None`` if it does not know."""
        return cache.offset

    def arrays(self, cache: Any) -> Arrays:
        """What it holds, in order, with nothing that is not in use."""
        raise NotImplementedError

    def n_kept(self, n: int) -> Optional[int]:
        """How many of ``n`` tokens it holds, if it can be cut and joined."""
        return n

    def n_in_batch(self, n: int) -> Optional[int]:
        """How many tokens a row of a batch has room for, if the batch has room for ``n``
        tokens that are all kept; ``None`` if that does not depend on ``n``."""
        return self.n_kept(n)

    def can_cut(self, n: int) -> bool:
        """Whether a cache of ``n`` tokens can be cut: it has dropped none of them."""
        return self.n_kept(n) == n

    def holds(self, arrays: Arrays, n: int) -> bool:
        """Whether ``arrays`` can be what a cache of ``n`` tokens holds."""
        kept = self.n_kept(n)
        return kept is None or all(x.shape[-2] == kept for x in arrays)

    def build(self, arrays: Arrays, n: int) -> Any:
        """A cache of ``n`` tokens that takes over ``arrays``."""
        raise NotImplementedError

    def thaw(self, frozen: Arrays, n: int) -> Any:
        """A cache of ``n`` tokens from copies of what ``arrays`` gave."""
        return self.build([None if x is None else x[:] for x in frozen], n)

    def join(self, parts: List[Arrays], n: int) -> Any:
        """A cache of the first ``n`` tokens of consecutive segments."""
        return self.build(join(parts, n), n)


class KV(Kind):
    def arrays(self, cache):
        keys, values, offset = cache.state
        return slices([keys, values], 0, offset)

    def join(self, parts, n):
        return SegmentedKVCache(parts, n)


@dataclass(frozen=True)
class Quantized(Kind):
    group_size: int
    bits: int

    def arrays(self, cache):
        keys, values, offset, _group_size, _bits = cache.state
        return slices([*keys, *values], 0, offset)

    def build(self, arrays, n):
        # Keys and values are tuples: quantised weights, scales and biases.
        k, k_scales, k_biases, v, v_scales, v_biases = arrays
        keys, values = (k, k_scales, k_biases), (v, v_scales, v_biases)
        state = (keys, values, n, self.group_size, self.bits)
        return QuantizedKVCache.from_state(state)


@dataclass(frozen=True)
class Chunked(Kind):
    chunk_size: int

    def arrays(self, cache):
        keys, values, offset, chunk_size, start_position = cache.state
        length = offset - start_position
        # What is over the size is dropped before the next token.
        excess = max(0, length - chunk_size)
        return slices([keys, values], excess, length)

    def n_kept(self, n):
        return min(n, self.chunk_size)

    def build(self, arrays, n):
        start = n - n_tokens_of(arrays)
        return ChunkedKVCache.from_state((*arrays, n, self.chunk_size, start))


@dataclass(frozen=True)
class Rotating(Kind):
    max_size: int
    keep: int

    def arrays(self, cache):
        return in_order(cache)

    def n_kept(self, n):
        return min(n, self.max_size)

    def n_in_batch(self, n):
        return min(n, growth.capacity(growth.window_capacity(self.max_size)))

    def build(self, arrays, n):
        state = (*arrays, n, self.keep, self.max_size, n_tokens_of(arrays))
        return (RotatingKVCache if self.keep else SlidingKVCache).from_state(state)


@dataclass(frozen=True)
class State(Kind):
    """Of a recurrent layer: it is no run of tokens, and does not know how many it saw."""

    size: int

    def n_tokens(self, cache):
        return None

    def arrays(self, cache):
        arrays, _left_padding, _lengths = cache.state
        return list(arrays)

    def n_kept(self, n):
        return None

    def build(self, arrays, n):
        return ArraysCache.from_state((arrays, None, None))


class Layout:
    """The kinds of a model's caches. Two that are equal share segments.

    Args:
        caches (List[Any]): One for each layer.

    Raises:
        TypeError: If one has a type that is not known here.
    """

    def __init__(self, caches: List[Any]):
        self.key = tuple(kind_of(cache) for cache in caches)
        self.kinds: List[Kind] = list(flatten(self.key))

    def read(self, caches: List[Any], n: int) -> Tuple[int, List[Arrays]]:
        """What the caches of a sequence of ``n`` tokens hold, for each layer.

        Returns:
            Tuple: Of how many tokens, and the arrays: of none if the layers disagree.
        """
        layers = list(leaves(caches))
        seen = [kind.n_tokens(c) for kind, c in zip(self.kinds, layers)]
        most = max([n, *(x for x in seen if x is not None)])
        seen = [most if x is None else x for x in seen]
        n = min(n, *seen)
        if n < 1 or not all(x == n or k.can_cut(x) for k, x in zip(self.kinds, seen)):
            return 0, []
        arrays = []
        for kind, cache, x in zip(self.kinds, layers, seen):
            a = kind.arrays(cache)
            if not kind.holds(a, x):
                return 0, []
            arrays.append(a if x == n else slices(a, 0, n))
        return n, arrays

    def nest(self, leaves: Iterable[Any]) -> List[Any]:
        """The opposite of ``leaves``: the model's caches from those of its layers."""
        rest = iter(leaves)

        def nested(key):
            if isinstance(key, tuple):
                return CacheList(*(nested(k) for k in key))
            return next(rest)

        return [nested(key) for key in self.key]


def kind_of(cache: Any) -> Any:
    """The kind of a cache; of a ``CacheList``, a tuple of them."""
    if type(cache) in (KVCache, SegmentedKVCache):
        return KV()
    if type(cache) in (RotatingKVCache, SlidingKVCache):
        return Rotating(cache.max_size, cache.keep)
    if type(cache) is ArraysCache:
        return State(len(cache.cache))
    if type(cache) is CacheList:
        return tuple(kind_of(c) for c in cache.caches)
    if type(cache) is QuantizedKVCache:
        return Quantized(cache.group_size, cache.bits)
    if type(cache) is ChunkedKVCache:
        return Chunked(cache.chunk_size)
    raise TypeError(f"{type(cache).__module__}.{type(cache).__name__}")


def flatten(nested: Iterable[Any]) -> Iterator[Any]:
    for item in nested:
        if isinstance(item, tuple):
            yield from flatten(item)
        else:
            yield item


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches, with those of each ``CacheList`` in its place."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


def make_segmented_cache(model: Any) -> List[Any]:
    """Empty caches of a model, which merge with those that the prompt cache gives."""

    def segmented(cache):
        if isinstance(cache, CacheList):
            return CacheList(*(segmented(c) for c in cache.caches))
        if type(cache) is RotatingKVCache and not cache.keep:
            return SlidingKVCache(cache.max_size)
        return SegmentedKVCache() if type(cache) is KVCache else cache

    return [segmented(cache) for cache in make_prompt_cache(model)]


def tidy(caches: List[Any]) -> None:
    """Drop the tokens that have left the windows, now and then; and let the layers in
    which rows begin at the same places share what says so."""
    known: List[Rows] = []
    for c in leaves(caches):
        if isinstance(c, BatchSlidingKVCache):
            c.drop_old(growth.window_slack(c.max_size))
        if isinstance(c, BatchSegmentedKVCache):
            same = [rows for rows in known if rows is c.rows or rows == c.rows]
            if same:
                c.rows = same[0]
            else:
                known.append(c.rows)
