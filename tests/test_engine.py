"""The generation thread: batches, order, cancellation, and steps that fail."""

import threading
import weakref

import mlx.core as mx
import pytest
from helpers import (
    ALONE,
    Reference,
    plugin,
    read,
    submit,
    texts,
    wait_until_idle,
)
from mlx_lm.generate import StopSequences
from tiny_models import CONFIGS

from mlx_lm_ext import hookimpl
from mlx_lm_ext.batch import batch_sampling
from mlx_lm_ext.batch import generator as _upstream
from mlx_lm_ext.batch import logprobs
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.batch.resumed import ResumedStopSequences
from mlx_lm_ext.device import on_cpu
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import SchedulerPolicy
from mlx_lm_ext.sampling.default import DefaultSampler


@pytest.mark.parametrize("is_eager", [True, False])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_batched_tokens_equal_those_of_generate(
    architecture, is_eager, model_folder, start_engine, monkeypatch
):
    # On a GPU, which is a step ahead, and on the CPU.
    monkeypatch.setattr(_upstream, "on_cpu", lambda: is_eager)
    reference = Reference(model_folder(architecture))
    engine = start_engine(architecture, "--batch-size", "12")
    prompts = texts(32)
    jobs = [submit(engine, p, max_tokens=40) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 40)


def test_requests_join_and_leave_a_running_batch(model_folder, start_engine):
    expected = Reference(model_folder()).tokens("zq", 5)
    engine = start_engine()
    first = submit(engine, "a" * 50, max_tokens=4000)
    first.receive(timeout=60)
    second = submit(engine, "zq", max_tokens=5)
    assert read(second) == expected
    assert not first.finished
    engine.client.cancel(first)


def test_rows_with_and_without_log_probabilities_share_a_batch(
    model_folder, start_engine
):
    reference = Reference(model_folder())
    engine = start_engine()
    plain = submit(engine, "a" * 50, max_tokens=60)
    tokens = plain.receive(timeout=60)
    wanting = submit(engine, "zq", max_tokens=5, logprobs=True, top_logprobs=3)
    sampled = submit(engine, "zq", max_tokens=5, temperature=1.0, seed=0)
    expected = reference.responses("zq", 5)
    events = []
    while not events or events[-1].finish_reason is None:
        events += wanting.receive(timeout=60)
    assert [e.id for e in events] == [r.token for r in expected]
    assert [e.logprob for e in events] == pytest.approx(
        [r.logprobs[r.token].item() for r in expected], abs=1e-4
    )
    assert all(len(e.top) == 3 for e in events)
    assert len(read(sampled)) == 5
    rest = [t.id for t in tokens] + read(plain)
    assert rest == reference.tokens("a" * 50, 60)


def test_batch_never_exceeds_its_size(start_engine):
    class Watched(Engine):
        largest = 0

        def step(self):
            self.largest = max(self.largest, len(self.running))
            super().step()

    engine = start_engine("llama", "--batch-size", "3", make_engine=Watched)
    for job in [submit(engine, p, max_tokens=8) for p in texts(10)]:
        read(job)
    assert engine.largest == 3


def test_cancelled_request_leaves_at_the_next_step(start_engine):
    class Watched(Engine):
        left = threading.Event()

        def drop_unwanted(self):
            before = len(self.running)
            super().drop_unwanted()
            if len(self.running) < before:
                self.left_at = self.batch.n_steps
                self.left.set()

    engine = start_engine(make_engine=Watched)
    job = submit(engine, "hello", max_tokens=4000)
    job.receive(timeout=60)
    cancelled_at = engine.batch.n_steps
    engine.client.cancel(job)
    assert engine.left.wait(60)
    assert engine.left_at - cancelled_at <= 1


