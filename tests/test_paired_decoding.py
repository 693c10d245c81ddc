"""With CUDA, rows with long KV run each token twice. Here the CPU does so, too."""

import mlx.core as mx
import pytest
from helpers import Reference, read, submit, texts, wait_until_idle
from integrity import check
from test_kv_memory import WatchedEngine
from tiny_models import CONFIGS

from mlx_lm_ext.batch import generator
from mlx_lm_ext.batch.kv_memory import KVMemory
from mlx_lm_ext.cache.segmented import BatchSegmentedKVCache

CACHE = ["--use-prompt-cache"]


@pytest.fixture
def paired(monkeypatch):
    """All layers that keep all tokens decode in pairs; gives how often they did."""
    steps = []

    def pays(caches):
        steps.append(all(type(c) is BatchSegmentedKVCache for c in caches))
        return steps[-1]

    monkeypatch.setattr(generator, "pays_to_run_pairs", pays)
    return steps


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("argv", [[], CACHE], ids=["without", "cache"])
def test_answers_are_those_of_single_tokens(argv, architecture, start_engine, paired):
    engine = start_engine(architecture, *argv)
    reference = Reference(engine.cli_args.model)
    prompts = texts(12, longest=400)
    # They leave one by one, and some grow beyond their arrays.
    lengths = [3 + 23 * i for i in range(len(prompts))]
    jobs = [submit(engine, p, max_tokens=n) for p, n in zip(prompts, lengths)]
    for prompt, n, job in zip(prompts, lengths, jobs):
        assert read(job) == reference.tokens(prompt, n)
    assert read(submit(engine, prompts[0], max_tokens=9)) == reference.tokens(
        prompts[0], 9
    )
    wait_until_idle(engine)
    if argv:
        check(engine.prompt_cache)
    is_kept = architecture in ("llama", "qwen3")
    assert any(paired) or not is_kept


def test_second_token_counts_where_rows_outgrow_the_memory(
    model_folder, start_engine, paired
):
    limit = KVMemory(Reference(model_folder()).model).nbytes(3, 512)
    argv = "--max-kv-bytes", str(limit)
    engine = start_engine("llama", *argv, make_engine=WatchedEngine)
    body = {"max_tokens": 300, "logit_bias": {i: -100 for i in range(3)}}
    jobs = [submit(engine, "x" * 240, **body) for _ in range(4)]
    assert [len(read(job)) for job in jobs] == [300] * 4
    wait_until_idle(engine)
    assert engine.batch.resumed and any(paired)
    assert engine.batch.most_of_rows <= limit


def layer(end, dtype=mx.bfloat16, padding=(0, 3)):
    c = BatchSegmentedKVCache(list(padding))
    c.update_and_fetch(*(mx.zeros((2, 1, end, 8), dtype) for _ in range(2)))
    return c


def test_pairs_are_run_where_they_pay(monkeypatch):
    pays = generator.pays_to_run_pairs
    assert not pays([layer(2000)])
    monkeypatch.setattr(generator, "device_kind", lambda: "cuda")
    assert pays([layer(2000)])
    assert not pays([layer(300)])
    # Without a mask, there is a kernel.
    assert not pays([layer(2000, padding=(0, 0))])
    assert not pays([layer(2000, mx.float32)])
    assert not pays([layer(2000), object()])
    # Keys and values of latents differ in width.
    latents = layer(2000)
    latents.values = latents.values[..., :4]
    assert not pays([latents])
