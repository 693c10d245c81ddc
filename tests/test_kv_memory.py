"""Requests that start only if their KV fits beside that of the others."""

import random
from functools import partial
from threading import Event
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers import (
    LETTERS,
    Reference,
    peak_memory,
    plugin,
    read,
    submit,
    texts,
    wait_until_idle,
)
from integrity import check
from mlx_lm.models.cache import ConcatenateKVCache
from mlx_lm.sample_utils import make_logits_processors
from tiny_models import CONFIGS, in_turn

from mlx_lm_ext import device
from mlx_lm_ext.batch import generator
from mlx_lm_ext.batch.answer_lengths import AnswerLengths
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.batch.kv_memory import KVMemory
from mlx_lm_ext.bench.random_model import write_model
from mlx_lm_ext.cache.kinds import make_segmented_cache, prepare_step
from mlx_lm_ext.cache.prompt_cache import RadixPromptCache
from mlx_lm_ext.device import device_memory
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.engine.warm_up import make_request
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import BatchSampler
from mlx_lm_ext.request.mailbox import Turnstile

# Of the tiny llama: two layers with keys and values of two heads of 16 floats.
TOKEN = 2 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("n_tokens", [5, 301])
def test_size_is_that_of_the_caches(architecture, n_tokens, model_folder):
    model = Reference(model_folder(architecture)).model
    rows = [make_segmented_cache(model) for _ in range(3)]
    caches = [row[0].merge(list(row)) for row in zip(*rows)]
    for n in (n_tokens - 1, 1):
        prepare_step(caches)
        model(mx.zeros((3, n), dtype=mx.int32), cache=caches)
    held, size = sum(c.nbytes for c in caches), KVMemory(model).nbytes(3, n_tokens)
    if n_tokens > 256 and architecture == "gemma3_text":
        # A window has room for that many while it fills.
        assert held < size
    else:
        assert held == size


def test_size_is_known_without_running_the_model(model_folder):
    model = Reference(model_folder()).model
    mx.eval(model.parameters())
    # A few constants.
    assert peak_memory(lambda: KVMemory(model)) < 1000


@pytest.mark.parametrize(
    "shape, n_rows, width",
    [
        # There may be a copy of it with more rows, and with places left.
        ((), 2, 1500 + 256),
        # The running batch has spare rows, and a copy of it ends anywhere in a step.
        ((10, 1100), 10, 1500 + 256),
        # It goes on after its padding,
        ((2, 1300), 2, 1300 + 400 + 256),
        # which is a quarter of it at most.
        ((2, 3000), 2, 2000 + 256),
    ],
)
def test_size_is_that_of_the_batch_that_goes_on(shape, n_rows, width, model_folder):
    memory = KVMemory(Reference(model_folder()).model)
    running = SimpleNamespace(n_prompt=1000, n_generated=100, max_tokens=500)
    short = SimpleNamespace(n_prompt=10, n_generated=0, max_tokens=20)
    assert memory.needed([running, short], *shape) == memory.nbytes(n_rows, width)


def test_limit_is_what_the_device_has_beside_the_model(model_folder):
    limit = KVMemory(Reference(model_folder()).model).limit
    assert device_memory() * 0.8 < limit < device_memory() * 0.9


@pytest.mark.parametrize(
    "kind, freed, is_given_back",
    [
        ("cpu-linux", 100, False),
        ("cpu-linux", 101, True),
        # A GPU keeps more, as long as it has room for it.
        ("cuda", 350, False),
        ("cuda", 351, True),
    ],
)
def test_freed_memory_is_given_back_when_it_is_much(
    kind, freed, is_given_back, monkeypatch
):
    cleared = []
    monkeypatch.setattr(device, "device_kind", lambda: kind)
    monkeypatch.setattr(device, "device_memory", lambda: 1000)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 400)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: freed)
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(True))
    device.give_back_freed()
    assert bool(cleared) is is_given_back


def test_unknown_cache_type_is_not_bounded(model_folder, monkeypatch, caplog):
    model = Reference(model_folder()).model
    monkeypatch.setattr(
        type(model), "make_cache", lambda self: [ConcatenateKVCache()], raising=False
    )
    assert KVMemory(model).nbytes(1, 1000) == 0
    assert "ConcatenateKVCache is not known" in caplog.records[0].message


