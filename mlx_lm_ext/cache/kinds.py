"""How the KV of each of mlx-lm's cache types is cut into segments that prompts can share, or
copied as a snapshot, and how a cache is made of these again.

Rules:
1. A segment is the KV of a run of tokens in one layer. Its arrays own their memory: an MLX
   slice would keep the whole array that it was cut from.
2. A snapshot is the state of a layer after n tokens. Layers have snapshots if their state
   cannot be cut at a token, or if tokens were dropped from it.
3. The arrays made here are lazy. Who keeps them evaluates them.
"""

from copy import deepcopy
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
from .row_starts import RowStarts
from .segmented import (
    Arrays,
    BatchSegmentedKVCache,
    SegmentedKVCache,
    concatenate,
    n_tokens_of,
    slices,
)
from .sliding import BatchSlidingKVCache, SlidingKVCache, in_order


def copy_arrays(arrays: Arrays, start: int = 0, stop: Optional[int] = None) -> Arrays:
    """Lazy copies of the arrays that own their memory.

    Args:
        arrays (Arrays): The arrays of a layer.
        start (int): With ``stop``, the first token that is copied.
        stop (Optional[int]): The token after the last; ``None`` copies whole arrays, also
          those that have no tokens.
    """
    if stop is not None:
        arrays = slices(arrays, start, stop)

    def copied(x):
        # A snapshot, or a slice of one head, is contiguous already. mx.contiguous would
        # then share the buffer of an array that is only a little larger.
        if stop is None or x.shape[1] == 1:
            return mx.concatenate([x, x[:0]])
        return mx.contiguous(x)

    return [None if x is None else copied(x) for x in arrays]


def nbytes(arrays: Arrays) -> int:
    return sum(x.nbytes for x in arrays if x is not None)


def nbytes_of_layers(layers: Iterable[Optional[Arrays]]) -> int:
    return sum(nbytes(arrays) for arrays in layers if arrays is not None)


@dataclass(frozen=True)
class CacheKind:
    """A cache type, and the settings in which two caches that share KV must agree."""

    def n_seen(self, cache: Any) -> Optional[int]:
        """How many tokens a cache has seen; ``None`` if it does not count them."""
        return cache.offset

    def arrays(self, cache: Any) -> Arrays:
        """What a cache holds, with the tokens in order and without unused memory."""
        raise NotImplementedError

    def n_kept(self, n: int) -> Optional[int]:
        """How many tokens a cache holds once it has seen ``n``; ``None`` if it does not
        hold tokens."""
        return n

    def batch_capacity(self, n: int) -> Optional[int]:
        """For how many tokens a row has room in a batch that has room for ``n`` in layers
        that keep all of them; ``None`` if this does not depend on ``n``."""
        return self.n_kept(n)

    def can_cut(self, n: int) -> bool:
        """Whether a cache that has seen ``n`` tokens can be cut at each of them: whether
        it still has them all."""
        return self.n_kept(n) == n

    def is_complete(self, arrays: Arrays, n: int) -> bool:
        """Whether ``arrays`` have as much as a cache holds once it has seen ``n`` tokens."""
        kept = self.n_kept(n)
        return kept is None or all(x.shape[-2] == kept for x in arrays)

    def from_arrays(self, arrays: Arrays, n: int) -> Any:
        """A cache that has seen ``n`` tokens and takes over ``arrays``."""
        raise NotImplementedError

    def from_snapshot(self, snapshot: Arrays, n: int) -> Any:
        """A cache that has seen ``n`` tokens. It leaves the snapshot as it is."""
        return self.from_arrays([None if x is None else x[:] for x in snapshot], n)

    def from_segments(self, segments: List[Arrays], n: int) -> Any:
        """A cache of the first ``n`` tokens of consecutive segments."""
        return self.from_arrays(concatenate(segments, n), n)


class KVKind(CacheKind):
    def arrays(self, cache):
        keys, values, offset = cache.state
        return slices([keys, values], 0, offset)

    def from_segments(self, segments, n):
        return SegmentedKVCache(segments, n)


@dataclass(frozen=True)
class QuantizedKind(CacheKind):
    group_size: int
    bits: int

    def arrays(self, cache):
        keys, values, offset, _group_size, _bits = cache.state
        return slices([*keys, *values], 0, offset)

    def from_arrays(self, arrays, n):
        # Keys and values are tuples: quantized weights, scales and biases.
        k, k_scales, k_biases, v, v_scales, v_biases = arrays
        keys, values = (k, k_scales, k_biases), (v, v_scales, v_biases)
        state = (keys, values, n, self.group_size, self.bits)
        return QuantizedKVCache.from_state(state)


@dataclass(frozen=True)
class ChunkedKind(CacheKind):
    chunk_size: int

    def arrays(self, cache):
        keys, values, offset, chunk_size, start_position = cache.state
        length = offset - start_position
        # The model drops these before its next token.
        excess = max(0, length - chunk_size)
        return slices([keys, values], excess, length)

    def n_kept(self, n):
        return min(n, self.chunk_size)

    def from_arrays(self, arrays, n):
        start = n - n_tokens_of(arrays)
        return ChunkedKVCache.from_state((*arrays, n, self.chunk_size, start))


@dataclass(frozen=True)
class RotatingKind(CacheKind):
    max_size: int
    keep: int

    def arrays(self, cache):
        return in_order(cache)

    def n_kept(self, n):
        return min(n, self.max_size)

    def batch_capacity(self, n):
        return min(n, growth.capacity(growth.window_capacity(self.max_size)))

    def from_arrays(self, arrays, n):
        state = (*arrays, n, self.keep, self.max_size, n_tokens_of(arrays))
        return (RotatingKVCache if self.keep else SlidingKVCache).from_state(state)


