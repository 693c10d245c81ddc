"""How upstream's caches become segments and caches again, and batches of these."""

import random
import re
import sys

import integrity
import mlx.core as mx
import pytest
from fake_caches import MODELS, contents, feed, kv, make
from helpers import active_memory, peak_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ConcatenateKVCache,
    KVCache,
    trim_prompt_cache,
)

from mlx_lm_ext.bench import join_and_leave
from mlx_lm_ext.cache.kinds import (
    Layout,
    copy_arrays,
    flatten,
    make_segmented_cache,
    prepare_step,
)
from mlx_lm_ext.cache.prompt_cache import RadixPromptCache
from mlx_lm_ext.cache.segmented import (
    BatchSegmentedKVCache,
    SegmentedKVCache,
    row_moves,
)
from mlx_lm_ext.cache.sliding import BatchSlidingKVCache

TOKENS = list(range(10))


def cached(model, *ends, tokens=TOKENS):
    """A prompt cache into which the first tokens were inserted, up to each of ``ends``."""
    cache = RadixPromptCache()
    for end in ends:
        cache.insert_cache("m", tokens[:end], make(model, tokens[:end]))
    return cache


def merge(rows):
    """A batch of caches, as mlx-lm's batch generator makes it."""
    return [row[0].merge(list(row)) for row in zip(*rows)]


# Models that can be batched. Windows that keep their first tokens cannot.
BATCHABLE = [
    name
    for name, make_caches in MODELS.items()
    if all(
        hasattr(c, "merge") and not getattr(c, "keep", 0)
        for c in flatten(make_caches())
    )
]


@pytest.mark.parametrize("model", BATCHABLE)
@pytest.mark.parametrize("ends", [(9,), (3, 5, 9)])
def test_hits_merge_into_a_batch_and_come_out_again(model, ends):
    cache = cached(model, *ends)
    hit, rest = cache.fetch_segmented_cache("m", TOKENS)
    short, _ = cache.fetch_segmented_cache("m", TOKENS[:4])
    rows = [r for r in (short, hit) if r is not None]
    lengths = [3] * (short is not None) + [9]
    batch = merge(rows)
    for i, n in enumerate(lengths):
        row = [c.extract(i) for c in batch]
        assert contents(row, n) == contents(make(model, TOKENS[:n]), n)
    assert rest == TOKENS[9:]


def test_rows_of_misses_and_hits_merge():
    hit, _ = cached("KVCache", 3, 9).fetch_segmented_cache("m", TOKENS)
    model = type("Model", (), {"make_cache": lambda self: [KVCache(), KVCache()]})()
    batch = merge([make_segmented_cache(model), hit, make("KVCache", TOKENS[:5])])
    assert type(batch[0]) is BatchSegmentedKVCache
    for i, n in enumerate((0, 9, 5)):
        row = [c.extract(i) for c in batch]
        assert [c.offset for c in row] == [n, n]
        if n:
            assert contents(row, n) == contents(make("KVCache", TOKENS[:n]), n)


def test_rows_that_have_two_segments_in_turn_merge():
    cache = RadixPromptCache()
    prompts = [TOKENS, [t + 20 for t in TOKENS]]
    for tokens in prompts:
        cache.insert_cache("m", tokens, make("KVCache", tokens))
    order = [0, 1, 0, 1, 1]
    batch = merge(
        [cache.fetch_segmented_cache("m", prompts[i] + [0])[0] for i in order]
    )
    n = len(TOKENS)
    for row, i in enumerate(order):
        expected = contents(make("KVCache", prompts[i]), n)
        assert contents([c.extract(row) for c in batch], n) == expected


@pytest.mark.parametrize("model", MODELS)
def test_hit_for_mlx_lm_has_the_types_that_mlx_lm_makes(model):
    hit, _ = cached(model, 9).fetch_nearest_cache("m", TOKENS)
    made = make(model, TOKENS[:9])
    assert [type(c) for c in hit] == [type(c) for c in made]
    assert [type(c) for c in flatten(hit)] == [type(c) for c in flatten(made)]
    assert contents(hit, 9) == contents(made, 9)