class EndsLikePrompt(BatchSampler):
    """The likeliest tokens, and the end of text after as many as the prompt has."""

    name = "ends"

    def __init__(self, args, request, tokenizer):
        self.left = [request.n_prompt - request.n_generated]
        self.end = min(tokenizer.eos_token_ids)

    def extend(self, other):
        self.left += other.left

    def filter(self, keep):
        self.left = [self.left[i] for i in keep]

    def __call__(self, logprobs):
        logprobs[:, self.end] = -mx.inf
        ended = mx.array(self.left) == 0
        self.left = [n - 1 for n in self.left]
        return mx.where(ended, self.end, mx.argmax(logprobs, axis=-1))


ENDS = plugin(mlx_lm_register_samplers=lambda: [EndsLikePrompt])


class Watched(Batch):
    """Notes how many rows run, what their KV takes, and which requests start again."""

    def __init__(self, *args):
        super().__init__(*args)
        self.most_rows = self.most_bytes = self.most_of_rows = 0
        self.resumed = []

    def add(self, request):
        super().add(request)
        if request.generated:
            (row,) = (row for row in self.rows.values() if row.request is request)
            self.resumed.append((row.n_tokens, row.n_run))

    def step(self):
        self.most_rows = max(self.most_rows, len(self))
        super().step()
        assert all(0 <= row.n_run <= row.n_tokens for row in self.prefilling)
        if self.generator is not None:
            mx.eval([c.state for c in self.generator.generation_batch.prompt_cache])
            n_bytes = self.generator.prompt_cache_nbytes
            self.most_bytes = max(self.most_bytes, n_bytes)
            # Rows of the prompt batch that join the others one by one are there twice.
            if not self.prefilling:
                self.most_of_rows = max(self.most_of_rows, n_bytes)


class WatchedEngine(Engine):
    batch_class = Watched


def memory_of(n_rows, n_tokens):
    """The argument with which so many rows of the tiny llama fit."""
    return "--max-kv-bytes", str(n_rows * n_tokens * TOKEN)


def test_estimate_is_what_nine_in_ten_answers_take():
    lengths = AnswerLengths()
    request = SimpleNamespace(n_generated=0, max_tokens=32000)
    assert lengths.expected(request) == 256
    for n in (5000, *range(1000, 1100)):
        lengths.add(n)
    assert lengths.expected(request) == 1090
    # Other answers have ended since.
    for _ in range(128):
        lengths.add(10)
    assert lengths.expected(request) == 256
    request.n_generated = 3000
    assert lengths.expected(request) == 3256
    request.max_tokens = 3001
    assert lengths.expected(request) == 3001


@pytest.mark.parametrize(
    "n_fit, batch_size, n_to_come",
    [
        (9, 32, 3),
        (9, 3, 2),
        # There is no memory for all of them: only the prompt that runs counts.
        (4, 32, 1),
    ],
)
def test_rows_to_come_are_those_that_run_and_wait_if_all_fit(
    n_fit, batch_size, n_to_come, batch_of
):
    batch, request = batch_of(*memory_of(n_fit, 512), "--batch-size", str(batch_size))
    first, second, *others = (request([7] * 100, max_tokens=99) for _ in range(4))
    batch.add(first)
    while batch.prefilling:
        batch.step()
    batch.add(second)
    batch.expect(others)
    assert batch.n_to_come() == [n_to_come]
    batch.close()


def test_engine_says_which_requests_wait(start_engine):
    seen = []

    class Counting(Batch):
        def n_to_come(self):
            seen.append(sum(super().n_to_come()))
            return super().n_to_come()

    class CountingEngine(Engine):
        batch_class = Counting

    argv = "llama", "--prompt-concurrency", "1"
    engine = start_engine(*argv, make_engine=CountingEngine)
    jobs = [submit(engine, "x" * 2000, max_tokens=200) for _ in range(5)]
    for job in jobs:
        read(job)
    # One prompt runs at a time.
    assert max(seen) > 1


def test_short_answers_run_together_whatever_their_cap_is(start_engine):
    memory = memory_of(10, 768)
    engine = start_engine("llama", *memory, plugin=ENDS, make_engine=WatchedEngine)
    jobs = [submit(engine, "x" * 50, max_tokens=4000, sampler="ends") for _ in range(8)]
    assert [len(read(job)) for job in jobs] == [51] * 8
    assert engine.batch.most_rows == 8
    assert not engine.batch.resumed
    assert engine.batch.kv_memory.lengths.usual == 51


