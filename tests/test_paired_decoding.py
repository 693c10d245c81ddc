"""With CUDA, rows with long KV run each token twice. Here the CPU does so, too."""

import mlx.core as mx
import pytest
from helpers import Reference, read, submit, texts, wait_until_idle
from integrity import check
from test_kv_memory import WatchedEngine
from tiny_models import in_turn

from mlx_lm_ext.batch import generator, pairs
from mlx_lm_ext.batch.generator import LeanGenerationBatch
from mlx_lm_ext.batch.kv_memory import KVMemory
from mlx_lm_ext.batch.pace import Pace
from mlx_lm_ext.batch.pairs import PairedShapes
from mlx_lm_ext.batch.prompts import PromptBatches
from mlx_lm_ext.cache.segmented import BatchSegmentedKVCache

CACHE = ["--use-prompt-cache"]


@pytest.fixture
def shapes(monkeypatch):
    """All layers that keep all tokens can decode in pairs, and do so at once."""

    def can(caches):
        kept = all(type(c) is BatchSegmentedKVCache for c in caches)
        return kept and caches[0].keys is not None

    found = PairedShapes()
    for room in (pairs, generator):
        monkeypatch.setattr(room, "can_pair", can)
    monkeypatch.setattr(generator, "PAIRED_SHAPES", found)
    monkeypatch.setattr(pairs, "PLANNED_AFTER", 0)
    return found


@pytest.mark.parametrize("architecture, argv", in_turn([CACHE], [[]]), ids=str)
def test_answers_are_those_of_single_tokens(architecture, argv, start_engine, shapes):
    engine = start_engine(architecture, *argv)
    reference = Reference(engine.cli_args.model)
    prompts = texts(12, longest=400)
    # They leave one by one, and some grow beyond their arrays.
    lengths = [3 + 13 * i for i in range(len(prompts))]
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
    assert shapes.planned or not is_kept


def test_second_token_counts_where_rows_outgrow_the_memory(
    model_folder, start_engine, shapes
):
    limit = KVMemory(Reference(model_folder()).model).nbytes(3, 512)
    argv = "--max-kv-bytes", str(limit)
    engine = start_engine("llama", *argv, make_engine=WatchedEngine)
    body = {"max_tokens": 300, "logit_bias": {i: -100 for i in range(3)}}
    jobs = [submit(engine, "x" * 240, **body) for _ in range(4)]
    assert [len(read(job)) for job in jobs] == [300] * 4
    wait_until_idle(engine)
    assert engine.batch.resumed and shapes.planned
    assert engine.batch.most_of_rows <= limit


def layer(end, dtype=mx.bfloat16, padding=(0, 3)):
    c = BatchSegmentedKVCache(list(padding))
    c.update_and_fetch(*(mx.zeros((2, 1, end, 8), dtype) for _ in range(2)))
    return c


def test_pairs_can_be_run_where_they_pay(monkeypatch):
    can_pair = pairs.can_pair
    assert not can_pair([layer(2000)])
    monkeypatch.setattr(pairs, "device_kind", lambda: "cuda")
    assert can_pair([layer(2000)])
    assert not can_pair([layer(300)])
    # Without a mask, there is a kernel.
    assert not can_pair([layer(2000, padding=(0, 0))])
    assert not can_pair([layer(2000, mx.float32)])
    assert not can_pair([layer(2000), object()])
    # Keys and values of latents differ in width.
    latents = layer(2000)
    latents.values = latents.values[..., :4]
    assert not can_pair([latents])


def test_a_shape_is_planned_when_it_has_lost_as_much_time_as_that_takes(monkeypatch):
    monkeypatch.setattr(pairs, "device_kind", lambda: "cuda")
    layers, larger = [layer(2000), layer(2000)], [layer(3000)]
    n_bytes = sum(c.nbytes for c in layers)
    monkeypatch.setattr(pairs, "PLANNED_AFTER", 2 * n_bytes)
    shapes = PairedShapes()
    assert [shapes.note_step(layers) for _ in range(2)] == [False] * 2
    assert shapes.must_plan(layers)
    assert not shapes.must_plan(larger) and not shapes.note_step(larger)
    assert [shapes.note_step(layers) for _ in range(2)] == [True] * 2
    assert not shapes.must_plan(layers)
    shapes.clear()
    assert not shapes.note_step(layers)


def test_a_step_that_is_planned_has_no_prompts_and_is_not_timed(
    start_engine, shapes, monkeypatch
):
    events = []

    def watch(cls, name, event):
        function = getattr(cls, name)

        def watched(*args):
            result = function(*args)
            events.append(event(args[0]))
            return result

        monkeypatch.setattr(cls, name, watched)

    watch(LeanGenerationBatch, "run", lambda b: "plan" if b.has_planned else "decode")
    watch(PromptBatches, "run", lambda b: "prompts")
    watch(Pace, "note", lambda b: "time")
    # So much is read in some steps of two short rows, while the prompt of the third is run.
    monkeypatch.setattr(pairs, "PLANNED_AFTER", 1 << 22)
    engine = start_engine("llama", "--prefill-step-size", "16")
    jobs = [submit(engine, "x" * n, max_tokens=300, ignore_eos=True) for n in (9, 40)]
    assert all(job.receive(timeout=60) for job in jobs)
    jobs.append(submit(engine, "z" * 3000, max_tokens=3))
    for job in jobs:
        read(job)
    wait_until_idle(engine)
    planned = [i for i, event in enumerate(events) if event == "plan"]
    # The step before the last one had prompts, and the last one none.
    assert any(events[i - 3 : i] == ["prompts", "decode", "time"] for i in planned)
    for i in planned:
        assert events[i - 1] != "prompts"
        assert events[i + 1 : i + 2] != ["time"]