def test_hit_costs_one_copy():
    tokens = list(range(250)) * 8
    cache = RadixPromptCache()
    for end in (700, 1400, 2000):
        cache.insert_cache("m", tokens[:end], make("KVCache", tokens[:end]))
    prompt = tokens + [1] * 100
    hit, _ = cache.fetch_segmented_cache("m", prompt)
    batch = []

    def use():
        batch.extend(merge([hit]))
        mx.eval([c.state for c in batch])
        feed(batch, prompt, 2000, 2100)
        mx.eval([c.state for c in batch])

    peak = peak_memory(use)
    # The arrays of both layers have room for the tokens that follow.
    size = sum(c.nbytes for c in batch)
    assert size <= cache.nbytes * 1.2
    assert peak <= size * 1.05


def test_insertion_copies_only_what_is_new():
    tokens = list(range(250)) * 8
    cache = RadixPromptCache()
    cache.insert_cache("m", tokens[:1000], make("KVCache", tokens[:1000]))
    grown = make("KVCache", tokens)
    mx.eval([c.state for c in grown])
    held = cache.nbytes
    peak = peak_memory(lambda: cache.insert_cache("m", tokens, grown))
    assert cache.nbytes - held == held
    assert peak <= (cache.nbytes - held) * 1.1


def test_segments_own_their_memory():
    # With one head a slice is contiguous: mx.contiguous would share its parent's buffer.
    before = active_memory()
    mx.clear_cache()
    caches = make("KVCache", list(range(40)))
    cache = RadixPromptCache()
    cache.insert_cache("m", list(range(10)), [trimmed(c, 30) for c in caches])
    del caches
    assert active_memory() - before == cache.nbytes


def trimmed(cache, n):
    trim_prompt_cache([cache], n)
    return cache


def test_states_own_their_memory():
    # A row of a batch is contiguous, however many heads it has.
    before = active_memory()
    mx.clear_cache()
    batch = ArraysCache(1)
    batch[0] = mx.zeros((3, 4, 16, 16))
    mx.eval(batch.state)
    cache = RadixPromptCache()
    cache.insert_cache("m", TOKENS, [batch.extract(1)])
    del batch
    assert active_memory() - before == cache.nbytes


def test_hit_is_used_alone_like_the_cache_it_was():
    hit, _ = cached("KVCache", 3, 9).fetch_segmented_cache("m", TOKENS)
    assert [c.size() for c in hit] == [9, 9]
    assert not any(c.empty() for c in hit)
    # Segments belong to the prompt cache, which counts their bytes.
    assert [c.nbytes for c in hit] == [0, 0]
    assert trim_prompt_cache(hit, 4) == 4
    assert contents(hit, 5) == contents(make("KVCache", TOKENS[:5]), 5)
    assert all(c.nbytes > 0 for c in hit)
    assert SegmentedKVCache().empty() and SegmentedKVCache().keys is None


@pytest.mark.parametrize("model", MODELS)
def test_hit_that_is_written_to_leaves_the_prompt_cache_as_it_was(model):
    prompt = TOKENS + list(range(50, 60))
    cache = cached(model, 10, tokens=prompt)
    expected = contents(make(model, TOKENS), 10)
    for _ in range(2):
        hit, _ = cache.fetch_segmented_cache("m", prompt)
        assert contents(hit, 10) == expected
        for i in range(10, 20):
            feed(hit, prompt, i, i + 1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("n_prompt", range(1, 10))
def test_what_was_generated_token_by_token_is_found(model, n_prompt):
    cache = RadixPromptCache()
    cache.insert_cache("m", TOKENS[:9], make(model, TOKENS[:9], n_prompt))
    hit, rest = cache.fetch_segmented_cache("m", TOKENS)
    assert rest == TOKENS[9:]
    assert contents(hit, 9) == contents(make(model, TOKENS[:9]), 9)


def test_state_of_other_tokens_than_the_kv_is_not_kept():
    cache = RadixPromptCache()
    caches = [*make("ArraysCache", TOKENS), *make("KVCache", TOKENS)]
    cache.insert_cache("m", TOKENS[:6], caches)
    assert len(cache) == 0


def test_window_that_lacks_tokens_is_not_kept():
    cache = RadixPromptCache()
    caches = make("RotatingKVCache", TOKENS)
    caches[0].keys, caches[0].values = (
        x[..., -3:, :] for x in (caches[0].keys, caches[0].values)
    )
    cache.insert_cache("m", TOKENS, caches)
    assert len(cache) == 0


def test_caches_that_disagree_are_not_kept():
    cache = RadixPromptCache()
    caches = make("sliding window", TOKENS)
    # The window has wrapped: it cannot go back to the tokens of the other.
    caches[1].trim(2)
    cache.insert_cache("m", TOKENS, caches)
    assert len(cache) == 0
    # Both can be cut: the tokens that both have are kept.
    caches = make("KVCache", TOKENS)
    caches[1].trim(2)
    cache.insert_cache("m", TOKENS, caches)
    assert cache.stats().tokens == 8
    integrity.check(cache)


def test_layout_of_an_unknown_type_names_it():
    with pytest.raises(TypeError, match="mlx_lm.models.cache.ConcatenateKVCache"):
        Layout([KVCache(), CacheList(ConcatenateKVCache())])


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "decode"]), st.integers(0, 1000)),
    max_size=30,
)