@pytest.mark.parametrize(
    "architecture, cache, is_eager",
    in_turn(([], True), (["--use-prompt-cache"], False)),
    ids=str,
)
def test_rows_that_outgrow_the_memory_wait_and_go_on(
    architecture, cache, is_eager, model_folder, start_engine, monkeypatch
):
    monkeypatch.setattr(generator, "on_cpu", lambda: is_eager)
    bias = {i: -100 for i in range(3)}
    processors = make_logits_processors(bias)
    folder = model_folder(architecture)
    reference = Reference(folder, logits_processors=processors)
    limit = KVMemory(reference.model).nbytes(3, 512)
    memory = ["--max-kv-bytes", str(limit), *cache]
    engine = start_engine(architecture, *memory, make_engine=WatchedEngine)
    prompts = [(text * 240)[:240] for text in texts(4)]
    jobs = [submit(engine, p, max_tokens=300, logit_bias=bias) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 300)
    wait_until_idle(engine)
    assert engine.batch.most_of_rows <= limit
    assert engine.batch.resumed
    # All that they had was kept, but the last token, which was to be the next input.
    assert all(n_run == n - 1 for n, n_run in engine.batch.resumed)
    if cache:
        check(engine.prompt_cache)
    else:
        assert len(engine.batch.prompt_cache) == 0


@pytest.fixture
def batch_of(start_engine):
    """Makes a batch that nothing runs, and requests for it."""

    def make(*argv, architecture="llama"):
        engine = start_engine(architecture, *argv)
        args, provider = engine.cli_args, engine.model_provider
        model, tokenizer = provider.model, provider.tokenizer
        cache = RadixPromptCache() if args.use_prompt_cache else None
        batch = Batch(model, tokenizer, args, engine.policies, cache, Turnstile())
        return batch, partial(make_request, provider, args)

    return make


def test_row_that_goes_on_can_leave_before_a_part_of_it_has_run(batch_of):
    batch, request = batch_of("--use-prompt-cache")
    first, resumed = (request([i] * 200, max_tokens=99) for i in (7, 8))
    resumed.generated = [9]
    resumed.is_suspect = True
    batch.add(first)
    batch.add(resumed)
    # Both prompts begin, and there is time for a part of one.
    batch.prefill(50)
    assert [row.n_run for row in batch.rows.values()] == [50, 0]
    batch.remove([resumed])
    assert batch.requests == [first]
    batch.close()


def test_time_without_rows_is_not_that_of_prompts(batch_of):
    batch, request = batch_of()
    now = batch.policies.clock()
    batch.policies.clock = lambda: now
    for _ in range(2):
        prompt = request([7] * 600, max_tokens=9)
        batch.add(prompt)
        batch.step()
        assert len(batch.prefilling) == 1
        batch.remove([prompt])
        now += 1000
    assert max(batch.pace.of_token.values(), default=0) < 1


def test_followed_row_is_cut_where_it_counts_from_its_own_start(batch_of):
    batch, request = batch_of("--use-prompt-cache", architecture="gemma3_text")
    leader = request([*range(7, 57)] * 4, max_tokens=9)
    # It took a part from the prompt cache before its step failed, and takes nothing now.
    leader.n_matched, leader.is_suspect = 100, True
    batch.add(leader)
    assert batch.must_wait(request(leader.prompt[:150] + [3, 4], max_tokens=9))
    (prompt,) = batch.generator.unprocessed_prompts
    assert len(prompt.segments[0]) == 150
    batch.close()


def test_cached_tokens_are_not_those_that_were_run_before_a_wait(start_engine):
    class OutgrowsOnce(Watched):
        preempted = None

        def outgrows_memory(self, beside):
            rows = self.prefilling
            return not self.preempted and bool(rows) and rows[0].n_run >= 512

        def preempt(self, request):
            self.preempted = request
            super().preempt(request)

    class OutgrownEngine(Engine):
        batch_class = OutgrowsOnce

    engine = start_engine("llama", "--use-prompt-cache", make_engine=OutgrownEngine)
    job = submit(engine, "x" * 1500, max_tokens=4)
    read(job)
    assert engine.batch.preempted is job and job.n_matched == 0


