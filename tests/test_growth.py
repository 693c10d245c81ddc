"""The memory that is predicted for a batch, beside what the arrays of a batch take."""

import random
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_lm_ext.batch.kv_memory import KVMemory
from mlx_lm_ext.cache import growth
from mlx_lm_ext.cache.kinds import make_segmented_cache, prepare_step
from mlx_lm_ext.cache.segmented import SegmentedKVCache

MODELS = {
    "KVCache": lambda: [KVCache()],
    "small window": lambda: [RotatingKVCache(250)],
    "large window": lambda: [RotatingKVCache(600)],
}


class Model:
    """Writes KV of one head of one float."""

    def __init__(self, name):
        self.make_cache = MODELS[name]

    def __call__(self, inputs, cache):
        x = mx.zeros((inputs.shape[0], 1, inputs.shape[1], 1))
        for c in cache:
            c.update_and_fetch(x, x)


class Batch:
    """Requests whose KV is in one batch, as in a server."""

    def __init__(self, name):
        self.model = Model(name)
        self.memory = KVMemory(self.model, limit=0)
        self.cache, self.requests = [], []
        self.predicted = 0

    @property
    def nbytes(self):
        return sum(c.nbytes for c in self.cache)

    def run(self, cache, n_rows, n_tokens):
        prepare_step(cache)
        self.model(mx.zeros((n_rows, n_tokens)), cache)

    def join(self, request, n_cached, chunk):
        """Run a prompt in chunks, after tokens from the prompt cache, and add its row."""
        shape = (len(self.cache[0].keys), self.cache[0].end) if self.cache else ()
        requests = [*self.requests, request]
        self.predicted = self.memory.needed(requests, *shape)
        cache = make_segmented_cache(self.model)
        if n_cached and type(cache[0]) is SegmentedKVCache:
            x = mx.zeros((1, 1, n_cached, 1))
            cache = [SegmentedKVCache([[x, x]], n_cached)]
            cache[0].n_to_come = request.n_prompt - n_cached
        else:
            n_cached = 0
        cache = [c.merge([c]) for c in cache]
        while n_cached < request.n_prompt:
            n = min(chunk, request.n_prompt - n_cached)
            self.run(cache, 1, n)
            n_cached += n
        if self.cache:
            self.cache[0].extend(cache[0])
        else:
            self.cache = cache
        # A window holds the last chunk of the prompt until the next step drops it.
        prepare_step(self.cache)
        self.requests = requests

    def decode(self):
        self.run(self.cache, len(self.requests), 1)
        for request in self.requests:
            request.n_generated += 1

    def leave(self, rows):
        """Take rows out; the last ones take their places."""
        n = len(self.requests) - len(rows)
        last = iter([i for i in range(n, len(self.requests)) if i not in rows])
        keep = [next(last) if i in rows else i for i in range(n)]
        self.requests = [self.requests[i] for i in keep]
        if keep:
            self.cache[0].filter(keep)
        else:
            self.cache = []


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), longest=st.sampled_from([20, 300, 900, 2500]))
def test_batch_takes_no_more_than_was_predicted(name, seed, longest):
    rng = random.Random(seed)
    batch = Batch(name)
    for _ in range(25):
        request = SimpleNamespace(
            n_prompt=rng.randint(1, longest),
            n_generated=0,
            max_tokens=rng.randint(1, 60),
        )
        n_cached = rng.choice([0, rng.randint(0, request.n_prompt - 1)])
        batch.join(request, n_cached, rng.choice([100, 256, 400]))
        assert batch.nbytes <= batch.predicted
        for _ in range(rng.choice([0, 0, 3, 30])):
            if batch.requests:
                batch.decode()
            assert batch.nbytes <= batch.predicted
            ended = {
                i
                for i, r in enumerate(batch.requests)
                if r.n_generated == r.max_tokens or rng.random() < 0.03
            }
            if ended:
                batch.leave(ended)
                assert batch.nbytes <= batch.predicted


def test_arrays_that_grow_for_a_row_get_a_quarter_of_spare_rows():
    batch = Batch("KVCache")
    for _ in range(4):
        request = SimpleNamespace(n_prompt=300, n_generated=0, max_tokens=10)
        batch.join(request, 0, 256)
    # Keys and values of one float.
    token = 2 * 4
    # Three rows that grew for a fourth got no spare row, and four that grew got one.
    assert batch.nbytes == 4 * 512 * token
    batch.join(request, 0, 256)
    assert batch.nbytes == 6 * 512 * token


@pytest.mark.parametrize(
    "n_prompt, n_columns", [(1400, 1536), (1408, 1536), (1409, 1792), (700, 768)]
)
def test_long_arrays_that_grow_for_a_row_get_room_for_some_tokens(n_prompt, n_columns):
    batch = Batch("KVCache")
    for _ in range(2):
        request = SimpleNamespace(n_prompt=n_prompt, n_generated=0, max_tokens=10)
        batch.join(request, 0, 256)
    assert batch.cache[0].keys.shape[2] == n_columns


def test_arrays_have_room_for_whole_steps():
    assert [growth.capacity(n) for n in (1, 256, 257)] == [256, 256, 512]
    # One token more than is known to come.
    assert growth.merged_capacity(200, 55) == 256
    assert growth.merged_capacity(200, 56) == 512


@pytest.mark.parametrize("n_tokens", [1, 10, 95, 96, 97, 400, 1001])
def test_widest_arrays_are_those_whose_padding_is_just_not_excess(n_tokens):
    padding = 0
    while not growth.is_excess(padding + 1, n_tokens + padding + 1):
        padding += 1
    assert n_tokens + padding <= growth.max_width(n_tokens) <= n_tokens + padding + 2