def test_waiting_request_that_is_cancelled_never_starts(start_engine):
    started = []

    class RecordingBatch(Batch):
        def add(self, request):
            started.append(request)
            super().add(request)

    class RecordingEngine(Engine):
        batch_class = RecordingBatch

    engine = start_engine("llama", "--batch-size", "1", make_engine=RecordingEngine)
    first = submit(engine, "hello", max_tokens=4000)
    second = submit(engine, "there", max_tokens=4000)
    third = submit(engine, "you", max_tokens=2)
    engine.client.cancel(second)
    engine.client.cancel(first)
    assert len(read(third)) == 2
    assert second not in started


class FaultyPlugin:
    """Requests for 13 tokens have a logits processor that raises."""

    @hookimpl
    def mlx_lm_make_logits_processors(self, request):
        def process(tokens, logits):
            raise ArithmeticError("a fault of this request")

        return [process] if request.max_tokens == 13 else None


@pytest.mark.logs_errors
@pytest.mark.parametrize("culprits", [[0], [3], [2, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_failed_step_costs_only_the_requests_at_fault(
    culprits, model_folder, start_engine
):
    reference = Reference(model_folder())
    engine = start_engine(plugin=FaultyPlugin())
    prompts = texts(8)
    lengths = [13 if i in culprits else 40 for i in range(8)]
    jobs = [submit(engine, p, max_tokens=n) for p, n in zip(prompts, lengths)]
    for i, (prompt, job) in enumerate(zip(prompts, jobs)):
        if i in culprits:
            with pytest.raises(RequestError) as error:
                read(job)
            assert error.value.status == 500
        else:
            assert read(job) == reference.tokens(prompt, 40)
    assert read(submit(engine, "after", max_tokens=4)) == reference.tokens("after", 4)


@pytest.mark.logs_errors
def test_rows_that_fail_only_together_end_in_smaller_batches(
    model_folder, start_engine
):
    class SmallBatch(Batch):
        def step(self):
            if len(self) > 3:
                raise MemoryError("too many rows")
            return super().step()

    class SmallEngine(Engine):
        batch_class = SmallBatch
        failures = 0

        def recover(self, error):
            self.failures += 1
            super().recover(error)

    reference = Reference(model_folder())
    engine = start_engine(make_engine=SmallEngine)
    prompts = texts(8)
    jobs = [submit(engine, p, max_tokens=12) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 12)
    # Not one for each of the 12 tokens.
    assert engine.failures < 8


@pytest.fixture
def sampled_rows(monkeypatch):
    """How many rows each call of the default sampler had, so far."""
    calls = []
    sample = DefaultSampler.__call__

    def watched(self, logits):
        calls.append(logits.shape[0])
        return sample(self, logits)

    monkeypatch.setattr(DefaultSampler, "__call__", watched)
    return calls


@pytest.mark.skipif(not on_cpu(), reason="a GPU is a step ahead")
def test_each_step_on_the_cpu_gives_the_token_that_it_makes(start_engine, sampled_rows):
    read(submit(start_engine(), "hello", max_tokens=5))
    assert sampled_rows == [1] * 5


def test_new_row_has_no_step_of_its_own_on_a_gpu(
    start_engine, model_folder, sampled_rows, monkeypatch
):
    monkeypatch.setattr(_upstream, "on_cpu", lambda: False)
    reference = Reference(model_folder())
    engine = start_engine()
    *others, prompt = texts(3)
    jobs = [submit(engine, p, max_tokens=3000) for p in others]
    for job in jobs:
        job.receive(timeout=60)
    assert read(submit(engine, prompt, max_tokens=12)) == reference.tokens(prompt, 12)
    assert set(sampled_rows[sampled_rows.index(2) :]) == {2, 3}
    assert sampled_rows.count(3) == 12
    for job in jobs:
        engine.client.cancel(job)


def test_log_probabilities_are_made_only_of_the_rows_that_ask(
    start_engine, monkeypatch
):
    shapes = []

    class Watched(logprobs.Logprobs):
        def __init__(self, logits, tokens, n_top):
            shapes.append((logits.shape[0], n_top))
            super().__init__(logits, tokens, n_top)

    monkeypatch.setattr(batch_sampling, "Logprobs", Watched)
    engine = start_engine()
    others = [submit(engine, p, max_tokens=3000) for p in texts(3)]
    for other in others:
        other.receive(timeout=60)
    assert not shapes
    read(submit(engine, "hello", max_tokens=5, logprobs=3))
    assert set(shapes) == {(1, 3)} and 5 <= len(shapes) <= 7
    for other in others:
        engine.client.cancel(other)


def test_whole_answer_wakes_its_handler_now_and_then(start_engine):
    job = submit(start_engine(), "hello", max_tokens=320)
    job.reads_each = False
    batches = [job.receive(timeout=60)]
    while batches[-1][-1].finish_reason is None:
        batches.append(job.receive(timeout=60))
    # A few came before this thread had said so.
    assert sum(map(len, batches)) > 10 * len(batches)


def test_stop_token_is_found_after_a_failed_step():
    matcher = ResumedStopSequences(StopSequences([(1, 2, 3)]), [9, 1, 2]).matcher()
    assert matcher.advance(3)


@pytest.mark.parametrize("is_eager", [True, False])
def test_row_that_goes_on_stops_at_the_rest_of_a_stop_sequence(is_eager, monkeypatch):
    monkeypatch.setattr(_upstream, "on_cpu", lambda: is_eager)

    class Always2:
        group = None

        def __call__(self, logits):
            return mx.full(logits.shape[:1], 2)

    batch = _upstream.LeanGenerationBatch(
        model=lambda inputs, cache: mx.zeros((*inputs.shape, 4)),
        uids=[0],
        inputs=mx.array([1]),
        prompt_cache=[],
        tokens=[[3]],
        samplers=[batch_sampling.RowSampling(Always2())],
        fallback_sampler=None,
        logits_processors=[[]],
        stop_sequences=[ResumedStopSequences(StopSequences([(1, 2)]), [1])],
        max_tokens=[9],
    )
    responses = batch.next() or batch.next()
    assert [(r.token, r.finish_reason) for r in responses] == [(2, "stop")]


@pytest.mark.parametrize(
    "architecture, argv",
    [
        ("llama", ALONE),
        ("llama", ["--draft-model", "SAME"]),
        ("llama4", []),
    ],
)
def test_what_upstream_serves_alone_is_served_alone(
    architecture, argv, model_folder, start_engine
):
    folder = model_folder(architecture)
    reference = Reference(folder)
    argv = [str(folder) if a == "SAME" else a for a in argv]
    engine = start_engine(architecture, *argv)
    jobs = [submit(engine, p, max_tokens=10) for p in texts(3)]
    for prompt, job in zip(texts(3), jobs):
        assert read(job) == reference.tokens(prompt, 10)
    assert engine.batch is None


def test_request_alone_waits_for_the_batch_and_keeps_the_order(
    model_folder, start_engine
):
    folders = [str(model_folder(a)) for a in ("llama", "llama4")]
    references = [Reference(folder) for folder in folders]
    engine = start_engine("llama", "--allow-models", "any")
    which = [0, 0, 1, 0, 1]
    prompts = texts(5)
    jobs = [
        submit(engine, p, max_tokens=20, model=folders[i])
        for p, i in zip(prompts, which)
    ]
    for prompt, job, i in zip(prompts, jobs, which):
        assert read(job) == references[i].tokens(prompt, 20)
    starts = [job.started for job in jobs]
    assert starts == sorted(starts)


def test_request_alone_can_be_cancelled(start_engine):
    engine = start_engine("llama", *ALONE)
    job = submit(engine, "hello", max_tokens=4000)
    job.receive(timeout=60)
    engine.client.cancel(job)
    assert len(read(submit(engine, "next", max_tokens=3))) == 3
    assert len(job.generated) < 4000


def test_other_models_are_loaded_when_asked_for(model_folder, start_engine):
    engine = start_engine("llama", "--allow-models", "any")
    folder = str(model_folder("lfm2"))
    jobs = [
        submit(engine, "hello", max_tokens=10, model=m)
        for m in ("default_model", folder, "default_model", folder)
    ]
    answers = [read(job) for job in jobs]
    llama, lfm2 = (
        Reference(model_folder(a)).tokens("hello", 10) for a in ("llama", "lfm2")
    )
    assert answers == [llama, lfm2, llama, lfm2]


def test_wrong_model_is_refused_and_the_running_one_stays(start_engine, tmp_path):
    engine = start_engine("llama", "--allow-models", "any")
    running = submit(engine, "hello", max_tokens=300)
    running.receive(timeout=60)
    model = engine.model_provider.model
    for body in (
        {"model": "nobody/nothing"},
        {"model": str(tmp_path)},
        {"model": str(tmp_path / "missing")},
        {"adapters": str(tmp_path / "missing")},
        {"draft_model": "nobody/nothing"},
        {"adapters": str(tmp_path)},
        {"draft_model": str(tmp_path)},
    ):
        with pytest.raises(RequestError) as error:
            submit(engine, "hello", **body)
        assert error.value.status == 404
        assert error.value.param == list(body)[0]
        if "model" in body:
            assert "served is " in str(error.value)
        if "missing" in str(body):
            assert "there is no such folder" in str(error.value)
    assert engine.model_provider.model is model
    engine.client.cancel(running)


def test_model_that_cannot_be_loaded_costs_only_its_request(
    start_engine, model_folder, tmp_path
):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder() / name).read_bytes())
    engine = start_engine("llama", "--allow-models", "any")
    with pytest.raises(RequestError, match="cannot be loaded"):
        read(submit(engine, "hello", model=str(tmp_path)))
    expected = Reference(model_folder()).tokens("hello", 5)
    assert read(submit(engine, "hello", max_tokens=5)) == expected


@pytest.mark.logs_errors
def test_arrays_of_a_failed_step_are_freed_before_its_requests_run_again(start_engine):
    """Otherwise a step that fails for lack of memory leaves even less to the next ones."""

    class Large:
        pass

    class FailsOnce(Batch):
        def step(self):
            if len(self) == 2 and not references:
                large = Large()
                references.append(weakref.ref(large))
                raise MemoryError("once")
            return super().step()

        def add(self, request):
            if references:
                freed.append(references[0]() is None)
            super().add(request)

    class FailingEngine(Engine):
        batch_class = FailsOnce

    references, freed = [], []
    engine = start_engine(make_engine=FailingEngine)
    for job in [submit(engine, p, max_tokens=5) for p in texts(2)]:
        read(job)
    assert freed and all(freed)


@pytest.mark.logs_errors
def test_requests_of_a_failed_step_run_all_their_tokens_again(
    start_engine, model_folder
):
    """The KV in the prompt cache may have made it fail."""

    class FailsOnce(Batch):
        def step(self):
            if len(self) == 2 and not failures:
                failures.append(len(self))
                raise MemoryError("once")
            return super().step()

        def add(self, request):
            super().add(request)
            row = self.rows[max(self.rows)]
            n_kept.append((row.n_run > 0, request.is_suspect))

    class FailingEngine(Engine):
        batch_class = FailsOnce

    failures, n_kept = [], []
    engine = start_engine("llama", "--use-prompt-cache", make_engine=FailingEngine)
    reference = Reference(model_folder())
    prompts = [text * 10 for text in texts(2)]
    for prompt in prompts:
        read(submit(engine, prompt, max_tokens=1))
    jobs = [submit(engine, prompt, max_tokens=10) for prompt in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 10)
    assert n_kept[2:4] == [(True, False)] * 2
    assert set(n_kept[4:]) == {(False, True)}


@pytest.mark.logs_errors
def test_step_whose_log_probabilities_cannot_be_read_loses_no_token(
    start_engine, model_folder, monkeypatch
):
    def row(self, i, n_top):
        calls.append(i)
        if len(calls) == 8:
            raise ArithmeticError("once")
        return row_of(self, i, n_top)

    calls, row_of = [], logprobs.Logprobs.row
    monkeypatch.setattr(logprobs.Logprobs, "row", row)
    reference = Reference(model_folder())
    engine = start_engine()
    jobs = [submit(engine, p, max_tokens=10, logprobs=1) for p in texts(3)]
    for prompt, job in zip(texts(3), jobs):
        assert read(job) == reference.tokens(prompt, 10)
    assert len(calls) > 8


@pytest.mark.logs_errors
def test_request_that_cannot_be_taken_out_while_others_are_isolated_holds_up_nobody(
    start_engine, model_folder
):
    class Clinging(Batch):
        def step(self):
            if len(self) == 4 and not failures:
                failures.append("step")
                raise MemoryError("once")
            super().step()

        def add(self, request):
            super().add(request)
            if request is jobs[1] and failures == ["step"]:
                engine.client.cancel(request)

        def remove(self, requests):
            if jobs[1] in requests and failures == ["step"]:
                failures.append("remove")
                raise ArithmeticError("it cannot be taken out")
            super().remove(requests)

    class ClingingEngine(Engine):
        batch_class = Clinging

        def take_new(self, block):
            gate.wait(60)
            super().take_new(block)

    gate, failures, reference = threading.Event(), [], Reference(model_folder())
    engine = start_engine(make_engine=ClingingEngine)
    jobs = [submit(engine, p, max_tokens=20) for p in texts(4)]
    gate.set()
    for i in (0, 2, 3):
        assert read(jobs[i]) == reference.tokens(texts(4)[i], 20)
    assert failures == ["step", "remove"] and jobs[1].forgotten


@pytest.mark.logs_errors
def test_request_that_ended_before_its_step_failed_has_ended(start_engine):
    class FailsInPrefill(Batch):
        def prefill(self, *args):
            if self.requests and first.finished and not failures:
                failures.append(True)
                raise ArithmeticError("once")
            super().prefill(*args)

    class WatchedEngine(Engine):
        batch_class = FailsInPrefill

    failures = []
    argv = ["--prefill-step-size", "8", "--prefill-budget", "8"]
    engine = start_engine("llama", *argv, make_engine=WatchedEngine)
    first = submit(engine, "a", max_tokens=30)
    second = submit(engine, "x" * 600, max_tokens=2)
    assert len(read(first)) == 30
    with pytest.raises(RequestError):
        read(second)
    wait_until_idle(engine)
    assert failures and first.forgotten and engine.counters.generated_tokens == 30


@pytest.mark.logs_errors
def test_policy_hears_of_the_end_although_a_row_cannot_be_taken_out(start_engine):
    class Hearing(SchedulerPolicy):
        name = "hearing"
        ended = []

        def on_finish(self, request):
            self.ended.append(request)

    class Clinging(Batch):
        def remove(self, requests):
            if job in requests and not failures:
                failures.append(True)
                raise ArithmeticError("it cannot be taken out")
            super().remove(requests)

    class ClingingEngine(Engine):
        batch_class = Clinging

    hook = plugin(mlx_lm_register_scheduler_policies=lambda: [Hearing])
    argv = ["llama", "--scheduler", "hearing"]
    engine = start_engine(*argv, make_engine=ClingingEngine, plugin=hook)
    failures = []
    other, job = (submit(engine, p, max_tokens=3000) for p in texts(2))
    job.receive(timeout=60)
    engine.client.cancel(job)
    read(submit(engine, "after", max_tokens=2))
    assert failures and job in Hearing.ended and not other.finished
    # At the end, the policy hears of those that ran.
    engine.stop_and_join()
    assert sorted(Hearing.ended.count(r) for r in (job, other)) == [1, 1]


@pytest.mark.parametrize("argv", [ALONE, ["--batch-size", "1"]])
def test_stopping_ends_every_request(argv, start_engine):
    engine = start_engine("llama", *argv)
    jobs = [submit(engine, p, max_tokens=3000) for p in texts(3)]
    jobs[0].receive(timeout=60)
    engine.stop_and_join()
    for job in jobs:
        with pytest.raises(RequestError, match="stopping"):
            read(job)
    with pytest.raises(RequestError, match="stopping"):
        submit(engine, "late")
