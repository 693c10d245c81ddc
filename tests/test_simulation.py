"""The engine on a model that takes simulated time: its clock moves by what is run.

A token of a step, padding included, takes a millisecond, and no thread sleeps.
"""

import math
import random
import threading
from collections import Counter

import mlx.core as mx
import pytest
from helpers import read, submit
from mlx import nn
from mlx_lm.models.cache import KVCache

from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.policies.scheduling import POLICIES
from mlx_lm_ext.request.request import NO_TIME

# None of them ends an answer.
FIRST, N_TOKENS = 10, 90
TOKEN_TIME = 0.001
BUDGET, LIMIT = 32, 128


class CountingModel(nn.Module):
    """After token n comes token n + 1."""

    def __init__(self, simulation):
        super().__init__()
        self.simulation = simulation

    def make_cache(self):
        return [KVCache()]

    def __call__(self, inputs, cache):
        self.simulation.run(*inputs.shape)
        x = inputs[:, None, :, None].astype(mx.float32)
        cache[0].update_and_fetch(x, x)
        return mx.eye(FIRST + N_TOKENS)[FIRST + (inputs + 1 - FIRST) % N_TOKENS]


class Simulation:
    """Starts an engine that runs the arrivals in simulated time.

    Args:
        arrivals (List[Tuple]): Seconds, prompt and body of each request, in order.
        cancels (Dict[int, float]): When some of them are cancelled.
    """

    def __init__(self, start_engine, arrivals, *argv, cancels={}):
        self.now = 0.0
        self.arrivals, self.cancels = arrivals, cancels
        self.jobs, self.ended, self.end_times = [], Counter(), {}
        self.over = threading.Event()
        # (rows, tokens of each, whether a stream had begun) of each prefill.
        self.prefills = []
        simulation = self

        class SimulatedEngine(Engine):
            def take_new(self, block):
                if hasattr(simulation, "engine"):
                    simulation.arrive(block)
                super().take_new(block)

            def forget(self, request):
                simulation.ended[request] += not request.forgotten
                simulation.end_times.setdefault(request, simulation.now)
                super().forget(request)

        flags = f"--prefill-budget {BUDGET} --prefill-step-size {LIMIT}".split()
        engine = start_engine(
            "llama",
            *flags,
            *argv,
            make_engine=SimulatedEngine,
            clock=lambda: self.now,
        )
        engine.model_provider.model = CountingModel(self)
        self.engine = engine
        engine.inbox.requests.put(None)
        assert self.over.wait(60)
        engine.stop_and_join()

    def arrive(self, idle):
        """Send and cancel what is due; an idle engine skips to the next arrival."""
        while len(self.jobs) < len(self.arrivals):
            when, prompt, body = self.arrivals[len(self.jobs)]
            if when > self.now and not idle:
                break
            idle, self.now = False, max(self.now, when)
            self.jobs.append(submit(self.engine, prompt, **body))
        for i, when in self.cancels.items():
            if i < len(self.jobs) and when <= self.now:
                self.engine.client.cancel(self.jobs[i])
        if idle:
            self.over.set()

    def run(self, n_rows, width):
        self.now += n_rows * width * TOKEN_TIME
        if width > 1:
            begun = any(r.n_generated for r in self.engine.batch.requests)
            self.prefills.append((n_rows, width, begun))


def prompt(rng, n):
    """``n`` tokens that have nothing in common with those of other prompts."""
    return [rng.randrange(FIRST, FIRST + N_TOKENS) for _ in range(n)]


def expected(job):
    start = job.prompt[-1] + 1 - FIRST
    return [FIRST + (start + i) % N_TOKENS for i in range(job.max_tokens)]


