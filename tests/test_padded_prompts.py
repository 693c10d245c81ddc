"""With CUDA, chunks of prompts have few shapes. Here the CPU does as if it were CUDA."""

import random
from types import SimpleNamespace

import pytest
from helpers import LETTERS, Reference, read, submit, texts, wait_until_idle
from integrity import check
from tiny_models import in_turn

from mlx_lm_ext.batch import prefill
from mlx_lm_ext.batch.pace import Pace
from mlx_lm_ext.batch.prompts import LeanPromptBatch, PromptBatches

CACHE = ["--use-prompt-cache"]
# Bytes of a token's KV in the tiny llama.
TOKEN = 2 * 2 * 2 * 16 * 4


@pytest.fixture
def chunks(monkeypatch):
    """Gives ``(rows, width, end)`` of each chunk."""
    monkeypatch.setattr(prefill, "device_kind", lambda: "cuda")
    monkeypatch.setattr(prefill, "SHAPES", set())
    seen = []
    run = LeanPromptBatch.run

    def noted(batch, width):
        # The padding is gone after it.
        start = max(c.size() for c in batch.prompt_cache)
        result = run(batch, width)
        width = result[1] // len(batch)
        seen.append((len(batch), width, start + width))
        return result

    monkeypatch.setattr(LeanPromptBatch, "run", noted)
    return seen


@pytest.mark.parametrize("architecture, argv", in_turn([[]], [CACHE]), ids=str)
def test_answers_are_those_without_padding(architecture, argv, start_engine, chunks):
    engine = start_engine(architecture, *argv, "--prefill-step-size", "100")
    reference = Reference(engine.cli_args.model)
    prompts = texts(12, longest=700)
    # Some share a prefix with others.
    prompts += [p[: len(p) // 2] + "and more" for p in prompts[:4]]
    jobs = [submit(engine, p, max_tokens=9) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 9)
    # The same once more, from the cache.
    for prompt in prompts[:3]:
        assert read(submit(engine, prompt, max_tokens=9)) == reference.tokens(prompt, 9)
    wait_until_idle(engine)
    if argv:
        check(engine.prompt_cache)


def test_chunks_have_few_shapes(start_engine, chunks):
    engine = start_engine("llama", *CACHE)
    rng = random.Random(0)
    known = "".join(rng.choices(LETTERS, k=1000))
    for n in (2, 20, 33, 200, 257, 300, 1000):
        more = "".join(rng.choices(LETTERS, k=n))
        for prompt in (more, known[: 3 * n // 2] + more):
            read(submit(engine, prompt, max_tokens=1))
    assert {width for _, width, _ in chunks} <= {32 << i for i in range(7)}
    starts = {end - width for _, width, end in chunks}
    assert {start % 32 for start in starts} == {0}
    assert {start % 128 for start in starts if start >= 256} == {0}


@pytest.mark.parametrize("n_places, width", [(4096, 2048), (3840, 1551)])
def test_prompt_gets_no_padding_for_which_there_is_no_memory(
    n_places, width, start_engine, chunks, monkeypatch
):
    monkeypatch.setattr(prefill, "on_cpu", lambda: False)
    engine = start_engine("llama", "--max-kv-bytes", str(n_places * TOKEN))
    assert len(read(submit(engine, "x" * 3600, max_tokens=3, ignore_eos=True))) == 3
    assert chunks == [(1, 2048, 2048), (1, width, 2048 + width)]


@pytest.mark.parametrize(
    "n_left, budget, width",
    [
        (3000, 2048, 2048),
        # Up to 128 tokens take as long as one.
        (70, 2048, 70),
        # A quarter may be padding.
        (800, 2048, 800),
        (700, 2048, 512),
        (800, 1000, 512),
        (800, 10, 8),
    ],
)
def test_chunk_of_a_prompt_that_runs_alone_is_a_power_of_two(
    n_left, budget, width, monkeypatch
):
    monkeypatch.setattr(prefill, "device_kind", lambda: "cuda")
    assert prefill.chunk_width([n_left], budget) == width


@pytest.mark.parametrize(
    "device, n_tokens, budget",
    [
        ("cuda", 1639, 2048),
        ("cuda", 1638, 1638),
        ("cuda", 2048, 2048),
        ("cuda", 1, 1),
        ("metal", 2000, 2000),
    ],
)
def test_time_for_nearly_a_power_of_two_is_taken_for_one(
    device, n_tokens, budget, monkeypatch
):
    monkeypatch.setattr(prefill, "device_kind", lambda: device)
    assert prefill.whole_budget(n_tokens) == budget


def test_chunks_beside_a_stream_keep_the_budget_that_was_given(start_engine, chunks):
    argv = "--prefill-budget", "210"
    engine = start_engine("llama", *argv)
    read(submit(engine, "x" * 3000, max_tokens=1))
    assert max(width for _, width, _ in chunks) == 256
    stream = submit(engine, "y", max_tokens=4000, ignore_eos=True)
    assert stream.receive(timeout=60)
    chunks.clear()
    read(submit(engine, "z" * 3000, max_tokens=1))
    engine.client.cancel(stream)
    assert chunks and max(width for _, width, _ in chunks) <= 210


class FakePrompt:
    """A prompt that takes no time."""

    def __init__(self, n_left):
        self.n_left, self.widths = n_left, []
        self.segment_lengths = [n_left]

    def __len__(self):
        return 1

    def run(self, width):
        self.widths.append(width)
        return [SimpleNamespace(end_of_segment=width == self.n_left)], width, False


@pytest.mark.parametrize("device, rest", [("cuda", []), ("metal", [500])])
def test_chunks_that_would_get_another_width_in_the_rest_of_a_step_wait(
    device, rest, monkeypatch
):
    monkeypatch.setattr(prefill, "device_kind", lambda: device)
    batches = PromptBatches()
    short, long = batches.batches = [FakePrompt(1000), FakePrompt(3000)]
    batches.run(1500, prefill.chunk_width, cost=lambda n: n)
    assert (short.widths, long.widths) == ([1000], rest)


def test_time_of_a_chunk_begins_when_its_shape_is_planned(
    start_engine, chunks, monkeypatch
):
    now, run, noted = [0.0], LeanPromptBatch.run, []

    def plan(batch, width):
        result = run(batch, width)
        now[0] += 100 * result[2]
        return result

    def note(pace, n_rows, sizes, seconds):
        noted.append(seconds)

    monkeypatch.setattr(LeanPromptBatch, "run", plan)
    monkeypatch.setattr(Pace, "note", note)
    engine = start_engine("llama")
    engine.policies.clock = lambda: now[0]
    stream = submit(engine, "y", max_tokens=400, ignore_eos=True)
    assert stream.receive(timeout=60)
    read(submit(engine, "x" * 1000, max_tokens=1))
    read(stream)
    assert prefill.SHAPES == set(chunks) and now[0] >= 200
    assert set(noted) == {0.0}


def test_least_chunk_is_large_with_cuda(chunks):
    assert prefill.least_chunk() == 256


def test_nothing_is_padded_without_cuda():
    assert [prefill.padded_width(n) for n in (1, 33, 300)] == [1, 33, 300]
    assert [prefill.aligned(n, 999) for n in (1, 33, 300)] == [1, 33, 300]
