"""What the prompt cache and the batch caches rely on in mlx-lm's caches.

If one of these tests fails after an update of mlx-lm, ``mlx_lm_ext/cache`` has to follow:
it unpacks the states of the caches by name and overrides or calls the methods below.
"""

import inspect

import mlx.core as mx
import pytest
from mlx_lm.models import base, cache
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    LRUPromptCache,
    QuantizedKVCache,
    RotatingKVCache,
)

# For each cache type, the attributes that ``state`` gives, in this order.
STATES = {
    "KVCache": (KVCache, "keys values offset"),
    "RotatingKVCache": (
        lambda: RotatingKVCache(8, keep=2),
        "keys values offset keep max_size _idx",
    ),
    "QuantizedKVCache": (
        lambda: QuantizedKVCache(group_size=32, bits=4),
        "keys values offset group_size bits",
    ),
    "ChunkedKVCache": (
        lambda: ChunkedKVCache(8),
        "keys values offset chunk_size start_position",
    ),
}


def filled(make):
    """A cache with the KV of three tokens."""
    x = mx.random.normal((1, 2, 3, 32))
    made = make()
    made.update_and_fetch(x, x)
    return made


@pytest.mark.parametrize("name", STATES)
def test_state_of_a_cache_has_the_known_layout(name):
    make, names = STATES[name]
    made, names = filled(make), names.split()
    what = f"the state of mlx-lm's {name} is no longer ({', '.join(names)})"
    assert len(made.state) == len(names), what
    for attribute, value in zip(names, made.state):
        assert getattr(made, attribute) is value, f"{what}: see {attribute}"
    again = type(made).from_state(made.state)
    for attribute in names:
        assert getattr(again, attribute) is getattr(made, attribute), what


@pytest.mark.parametrize("name", ["KVCache", "RotatingKVCache", "ChunkedKVCache"])
def test_keys_and_values_have_the_tokens_on_the_last_axis_but_one(name):
    made = filled(STATES[name][0])
    for x in (made.keys, made.values):
        n_rows, n_heads, n_tokens, head_dim = x.shape
        assert (n_rows, n_heads, head_dim) == (1, 2, 32) and n_tokens >= 3


def test_quantized_keys_and_values_are_weights_scales_and_biases():
    made = filled(STATES["QuantizedKVCache"][0])
    for quantized in (made.keys, made.values):
        weights, scales, biases = quantized
        # Eight values of 4 bits in each integer, and one group of 32.
        assert (weights.shape[-1], scales.shape[-1], biases.shape[-1]) == (4, 1, 1)


def test_state_of_a_recurrent_layer_has_the_known_layout():
    made = ArraysCache(2)
    made[0], made[1] = mx.zeros((1, 3)), mx.zeros((1, 4))
    arrays, left_padding, lengths = made.state
    assert arrays is made.cache and list(arrays) == [made[0], made[1]]
    assert left_padding is None and lengths is None
    again = ArraysCache.from_state((arrays, None, None))
    assert again.cache is arrays


def test_cache_list_has_its_caches_in_one_attribute():
    first, second = KVCache(), ArraysCache(1)
    assert list(CacheList(first, second).caches) == [first, second]


# Functions and methods that are called or overridden, with their parameters.
SIGNATURES = [
    (base.create_causal_mask, "N offset window_size right_padding left_padding"),
    (cache.create_attention_mask, "N offset return_array window_size"),
    (cache.dynamic_roll, "x shifts axis"),
    (cache.make_prompt_cache, "model max_kv_size"),
    (RotatingKVCache.__init__, "self max_size keep"),
    (KVCache.update_and_fetch, "self keys values"),
    (KVCache.trim, "self n"),
    (KVCache.size, "self"),
    (KVCache.empty, "self"),
    (KVCache.merge, "caches"),
    (RotatingKVCache.merge, "caches"),
    (BatchKVCache.__init__, "self left_padding"),
    (BatchKVCache.update_and_fetch, "self keys values"),
    (BatchKVCache.keys_and_values, "self"),
    (BatchKVCache.prepare, "self left_padding lengths right_padding"),
    (BatchKVCache.finalize, "self"),
    (BatchKVCache.make_mask, "self N return_array kwargs"),
    (BatchKVCache.trim, "self n"),
    (BatchKVCache.size, "self"),
    (BatchKVCache.empty, "self"),
    (BatchKVCache.filter, "self batch_indices"),
    (BatchKVCache.extend, "self other"),
    (BatchKVCache.extract, "self idx"),
    (BatchKVCache.merge, "caches"),
    (LRUPromptCache.__init__, "self max_size max_bytes"),
    (LRUPromptCache.__len__, "self"),
    (LRUPromptCache.fetch_nearest_cache, "self model tokens"),
    (LRUPromptCache.insert_cache, "self model tokens prompt_cache cache_type"),
    (LRUPromptCache.trim_to, "self n_sequences n_bytes"),
    (LRUPromptCache.stats_by_type, "self"),
]


@pytest.mark.parametrize(
    "function, names", SIGNATURES, ids=[f.__qualname__ for f, _ in SIGNATURES]
)
def test_upstream_function_takes_the_known_parameters(function, names):
    found = " ".join(inspect.signature(function).parameters)
    assert found == names, f"mlx-lm's {function.__qualname__} takes other parameters"


@pytest.mark.parametrize(
    "cls", [KVCache, BatchKVCache, QuantizedKVCache, RotatingKVCache, ChunkedKVCache]
)
def test_arrays_grow_by_the_known_number_of_tokens(cls):
    assert cls.step == 256


def test_upstream_asks_a_prompt_cache_for_its_bytes_by_a_property():
    assert isinstance(LRUPromptCache.nbytes, property)