def random_arrivals(rng, n=60):
    """More come than can be served, for a while."""
    when, arrivals = 0.0, []
    for _ in range(n):
        when += rng.expovariate(8.0)
        body = dict(
            max_tokens=rng.randint(1, 30),
            priority=rng.randint(-2, 2),
            user=rng.choice("abc"),
        )
        arrivals.append((when, prompt(rng, rng.randint(1, 400)), body))
    return arrivals


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("cache", [[], ["--use-prompt-cache"]])
def test_every_request_ends_once_with_its_tokens(policy, cache, start_engine):
    rng = random.Random(policy.name)
    arrivals = random_arrivals(rng)
    cancels = {i: arrivals[i][0] + rng.uniform(0, 2) for i in rng.sample(range(60), 15)}
    flags = ["--scheduler", policy.name, "--max-wait", "1", *cache]
    done = Simulation(start_engine, arrivals, *flags, cancels=cancels)
    assert len(done.jobs) == 60
    assert set(done.ended.values()) == {1} and len(done.ended) == 60
    for job in done.jobs:
        if not job.cancelled:
            assert read(job) == expected(job)
        assert job.generated == expected(job)[: len(job.generated)]
    assert 5 < sum(not job.finished for job in done.jobs) <= 15
    for n_rows, width, begun in done.prefills:
        assert n_rows * width <= (BUDGET if begun else LIMIT)
    assert any(begun for *_, begun in done.prefills)


def test_a_prompt_and_the_streams_beside_it_both_go_on(start_engine):
    """The prefill gets its budget in each step, and each stream gets its token."""
    rng = random.Random(0)
    arrivals = [(0.0, prompt(rng, 5), dict(max_tokens=200)) for _ in range(4)]
    arrivals.append((0.1, prompt(rng, 1 + 50 * BUDGET), dict(max_tokens=1)))
    done = Simulation(start_engine, arrivals)
    late = done.jobs[-1]
    step = (BUDGET + 4) * TOKEN_TIME
    # And one step of its own, in which it joins.
    assert late.first_token - late.started <= 52 * step
    late_prefills = [p for p in done.prefills if p[2]]
    assert late_prefills == [(1, BUDGET, True)] * 50
    assert all(job.first_token < late.started for job in done.jobs[:4])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sjf", "priority"])
def test_no_load_keeps_a_request_waiting_beyond_the_bound(name, start_engine):
    rng = random.Random(0)
    worst = (0.01, prompt(rng, 300), dict(max_tokens=100, priority=9))
    better = [(i * 0.02, prompt(rng, 10), dict(max_tokens=20)) for i in range(300)]
    arrivals = [better[0], worst, *better[1:]]
    flags = ["--scheduler", name, "--max-wait", "3", "--batch-size", "1"]
    done = Simulation(start_engine, arrivals, *flags)
    waited = done.jobs[1].started - done.jobs[1].arrival
    # And the time that the one before it takes.
    assert 3 <= waited <= 3 + (10 + 20) * TOKEN_TIME


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_request_past_its_time_leaves_at_the_next_step(batch_size, start_engine):
    rng = random.Random(0)
    arrivals = [(t, prompt(rng, 300), dict(max_tokens=3000)) for t in (0.0, 1.0)]
    flags = ["--request-timeout", "1.5", "--batch-size", batch_size]
    done = Simulation(start_engine, arrivals, *flags)
    for job in done.jobs:
        *_, last = job.answers.receive(timeout=60)[job]
        assert last == NO_TIME
        assert 1.5 <= done.end_times[job] - job.arrival <= 1.5 + 2 * TOKEN_TIME


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_request_that_waits_past_its_time_never_starts(batch_size, start_engine):
    rng = random.Random(0)
    arrivals = [(0.0, prompt(rng, 300), dict(max_tokens=n)) for n in (3000, 500)]
    flags = ["--request-timeout", "1.5", "--batch-size", batch_size]
    done = Simulation(start_engine, arrivals, *flags)
    assert 1.5 <= done.now <= 1.5 + 2 * TOKEN_TIME
    begun = [bool(job.generated) for job in done.jobs]
    assert begun == [True, batch_size == "2"]


@pytest.mark.logs_errors
def test_failed_step_leaves_the_others_their_time(start_engine, monkeypatch):
    def isolate(self, suspects, error):
        self.batch.close()
        # As after a look at the time of those that run apart.
        self.deadline = math.inf

    def step(self):
        if self.n_steps == 9:
            self.n_steps += 1
            raise ArithmeticError("a step failed")
        return original(self)

    original = Batch.step
    monkeypatch.setattr(Engine, "isolate", isolate)
    monkeypatch.setattr(Batch, "step", step)
    arrivals = [(t, prompt(random, 30), dict(max_tokens=3000)) for t in (0.0, 0.1)]
    done = Simulation(start_engine, arrivals, "--request-timeout", "1.5")
    for job in done.jobs:
        assert 1.5 <= done.end_times[job] - job.arrival <= 1.5 + 2 * TOKEN_TIME
