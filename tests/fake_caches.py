"""Upstream's caches, filled with KV that tells which tokens it was made from."""

import zlib
from argparse import Namespace

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlx_lm_ext.cache.kinds import Layout, flatten
from mlx_lm_ext.cache.lru import LRU
from mlx_lm_ext.cache.prompt_cache import RadixPromptCache

WINDOW = 6

# The caches that models of each kind make.
MODELS = {
    "KVCache": lambda: [KVCache(), KVCache()],
    "RotatingKVCache": lambda: [RotatingKVCache(WINDOW)],
    "RotatingKVCache that keeps 2": lambda: [RotatingKVCache(WINDOW, keep=2)],
    "ArraysCache": lambda: [ArraysCache(2)],
    "ChunkedKVCache": lambda: [ChunkedKVCache(WINDOW), KVCache()],
    "QuantizedKVCache": lambda: [QuantizedKVCache(group_size=32, bits=4)],
    "CacheList": lambda: [CacheList(KVCache(), CacheList(KVCache()))],
    "sliding window": lambda: [RotatingKVCache(WINDOW), KVCache()],
    "hybrid": lambda: [CacheList(ArraysCache(1), KVCache()), RotatingKVCache(WINDOW)],
}


def kv(tokens, start, stop):
    """KV of the tokens from ``start`` to ``stop``, each made from all before it."""
    sums = [zlib.crc32(bytes(tokens[: i + 1])) % 997 for i in range(start, stop)]
    rows = mx.array(sums, dtype=mx.float32)[:, None]
    return (rows + mx.arange(32))[None, None], (rows - mx.arange(32))[None, None]


def feed(caches, tokens, start, stop):
    """Run the tokens from ``start`` to ``stop`` through the caches, as a model does."""
    keys, values = kv(tokens, start, stop)
    for cache in flatten(caches):
        if isinstance(cache, ArraysCache):
            for i in range(len(cache.cache)):
                cache[i] = keys[:, 0, -1] + i
        else:
            if isinstance(cache, ChunkedKVCache):
                cache.maybe_trim_front()
            cache.update_and_fetch(keys, values)


def make(model, tokens, n_prompt=None):
    """The caches of a model that has run ``n_prompt`` tokens at once and the others one by
    one."""
    caches = MODELS[model]()
    n_prompt = len(tokens) if n_prompt is None else n_prompt
    if n_prompt:
        feed(caches, tokens, 0, n_prompt)
    for i in range(n_prompt, len(tokens)):
        feed(caches, tokens, i, i + 1)
    return caches


def contents(caches, n):
    """What the caches hold after ``n`` tokens, in order."""
    layout = Layout(caches)
    return [
        [x.tolist() for x in kind.arrays(cache)]
        for kind, cache in zip(layout.kinds, flatten(caches))
    ]


class Ticks:
    """A clock that goes on by one each time it is read."""

    now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def make_cache(policy=LRU, max_bytes=1 << 63, clock=None, **kwargs):
    clock = clock or Ticks()
    args = Namespace(radix_cache_size=max_bytes, cache_ttl=20.0)
    eviction = policy(args, clock)
    return RadixPromptCache(
        max_bytes=max_bytes, eviction=eviction, clock=clock, **kwargs
    )