@settings(deadline=None, max_examples=60)
@given(operations=OPERATIONS)
def test_rows_that_come_and_go_hold_what_upstreams_rows_hold(operations):
    """Rows of all lengths join and leave, and each holds its own tokens."""
    batch, rows = [], []

    def add(seed):
        rng = random.Random(seed)
        tokens = [rng.randrange(250) for _ in range(rng.choice([1, 5, 300, 700]))]
        model = type("Model", (), {"make_cache": lambda self: [KVCache()]})()
        new = merge([make_segmented_cache(model)])
        feed(new, tokens, 0, len(tokens))
        if batch:
            batch[0].extend(new[0])
        else:
            batch.extend(new)
        rows.append(tokens)

    add(1)
    for what, seed in operations:
        if what == "join":
            add(seed)
        elif what == "leave" and len(rows) > 1:
            n_left = 1 + seed % (len(rows) - 1)
            keep = sorted(random.Random(seed).sample(range(len(rows)), n_left))
            # The last rows take the places of those that leave, or all stay in order.
            if seed % 2:
                last = iter([i for i in keep if i >= n_left])
                keep = [i if i in keep else next(last) for i in range(n_left)]
            batch[0].filter(keep)
            rows = [rows[i] for i in keep]
        elif what == "decode":
            for tokens in rows:
                tokens.append(seed % 250)
            new = [kv(tokens, len(tokens) - 1, len(tokens)) for tokens in rows]
            batch[0].update_and_fetch(*(mx.concatenate(x) for x in zip(*new)))
        assert batch[0].offset.tolist() == [len(tokens) for tokens in rows]
    for i, tokens in enumerate(rows):
        row = [batch[0].extract(i)]
        expected = [x for x in kv(tokens, 0, len(tokens))]
        for found, x in zip((row[0].keys, row[0].values), expected):
            assert mx.array_equal(found, x)
    # There are few spare rows, and few columns that no row uses.
    assert batch[0].keys.shape[0] <= max(2 * len(rows), 2)
    longest = max(map(len, rows))
    assert batch[0].size() <= max(longest + 32, longest * 4 / 3)


def layers_of(*lengths):
    """The two layers of a batch with rows of these lengths."""
    rows = [make("KVCache", TOKENS[:n]) for n in lengths]
    return [BatchSegmentedKVCache.merge(list(layer)) for layer in zip(*rows)]


def test_mask_is_an_array_only_if_rows_begin_at_different_places():
    batch = layers_of(5, 5)[0]
    assert batch.make_mask(1) is None
    assert batch.make_mask(3) == "causal"
    assert batch.make_mask(3, return_array=True).shape == (3, 8)
    # No token has left the window yet.
    assert batch.make_mask(1, window_size=6) is None
    assert batch.make_mask(1, window_size=5).tolist() == [[False] + [True] * 5]
    batch.extend(layers_of(3)[0])
    seen = batch.make_mask(1)[:, 0, 0].tolist()
    assert seen == [[True] * 6] * 2 + [[False] * 2 + [True] * 4]


def test_layers_share_where_their_rows_begin():
    layers = layers_of(3, 5)
    for layer, row in zip(layers, layers_of(9)):
        layer.extend(row)
    prepare_step(layers)
    assert layers[0].offset is layers[1].offset
    feed([layers[0]], TOKENS, 9, 10)
    assert [layer.offset.tolist() for layer in layers] == [[4, 6, 10], [3, 5, 9]]