def test_prompt_without_a_row_counts_beside_the_rows(batch_of):
    batch, request = batch_of(*memory_of(2, 512))
    batch.add(request([7] * 250, max_tokens=400))
    while batch.prefilling:
        batch.step()
    long, short = (request([8] * n, max_tokens=0) for n in (500, 250))
    while len(batch) and not batch.outgrows_memory([long]):
        assert batch.requests[0].n_generated <= 512 - 250
        batch.step()
    # Its arrays get room for more than 512 tokens.
    assert len(batch) and not batch.outgrows_memory([short])
    batch.close()


@pytest.mark.logs_errors
def test_row_that_cannot_be_taken_out_starts_again_once(
    model_folder, start_engine, monkeypatch
):
    failed = []

    class OutgrowsOnce(Watched):
        def outgrows_memory(self, beside):
            return bool(self.rows) and not failed and self.newest.n_generated == 10

    class FailingEngine(Engine):
        batch_class = OutgrowsOnce

    def pending(self, uid):
        failed.append(uid)
        raise MemoryError

    monkeypatch.setattr(generator.LeanGenerationBatch, "pending", pending)
    reference = Reference(model_folder())
    engine = start_engine(make_engine=FailingEngine)
    prompts = texts(2)
    jobs = [submit(engine, p, max_tokens=40) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 40)
    assert failed


@pytest.mark.parametrize("max_tokens, n_resumed", [(11, 0), (12, 1)])
def test_row_that_has_to_wait_may_end_with_the_token_that_is_known(
    max_tokens, n_resumed, model_folder, start_engine, monkeypatch
):
    class OutgrowsOnce(Watched):
        n_preempted = 0

        def outgrows_memory(self, beside):
            return bool(self.rows) and self.newest.n_generated == 10

        def preempt(self, request):
            self.n_preempted += 1
            super().preempt(request)

    class ShortEngine(Engine):
        batch_class = OutgrowsOnce

    # A GPU is a step ahead.
    monkeypatch.setattr(generator, "on_cpu", lambda: False)
    reference = Reference(model_folder())
    engine = start_engine(make_engine=ShortEngine)
    job = submit(engine, "hello", max_tokens=max_tokens)
    assert read(job) == reference.tokens("hello", max_tokens)
    wait_until_idle(engine)
    batch = engine.batch
    assert (batch.n_preempted, len(batch.resumed)) == (1, n_resumed)
    assert len(batch.generator.generation_batch) == 0
    assert job.forgotten


def test_row_whose_kv_was_evicted_runs_all_its_tokens_again(start_engine):
    argv = "--use-prompt-cache", "--radix-cache-size", "1", *memory_of(3, 512)
    engine = start_engine("llama", *argv, make_engine=WatchedEngine)
    body = {"max_tokens": 300, "logit_bias": {i: -100 for i in range(3)}}
    jobs = [submit(engine, "x" * 240, **body) for _ in range(4)]
    answers = [read(job) for job in jobs]
    assert answers == answers[:1] * 4
    assert {n_run for _, n_run in engine.batch.resumed} == {0}


@pytest.mark.logs_errors
def test_row_that_cannot_be_put_back_costs_no_other_its_answer(
    model_folder, start_engine, monkeypatch
):
    """Memory is short then, so that the KV that is to be kept may get none."""
    failed = []

    def remove(self, requests):
        original(self, requests)
        if len(failed) < 2:
            failed.append(requests)
            raise MemoryError

    original = Watched.remove
    monkeypatch.setattr(Watched, "remove", remove)
    bias = {i: -100 for i in range(3)}
    processors = make_logits_processors(bias)
    reference = Reference(model_folder(), logits_processors=processors)
    engine = start_engine("llama", *memory_of(2, 1024), make_engine=WatchedEngine)
    prompts = [(text * 240)[:240] for text in texts(2)]
    jobs = [submit(engine, p, max_tokens=900, logit_bias=bias) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 900)
    assert failed


def test_sampled_rows_go_on_with_the_same_tokens(start_engine):
    body = {"max_tokens": 300, "temperature": 1, "repetition_penalty": 1.2}
    body["logit_bias"] = {i: -100 for i in range(3)}
    prompts = [(text * 240)[:240] for text in texts(4)]
    answers = []
    for n_rows in (100, 3):
        engine = start_engine(
            "llama", *memory_of(n_rows, 512), make_engine=WatchedEngine
        )
        jobs = [submit(engine, p, seed=i, **body) for i, p in enumerate(prompts)]
        answers.append([read(job) for job in jobs])
        assert bool(engine.batch.resumed) == (n_rows == 3)
    assert answers[0] == answers[1]


