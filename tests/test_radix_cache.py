"""The radix prompt cache, compared with a dictionary of whole sequences."""

import re
import sys

import integrity
import mlx.core as mx
import pytest
from fake_caches import MODELS, contents, feed, make, make_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_lm_ext.bench import cache_lookup
from mlx_lm_ext.policies.eviction import POLICIES


def common(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


class Dictionary:
    """Keeps each inserted sequence whole, for a model whose KV can be cut or not."""

    def __init__(self, is_cut):
        self.is_cut = is_cut
        self.sequences = []

    def insert(self, model, tokens):
        self.sequences.append((model, tokens))

    def longest(self, model, tokens):
        """How many tokens of a prompt are known, without its last one."""
        best = 0
        for owner, known in self.sequences:
            n = min(common(known, tokens), len(tokens) - 1)
            if owner == model and (self.is_cut or n == len(known)):
                best = max(best, n)
        return best


# Prompts that share prefixes: the first tokens of one of these, and up to two others.
BASES = [[0] * 14, [0, 0, 0, 1] * 4]
TOKENS = st.builds(
    lambda base, n, end: (base[:n] + end) or [0],
    st.sampled_from(BASES),
    st.integers(0, 14),
    st.lists(st.integers(0, 2), max_size=2),
)
INSERT = st.tuples(
    st.just("insert"),
    st.sampled_from("xy"),
    TOKENS,
    st.integers(0, 14),
    st.sampled_from(["system", "user", "assistant"]),
)
FETCH = st.tuples(st.just("fetch"), st.sampled_from("xy"), TOKENS)
TRIM = st.tuples(
    st.just("trim"), st.sampled_from(["n_sequences", "n_bytes"]), st.integers(0, 6)
)
RESERVE = st.tuples(st.just("reserve"), st.integers(0, 3000))
EXPIRE = st.tuples(st.just("expire"))


def insert(cache, known, name, model, tokens, n_prompt, cache_type):
    """Insert a sequence into the cache and into the dictionary."""
    caches = make(name, tokens, min(n_prompt, len(tokens)))
    cache.insert_cache(model, tokens, caches, cache_type=cache_type)
    known.insert(model, tokens)


def check_fetch(cache, name, model, tokens):
    """Check that a hit holds the KV of exactly its tokens, and goes on as from cold."""
    caches, rest = cache.fetch_nearest_cache(model, tokens)
    n = len(tokens) - len(rest)
    assert rest and tokens[n:] == rest
    assert (caches is None) == (n == 0)
    if caches is not None:
        cold = make(name, tokens[:n])
        assert contents(caches, n) == contents(cold, n)
        for i in range(n, len(tokens)):
            feed(caches, tokens, i, i + 1)
            feed(cold, tokens, i, i + 1)
        assert contents(caches, len(tokens)) == contents(cold, len(tokens))
    return n


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=100)
@given(steps=st.lists(INSERT | FETCH, max_size=20))
def test_it_finds_what_a_dictionary_finds(name, steps):
    cache = make_cache()
    known = Dictionary(is_cut=name in ("KVCache", "QuantizedKVCache", "CacheList"))
    for step in steps:
        if step[0] == "insert":
            insert(cache, known, name, *step[1:])
        else:
            n = check_fetch(cache, name, *step[1:])
            ideal = known.longest(*step[1:])
            # A window that has not wrapped can be cut too.
            assert n == ideal if known.is_cut else n >= ideal
        integrity.check(cache)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(INSERT | FETCH | TRIM | RESERVE | EXPIRE, max_size=25),
    max_bytes=st.integers(0, 12_000),
)
def test_evictions_leave_it_whole_and_within_its_bound(name, policy, steps, max_bytes):
    cache = make_cache(policy, max_bytes)
    known = Dictionary(is_cut=True)
    for step in steps:
        if step[0] == "insert":
            insert(cache, known, name, *step[1:])
        elif step[0] == "fetch":
            n = check_fetch(cache, name, *step[1:])
            assert n <= known.longest(*step[1:])
        elif step[0] == "trim":
            limit = step[2] * (1000 if step[1] == "n_bytes" else 1)
            cache.trim_to(**{step[1]: limit})
            held = cache.nbytes if step[1] == "n_bytes" else len(cache)
            assert held <= limit
        elif step[0] == "reserve":
            cache.reserve(step[1])
        else:
            cache.expire()
        integrity.check(cache)
        by_type = cache.stats_by_type().values()
        assert sum(t["n_bytes"] for t in by_type) == cache.nbytes
        assert sum(t["n_sequences"] for t in by_type) == len(cache)


def test_copy_that_fails_leaves_nothing_behind(monkeypatch, caplog):
    cache = make_cache()
    cache.insert_cache("m", [1, 2, 3], make("KVCache", [1, 2, 3]))

    def out_of_memory(*arrays):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", out_of_memory)
        cache.insert_cache("m", [4, 5], make("KVCache", [4, 5]))
    (record,) = caplog.records
    assert record.getMessage() == "KV cannot be copied: the prompt cache is emptied"
    assert len(cache) == cache.nbytes == 0
    integrity.check(cache)
    cache.insert_cache("m", [4, 5], make("KVCache", [4, 5]))
    assert len(cache) == 1


@pytest.mark.parametrize("tokens", [[1, 2, 5], [1, 2]])
def test_split_that_runs_out_of_memory_empties_the_cache(tokens, monkeypatch, caplog):
    def out_of_memory(*arrays):
        raise RuntimeError("out of memory")

    cache = make_cache()
    cache.insert_cache("m", [1, 2, 3, 4], make("KVCache", [1, 2, 3, 4]))
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", out_of_memory)
        cache.insert("m", tokens, make("KVCache", tokens), "system")
        integrity.check(cache, is_evaluated=False)
        cache.evaluate()
    (record,) = caplog.records
    assert record.getMessage() == "KV cannot be copied: the prompt cache is emptied"
    assert len(cache) == cache.nbytes == 0
    integrity.check(cache)
    cache.insert_cache("m", tokens, make("KVCache", tokens))
    assert len(cache) == 1


def test_what_leaves_at_once_is_not_copied(monkeypatch):
    one = make_cache()
    one.insert_cache("m", [0] * 4, make("KVCache", [0] * 4))
    cache, copied = make_cache(max_bytes=one.nbytes), []
    for i in range(3):
        cache.insert("m", [i] * 4, make("KVCache", [i] * 4), "assistant")
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", copied.extend)
        cache.evaluate()
    assert len(copied) == len(cache) == 1


def test_lookups_are_measured_beside_upstreams(monkeypatch, capsys):
    argv = ["--tokens", "400", "--conversations", "5", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["cache_lookup", *argv])
    cache_lookup.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("LRUPromptCache") for line in lines) == 2
    assert sum(line.startswith("RadixPromptCache") for line in lines) == 2
    assert len(re.findall(r": \d+\.\d\d$", "\n".join(lines), re.M)) == 16