def test_neighbours_move_together():
    assert row_moves([0, 7, 8, 3, 9, 6]) == [(7, 1, 2), (9, 4, 1), (6, 5, 1)]
    assert row_moves([3, 4, 5]) == [(3, 0, 3)]
    assert row_moves([0, 1]) == []


@pytest.mark.parametrize("keep", [[5, 0], [4, 5, 2, 3]])
def test_rows_can_be_put_in_another_order(keep):
    lengths = (3, 5, 9, 4, 6, 7)
    batch = layers_of(*lengths)
    for cache in batch:
        cache.filter(keep)
    for i, n in enumerate(lengths[i] for i in keep):
        row = [c.extract(i) for c in batch]
        assert contents(row, n) == contents(make("KVCache", TOKENS[:n]), n)


@pytest.mark.parametrize("has_window", [False, True])
def test_row_leaves_and_joins_with_a_copy_of_one_row(has_window):
    def rows(n, n_tokens=1000):
        padding = [0] * n
        batch = (
            BatchSlidingKVCache(padding, 1000)
            if has_window
            else BatchSegmentedKVCache(padding)
        )
        x = mx.zeros((n, 2, n_tokens, 32))
        batch.update_and_fetch(x, x)
        mx.eval(batch.state)
        return batch

    # The row of the window still has tokens that the batch has dropped.
    batch, row = rows(16), rows(1, 1100 if has_window else 1000)
    batch.extend(rows(1))
    mx.eval(batch.state)
    # A copy of one row, and one more while it is written.
    size = row.nbytes

    def exchange():
        batch.filter([16, *range(1, 16)])
        mx.eval(batch.state)
        batch.extend(row)
        mx.eval(batch.state)

    assert peak_memory(exchange) <= 2 * size


@pytest.mark.parametrize("n_tokens", [5, 0])
@pytest.mark.parametrize("has_window", [False, True])
def test_row_keeps_nothing_of_the_one_whose_place_it_takes(has_window, n_tokens):
    """A weight of 0 for its padding would not remove NaN."""

    def rows(n, n_tokens, value):
        padding = [0] * n
        batch = (
            BatchSlidingKVCache(padding, 50)
            if has_window
            else BatchSegmentedKVCache(padding)
        )
        if n_tokens:
            x = mx.full((n, 2, n_tokens, 4), value)
            batch.update_and_fetch(x, x)
        return batch

    batch = rows(2, 20, 1.0)
    batch.extend(rows(2, 20, mx.nan))
    batch.filter([0, 1])
    batch.extend(rows(1, n_tokens, 2.0))
    for x in batch.keys_and_values():
        assert x[2].sum().item() == 2 * n_tokens * 4 * 2.0


@pytest.mark.parametrize(
    "kept_as, is_in_place",
    [
        ("evaluated copies", True),
        # What may not be done: the step would copy all rows to leave these as they are.
        ("copies that are not evaluated", False),
        ("views", False),
    ],
)
def test_row_that_is_extracted_has_to_be_copied_before_the_next_step(
    kept_as, is_in_place
):
    batch = BatchSegmentedKVCache([0] * 8)
    x = mx.random.normal((8, 2, 1000, 32))
    batch.update_and_fetch(x, x)
    mx.eval(batch.state)
    row = batch.extract(3)
    kept = [row.keys, row.values]
    del row
    if kept_as != "views":
        kept = copy_arrays(kept, 0, 1000)
    if kept_as == "evaluated copies":
        mx.eval(kept)

    def step():
        new = mx.ones((8, 2, 1, 32))
        batch.update_and_fetch(new, new)
        mx.eval(batch.state)

    peak = peak_memory(step)
    assert (peak < batch.nbytes / 100) == is_in_place
    assert all(mx.array_equal(k, x[3:4]) for k in kept)


def test_joins_and_leaves_are_measured_beside_upstreams(monkeypatch, capsys):
    argv = ["--rows", "8", "--tokens", "300", "--layers", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["join_and_leave", *argv])
    join_and_leave.main()
    figures = r"(join|leave): mlx-lm [\d.]+ ms, here [\d.]+ ms: [\d.]+ times"
    assert re.findall(figures, capsys.readouterr().out) == ["join", "leave"]
