"""Requests that wait for a prefix which another one is running."""

import random
import threading

import integrity
import pytest
from helpers import Reference, read, submit, texts, wait_until_idle
from tiny_models import CONFIGS

from mlx_lm_ext.batch import sharing
from mlx_lm_ext.batch.batch import MIN_SHARED, Batch
from mlx_lm_ext.cache.tree import n_common
from mlx_lm_ext.engine.loop import Engine

PREFIX = texts(1, seed=21)[0] * 2
STEPS = ["--prefill-step-size", "16"]


@pytest.fixture
def start_together(start_engine):
    """Starts an engine that runs nothing before its gate is open."""

    def start(architecture, *argv, **members):
        class Gated(Engine):
            gate = threading.Event()
            batch_class = type("Watched", (Batch,), members)

            def take_new(self, block):
                self.gate.wait(60)
                super().take_new(block)

        engine = start_engine(architecture, *STEPS, *argv, make_engine=Gated)
        engines.append(engine)
        return engine

    engines = []
    yield start
    for engine in engines:
        engine.gate.set()


def n_run(jobs):
    """How many tokens of prompts were run in all."""
    return sum(job.n_prompt - job.n_matched for job in jobs)


@pytest.mark.parametrize("cache", [[], ["--use-prompt-cache"]])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_prompts_that_come_at_once_run_their_prefix_once(
    architecture, cache, model_folder, start_together
):
    reference = Reference(model_folder(architecture))
    engine = start_together(architecture, *cache)
    prompts = [PREFIX + end for end in ("1 end", "2 or another", "3", "4th")]
    jobs = [submit(engine, p, max_tokens=10) for p in prompts]
    engine.gate.set()
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 10)
    assert n_run(jobs) == len(PREFIX) + sum(len(p) - len(PREFIX) for p in prompts)
    wait_until_idle(engine)
    integrity.check(engine.batch.prompt_cache)
    if not cache:
        assert engine.batch.prompt_cache.nbytes == 0


@pytest.mark.parametrize("architecture", CONFIGS)
def test_same_prompt_of_several_is_run_once(architecture, model_folder, start_together):
    expected = Reference(model_folder(architecture)).tokens(PREFIX, 10)
    engine = start_together(architecture)
    jobs = [submit(engine, PREFIX, max_tokens=10) for _ in range(5)]
    engine.gate.set()
    for job in jobs:
        assert read(job) == expected
    # The last token has to run for each.
    assert n_run(jobs) == len(PREFIX) + 4


@pytest.mark.parametrize("architecture", ["llama", "falcon_h1"])
def test_without_a_cache_only_what_is_waited_for_is_kept(
    architecture, start_together, start_engine
):
    kept = []

    def step(self):
        kept.append(self.prompt_cache.nbytes)
        return Batch.step(self)

    engine = start_together(architecture, "--batch-size", "3", step=step)
    # Pairs that share a prefix: while some run, others wait.
    prefixes = [str(i) + PREFIX * 4 for i in range(12)]
    jobs = [submit(engine, p + end, max_tokens=3) for p in prefixes for end in "ab"]
    engine.gate.set()
    for job in jobs:
        read(job)
    assert sum(job.n_matched > 0 for job in jobs) > 4
    # No request keeps those before it in memory.
    assert not engine.batch.sharing.leaders and not engine.batch.sharing.n_shared
    cached = start_engine(architecture, "--use-prompt-cache")
    for job in jobs:
        read(submit(cached, job.completion.prompt, max_tokens=3))
    # No more than three pairs of the twelve have.
    assert 0 < max(kept) <= cached.prompt_cache.nbytes / 4


def test_other_prompts_do_not_wait(start_together):
    started = []

    def add(self, request):
        started.append((self.n_steps, request))
        Batch.add(self, request)

    engine = start_together("llama", "--prefill-step-size", "64", add=add)
    prompts = [PREFIX + "x", PREFIX + "y", "something else"]
    jobs = [submit(engine, p, max_tokens=3) for p in prompts]
    engine.gate.set()
    for job in jobs:
        read(job)
    assert [job for _, job in started] == [jobs[0], jobs[2], jobs[1]]
    assert started[0][0] == started[1][0] < started[2][0]


@pytest.mark.logs_errors
@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_next_takes_over_when_the_one_that_runs_the_prefix_leaves(
    architecture, how, model_folder, start_together
):
    reference = Reference(model_folder(architecture))

    def step(self):
        if self.n_steps == 1 and not jobs[0].finished:
            if how == "failed":
                jobs[0].args.max_tokens = 0
                raise ArithmeticError("a step failed")
            engine.client.cancel(jobs[0])
        return Batch.step(self)

    engine = start_together(architecture, step=step)
    prompts = [PREFIX + end for end in ("a", "bc", "de")]
    jobs = [submit(engine, p, max_tokens=10) for p in prompts]
    engine.gate.set()
    for prompt, job in list(zip(prompts, jobs))[1:]:
        assert read(job) == reference.tokens(prompt, 10)
    # What the cancelled one has run is kept: fewer are not worth a wait.
    assert jobs[2].n_matched > len(PREFIX) - MIN_SHARED


def test_other_salts_do_not_wait(start_together):
    def must_wait(self, request):
        waits.append(Batch.must_wait(self, request))
        return waits[-1]

    waits = []
    engine = start_together("llama", must_wait=must_wait)
    jobs = [submit(engine, PREFIX, max_tokens=3, cache_salt=s) for s in "ab"]
    engine.gate.set()
    for job in jobs:
        read(job)
    assert [job.n_matched for job in jobs] == [0, 0]
    assert waits and not any(waits)