def test_spare_rows_of_windows_count_like_those_of_other_layers(tmp_path, start_engine):
    # A row of a window takes as much as is predicted.
    config = CONFIGS["gemma3_text"] | {"sliding_window": 225}
    folder = write_model(tmp_path / "model", "gemma3_text", config)
    limit = KVMemory(Reference(folder).model).nbytes(1, 2048)
    argv = "--model", str(folder), "--max-kv-bytes", str(limit)
    engine = start_engine("llama", *argv, make_engine=WatchedEngine)
    body = {"logit_bias": {i: -100 for i in range(3)}}
    lengths = 1900, 20
    jobs = [submit(engine, "x" * 100, max_tokens=n, **body) for n in lengths]
    assert [len(read(job)) for job in jobs] == [*lengths]
    assert engine.batch.most_of_rows <= limit


def test_last_row_has_all_the_memory(start_engine):
    engine = start_engine("llama", *memory_of(1, 1024), make_engine=WatchedEngine)
    body = {"max_tokens": 4000, "logit_bias": {i: -100 for i in range(3)}}
    jobs = [submit(engine, "x" * n, **body) for n in (24, 1000, 100)]
    assert [len(read(job)) for job in jobs] == [1000, 24, 924]
    assert engine.batch.most_bytes <= 1024 * TOKEN


def test_no_more_requests_run_than_fit(model_folder, start_engine):
    reference = Reference(model_folder())
    engine = start_engine("llama", *memory_of(3, 512), make_engine=WatchedEngine)
    prompts = texts(9)
    jobs = [submit(engine, p, max_tokens=300) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 300)
    assert engine.batch.most_rows == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "lengths, cap",
    [
        ((200, 56), 0),
        ((5, 250), 0),
        ((None, None), 0),
        # An answer takes as many tokens as its prompt, so that many run at a time.
        ((200, None), 4000),
        ((100, None), 4000),
        ((None, None), 4000),
    ],
    ids=str,
)
def test_batch_that_rows_join_and_leave_stays_within_the_limit(
    lengths, cap, start_engine
):
    all_submitted = Event()

    class Held(Watched):
        def step(self):
            assert all_submitted.wait(60)
            super().step()

    class HeldEngine(Engine):
        batch_class = Held

    memory = memory_of(20, 512)
    argv = [*memory, "--prefill-step-size", "256"]
    engine = start_engine("llama", *argv, plugin=ENDS, make_engine=HeldEngine)
    rng = random.Random(0)
    jobs = []
    for _ in range(60):
        n_prompt, n_tokens = lengths
        n_prompt = n_prompt or rng.randint(1, 500)
        body = {"max_tokens": cap or n_tokens or rng.randint(1, 300)}
        # Only its length ends an answer, or a sampler that no cap tells of.
        body["logit_bias"] = {i: -100 for i in range(3)}
        body |= {"sampler": "ends"} if cap else {}
        jobs.append(submit(engine, "".join(rng.choices(LETTERS, k=n_prompt)), **body))
    all_submitted.set()
    for job in jobs:
        read(job)
    limit = 20 * 512 * TOKEN
    assert engine.batch.most_bytes <= limit
    # For an answer whose end is not known, two steps of the arrays are reserved beside
    # the one that it takes, and the batch is never quite full.
    assert engine.batch.most_bytes > limit / (4 if cap else 2)


def test_prompt_that_can_never_fit_is_told_why(start_engine):
    engine = start_engine("llama", *memory_of(1, 512))
    with pytest.raises(RequestError) as error:
        read(submit(engine, "x" * 512, max_tokens=1))
    assert error.value.status == 400
    assert error.value.param == "prompt"
    assert error.value.code == "context_length_exceeded"
    assert str(error.value) == (
        "the KV of 512 tokens of prompt and one of the answer takes 0.4 MB, and the "
        "server has 0.3 MB (--max-kv-bytes)"
    )
    assert len(read(submit(engine, "x" * 511, max_tokens=500))) == 1
