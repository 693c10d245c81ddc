"""Batches of windows: what each token attends to while rows join and leave."""

import random

import mlx.core as mx
from fake_caches import feed, kv
from helpers import peak_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import RotatingKVCache

from mlx_lm_ext.cache.sliding import BatchSlidingKVCache, SlidingKVCache, in_order

WINDOW = 8

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["join", "leave", 1, 1, 1, 3, 12]), st.integers(0, 1000)),
    max_size=30,
)


def run(batch, rows, n):
    """Run ``n`` more tokens of each row, as a model does; checks what each token sees."""
    new = [kv(tokens, len(tokens) - n, len(tokens)) for tokens in rows]
    batch.drop_old(slack=2)
    mask = batch.make_mask(n, return_array=True)
    if mask is None:
        mask = mx.array(True)
    keys, values = batch.update_and_fetch(*(mx.concatenate(x) for x in zip(*new)))
    mask = mx.broadcast_to(mask, (len(rows), 1, n, keys.shape[2])).tolist()
    for i, tokens in enumerate(rows):
        for j in range(n):
            end = len(tokens) - n + j + 1
            seen = mx.array([k for k, is_seen in enumerate(mask[i][0][j]) if is_seen])
            for found, x in zip((keys, values), kv(tokens, max(0, end - WINDOW), end)):
                assert mx.array_equal(found[i : i + 1, :, seen], x)


@settings(deadline=None, max_examples=100)
@given(operations=OPERATIONS)
def test_each_token_sees_the_window_before_it(operations):
    batch, rows = SlidingKVCache.merge([SlidingKVCache(WINDOW)]), []

    def add(seed):
        rng = random.Random(seed)
        tokens = [rng.randrange(250) for _ in range(rng.choice([1, 5, WINDOW, 30]))]
        # The prompt is run at once, and the tokens after it one by one.
        alone = SlidingKVCache(WINDOW)
        n_prompt = rng.randint(1, len(tokens))
        for start, stop in [(0, n_prompt), *((i, i + 1) for i in range(n_prompt, 30))]:
            if stop <= len(tokens):
                feed([alone], tokens, start, stop)
        batch.extend(SlidingKVCache.merge([alone]))
        rows.append(tokens)

    # The empty row that the batch began with leaves.
    add(1)
    batch.filter([1])
    for what, seed in operations:
        if what == "join":
            add(seed)
        elif what == "leave":
            if len(rows) > 1:
                keep = list(range(len(rows)))
                keep[seed % len(rows)] = keep[-1]
                batch.filter(keep[:-1])
                rows = [rows[i] for i in keep[:-1]]
        else:
            rng = random.Random(seed)
            for tokens in rows:
                tokens += [rng.randrange(250) for _ in range(what)]
            run(batch, rows, what)
        assert batch.offset.tolist() == [len(tokens) for tokens in rows]
    for i, tokens in enumerate(rows):
        row, expected = batch.extract(i), RotatingKVCache(WINDOW)
        feed([expected], tokens, 0, len(tokens))
        assert (row.offset, row.max_size) == (len(tokens), WINDOW)
        for found, x in zip(in_order(row), in_order(expected)):
            assert mx.array_equal(found, x)


def test_prompts_of_different_lengths_are_run_at_once():
    rng = random.Random(3)
    prompts = [[rng.randrange(250) for _ in range(n)] for n in (3, 30, 11)]
    batch = SlidingKVCache.merge([SlidingKVCache(WINDOW) for _ in prompts])
    padding = [30 - len(tokens) for tokens in prompts]
    batch.prepare(lengths=[*map(len, prompts)], right_padding=padding)
    padded = [kv(tokens + [0] * n, 0, 30) for tokens, n in zip(prompts, padding)]
    batch.update_and_fetch(*(mx.concatenate(x) for x in zip(*padded)))
    batch.finalize()
    for _ in range(2 * WINDOW):
        for tokens in prompts:
            tokens.append(rng.randrange(250))
        run(batch, prompts, 1)


def test_spare_rows_are_given_up_when_tokens_are_dropped():
    batch, x = BatchSlidingKVCache([0] * 3, 800), mx.zeros((3, 2, 801, 32))
    batch.update_and_fetch(x, x)
    batch.filter([0, 1])
    assert len(batch.keys) == 3
    batch.drop_old()
    assert len(batch.keys) == len(batch.values) == 2


def test_steps_write_in_place_until_it_is_time_to_drop():
    batch = BatchSlidingKVCache([0] * 4, 800)
    x = mx.zeros((4, 2, 801, 32))
    batch.update_and_fetch(x, x)
    batch.drop_old()
    mx.eval(batch.state)

    def steps():
        for _ in range(100):
            batch.drop_old(slack=100)
            batch.update_and_fetch(x[:, :, :1], x[:, :, :1])
            mx.eval(batch.state)

    assert peak_memory(steps) < batch.nbytes / 10
    batch.drop_old(slack=100)
    assert batch.size() == 900
    batch.drop_old(slack=99)
    assert batch.size() == 800