def test_wait_is_over_when_the_common_prefix_is_run(start_together):
    def add(self, request):
        if request is jobs[1]:
            running.append(jobs[0] in [row.request for row in self.prefilling])
        Batch.add(self, request)

    running = []
    engine = start_together("llama", "--prefill-step-size", "64", add=add)
    prompts = [PREFIX + "x" * 100, PREFIX + "y"]
    jobs = [submit(engine, p, max_tokens=3) for p in prompts]
    engine.gate.set()
    for job in jobs:
        read(job)
    assert running == [True]
    assert jobs[1].n_matched == len(PREFIX)


def test_window_goes_on_after_a_step_of_one_token(model_folder, start_together):
    """A row that has wrapped and one that has not, in one batch of prompts."""
    reference = Reference(model_folder("gemma3_text"))
    prompts = ["a window is shorter than this prompt of a few words", "this one is not"]
    widths = iter([40, 1])
    engine = start_together(
        "gemma3_text",
        plan_prefill=lambda self: next(widths, 64),
        can_start=lambda self, *_: self.n_steps == len(self),
    )
    jobs = [submit(engine, p, max_tokens=5) for p in prompts]
    engine.gate.set()
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 5)


def test_lpm_knows_what_the_prompt_cache_has(start_engine):
    argv = ["--use-prompt-cache", "--batch-size", "1", "--scheduler", "lpm"]
    engine = start_engine("llama", *argv)
    read(submit(engine, PREFIX, max_tokens=2))
    first = submit(engine, "a", max_tokens=4000)
    first.receive(timeout=60)
    jobs = [submit(engine, p, max_tokens=2) for p in ("something else", PREFIX + "x")]
    engine.client.cancel(first)
    for job in jobs:
        read(job)
    assert jobs[1].started < jobs[0].started


def test_prefix_that_cannot_be_kept_is_waited_for_once(model_folder, start_together):
    def add(self, request):
        gave_up.append(request in self.sharing.gave_up)
        Batch.add(self, request)

    gave_up = []
    expected = Reference(model_folder()).tokens(PREFIX, 5)
    engine = start_together("llama", "--radix-cache-size", "1KB", add=add)
    jobs = [submit(engine, PREFIX, max_tokens=5) for _ in range(4)]
    engine.gate.set()
    for job in jobs:
        assert read(job) == expected
        assert job.n_matched == 0
    assert gave_up == [False, True, True, True]


def test_prompts_are_compared_once_however_long_they_wait(start_together, monkeypatch):
    compared = []

    def counted(run, tokens):
        compared.append((run, tokens))
        return n_common(run, tokens)

    monkeypatch.setattr(sharing, "n_common", counted)
    argv = ["--prefill-budget", "16", "--prompt-concurrency", "1"]
    engine = start_together("llama", *argv)
    jobs = [submit(engine, letter * 200, max_tokens=2) for letter in "abc"]
    engine.gate.set()
    for job in jobs:
        read(job)
    assert engine.batch.n_steps > 30
    # Each with those that were prefilling while it was the first to wait.
    assert len(compared) == 2


@pytest.mark.logs_errors
def test_cached_tokens_stay_those_that_were_taken_after_a_failed_step(start_together):
    """Before a request starts again, its scheduler policy asks what is known of its prompt:
    that is not what it took."""

    def step(self):
        if self.n_steps == 20:
            self.n_steps += 1
            # Because it comes, the policy is asked for an order.
            jobs.append(submit(engine, "another one", max_tokens=1))
            raise ArithmeticError("a step failed")
        return Batch.step(self)

    argv = ["--use-prompt-cache", "--scheduler", "lpm"]
    engine = start_together("llama", *argv, step=step)
    # The second one waits until the first has run the prompt, which is stored for it.
    jobs = [submit(engine, PREFIX, max_tokens=40) for _ in range(2)]
    engine.gate.set()
    for job in jobs:
        read(job)
    assert engine.batch.n_steps > 20
    assert [job.n_matched for job in jobs] == [0, len(PREFIX) - 1, 0]
    assert jobs[0].n_known == len(PREFIX) - 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("seed", range(2))
def test_tokens_equal_those_of_generate_whoever_comes_and_goes(
    architecture, seed, model_folder, start_engine
):
    """Random arrivals, cancellations and budgets over a few common prefixes."""
    rng = random.Random(f"{architecture} {seed}")
    reference = Reference(model_folder(architecture))
    argv = ["--prefill-step-size", str(rng.choice([7, 32, 200]))]
    argv += ["--prefill-budget", str(rng.choice([5, 20, 100]))]
    argv += ["--batch-size", str(rng.choice([3, 8])), "--prompt-concurrency", "3"]
    argv += ["--scheduler", rng.choice(["fcfs", "lpm", "sjf", "fair"])]
    argv += ["--use-prompt-cache"] * rng.randint(0, 1)
    engine = start_engine(architecture, *argv)
    prefixes = texts(3, longest=90, seed=seed)
    jobs = []
    for end in texts(24, longest=30, seed=100 + seed):
        prompt = rng.choice(prefixes)[: rng.randint(1, 90)] + end
        jobs.append((prompt, submit(engine, prompt, max_tokens=rng.randint(1, 25))))
        if rng.random() < 0.3:
            jobs[-1][1].receive(timeout=60)
        if rng.random() < 0.2:
            engine.client.cancel(rng.choice(jobs)[1])
    for prompt, job in jobs:
        if not job.cancelled:
            while not job.finished:
                job.receive(timeout=0.1)
            assert job.generated == reference.tokens(prompt, job.max_tokens)
    wait_until_idle(engine)
    integrity.check(engine.batch.prompt_cache)