@dataclass(frozen=True)
class RecurrentKind(CacheKind):
    """The state of a recurrent layer. It holds no tokens and does not count them."""

    size: int

    def n_seen(self, cache):
        return None

    def arrays(self, cache):
        arrays, _left_padding, _lengths = cache.state
        return list(arrays)

    def n_kept(self, n):
        return None

    def from_arrays(self, arrays, n):
        return ArraysCache.from_state((arrays, None, None))


def kind_of(cache: Any) -> Any:
    """The kind of a cache; for a ``CacheList``, the tuple of its caches' kinds.

    Raises:
        TypeError: If the type of the cache is unknown. The message is its name.
    """
    if type(cache) in (KVCache, SegmentedKVCache):
        return KVKind()
    if type(cache) in (RotatingKVCache, SlidingKVCache):
        return RotatingKind(cache.max_size, cache.keep)
    if type(cache) is ArraysCache:
        return RecurrentKind(len(cache.cache))
    if type(cache) is CacheList:
        return tuple(kind_of(c) for c in cache.caches)
    if type(cache) is QuantizedKVCache:
        return QuantizedKind(cache.group_size, cache.bits)
    if type(cache) is ChunkedKVCache:
        return ChunkedKind(cache.chunk_size)
    raise TypeError(f"{type(cache).__module__}.{type(cache).__name__}")


def flatten(nested: Iterable[Any]) -> Iterator[Any]:
    """The caches of a model, or their kinds, with nested ones in the place of each
    ``CacheList`` or tuple. Each of them is called a layer in this folder."""
    for item in nested:
        if isinstance(item, CacheList):
            yield from flatten(item.caches)
        elif isinstance(item, tuple):
            yield from flatten(item)
        else:
            yield item


class Layout:
    """The kinds of all caches of a model. Models with equal layouts can share KV.

    Args:
        caches (List[Any]): The caches of a model.

    Raises:
        TypeError: If the type of a cache is unknown. The message is its name.
    """

    def __init__(self, caches: List[Any]):
        self.key = tuple(kind_of(cache) for cache in caches)
        self.kinds: List[CacheKind] = list(flatten(self.key))

    def read(self, caches: List[Any], n: int) -> Tuple[int, List[Arrays]]:
        """What the caches of a sequence of ``n`` tokens hold.

        Returns:
            Tuple: For how many tokens they hold it, at most ``n``, and the arrays of each
            layer. ``(0, [])`` if the layers do not hold the same tokens.
        """
        layers = list(flatten(caches))
        seen = [kind.n_seen(c) for kind, c in zip(self.kinds, layers)]
        most = max([n, *(x for x in seen if x is not None)])
        seen = [most if x is None else x for x in seen]
        n = min(n, *seen)
        if n < 1 or not all(x == n or k.can_cut(x) for k, x in zip(self.kinds, seen)):
            return 0, []
        arrays = []
        for kind, cache, x in zip(self.kinds, layers, seen):
            a = kind.arrays(cache)
            if not kind.is_complete(a, x):
                return 0, []
            arrays.append(a if x == n else slices(a, 0, n))
        return n, arrays

    def unflatten(self, layers: Iterable[Any]) -> List[Any]:
        """The caches of a model from those of its layers: the opposite of ``flatten``."""
        rest = iter(layers)

        def nested(key):
            if isinstance(key, tuple):
                return CacheList(*(nested(k) for k in key))
            return next(rest)

        return [nested(key) for key in self.key]


def make_segmented_cache(model: Any) -> List[Any]:
    """Empty caches of a model that merge with those from the prompt cache."""

    def segmented(cache):
        if isinstance(cache, CacheList):
            return CacheList(*(segmented(c) for c in cache.caches))
        if type(cache) is RotatingKVCache and not cache.keep:
            return SlidingKVCache(cache.max_size)
        return SegmentedKVCache() if type(cache) is KVCache else cache

    return [segmented(cache) for cache in make_prompt_cache(model)]


def without_segments(caches: List[Any]) -> List[Any]:
    """Caches of a model in the types of ``make_prompt_cache``. mlx-lm's batches need these: they
    do not settle the rows of a ``BatchSegmentedKVCache``, see ``prepare_step``."""

    def plain(cache):
        if isinstance(cache, CacheList):
            return CacheList(*map(plain, cache.caches))
        if isinstance(cache, SegmentedKVCache):
            return KVCache.from_state(cache.state)
        if isinstance(cache, SlidingKVCache):
            return RotatingKVCache.from_state(cache.state)
        return cache

    return [plain(cache) for cache in caches]


def take_rows(cache: Any, batch_indices: List[int]) -> Any:
    """A copy of these rows of the cache of a batch, in this order. It is lazy."""
    if isinstance(cache, CacheList):
        return CacheList(*(take_rows(c, batch_indices) for c in cache.caches))
    if isinstance(cache, BatchSegmentedKVCache):
        return cache.take(batch_indices)
    taken = deepcopy(cache)
    taken.filter(batch_indices)
    return taken


def prepare_step(caches: List[Any]) -> None:
    """Prepare the caches of a batch for the next step of the model.

    Windows drop old tokens if they have many. Layers whose rows start alike share one
    ``RowStarts``.
    """
    distinct: List[RowStarts] = []
    for c in flatten(caches):
        if isinstance(c, BatchSegmentedKVCache):
            c.settle()
        if isinstance(c, BatchSlidingKVCache):
            c.drop_old(growth.window_slack(c.max_size))
        if isinstance(c, BatchSegmentedKVCache):
            same = [r for r in distinct if r is c.row_starts or r == c.row_starts]
            if same:
                c.row_starts = same[0]
            else:
                distinct.append(c.row_starts)
