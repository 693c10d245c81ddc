"""Policies in use: what the core asks them, and what it does when one fails."""

import random
import re
import sys
import threading
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers import (
    ALONE,
    Always,
    Reference,
    only_error,
    plugin,
    read,
    submit,
    texts,
    wait_until_idle,
)
from processes import run_program

from mlx_lm_ext.engine.upstream import SingleGenerator
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import BatchSampler, EvictionPolicy, SchedulerPolicy
from mlx_lm_ext.policies import guarded_sampler
from mlx_lm_ext.policies.guarded_sampler import GuardedSampler
from mlx_lm_ext.policies.loading import SAMPLER
from mlx_lm_ext.policies.policy_class import PolicyClass
from mlx_lm_ext.sampling.groups import SamplerGroups

# Room for 600 tokens, of which a running request takes 256.
CACHE = ["--use-prompt-cache", "--radix-cache-size", str(600 * 512)]


@pytest.fixture
def start_with(start_engine):
    """Starts an engine with one policy of a plugin."""

    def start(cls, *argv):
        for interface, flag, hook in (
            (EvictionPolicy, "--eviction-policy", "eviction_policies"),
            (SchedulerPolicy, "--scheduler", "scheduler_policies"),
            (BatchSampler, "--sampler", "samplers"),
        ):
            if issubclass(cls, interface):
                p = plugin(**{f"mlx_lm_register_{hook}": lambda: [cls]})
                return start_engine("llama", flag, cls.name, *argv, plugin=p)

    return start


# Eviction


def test_expired_entries_leave_although_there_is_room(start_with):
    class Hours(EvictionPolicy):
        name = "hours"
        removed = threading.Event()
        entries = []

        def priority(self, entry):
            return entry.created

        def on_insert(self, entry):
            self.entries.append(entry)

        def on_remove(self, entry, reason):
            assert reason == "expired"
            self.removed.set()

        def expired(self, now):
            return self.entries

    engine = start_with(Hours, *CACHE)
    read(submit(engine, "a" * 60, max_tokens=1))
    # The engine looks when it has nothing left to do.
    assert Hours.removed.wait(60)
    wait_until_idle(engine)
    assert len(engine.prompt_cache) == 0


class Raising(EvictionPolicy):
    name = "raising"

    def priority(self, entry):
        raise ArithmeticError("no priority")


class Incomparable(EvictionPolicy):
    name = "incomparable"

    def priority(self, entry):
        return object()


@pytest.mark.logs_errors
@pytest.mark.parametrize("cls", [Raising, Incomparable])
def test_eviction_policy_that_fails_is_replaced(cls, start_with, caplog):
    engine = start_with(cls, *CACHE)
    for letter in "abcdef":
        read(submit(engine, letter * 120, max_tokens=1))
    wait_until_idle(engine)
    assert engine.prompt_cache.stats().evictions["evicted"] > 0
    assert only_error(caplog) == (
        f"The eviction policy '{cls.name}' of plugin 'test' (tests 0) failed; "
        "'lru' replaces it"
    )


# Scheduling


def test_order_of_a_policy_is_asked_for_when_someone_comes_or_leaves(start_with):
    class Counting(SchedulerPolicy):
        name = "counting"
        views = []

        def order(self, waiting, view):
            self.views.append((len(waiting), len(view.running), view.batch_size))

    engine = start_with(Counting, "--batch-size", "1")
    first = submit(engine, "a", max_tokens=4000)
    first.receive(timeout=60)
    jobs = [submit(engine, "b", max_tokens=2) for _ in range(2)]
    first.receive(timeout=60)
    engine.client.cancel(first)
    for job in jobs:
        read(job)
    assert Counting.views == [(1, 0, 1), (2, 0, 1), (1, 0, 1)]


def test_order_is_not_asked_for_while_nothing_changes(start_with, model_folder):
    class Counting(SchedulerPolicy):
        name = "patient"
        calls = []

        def order(self, waiting, view):
            self.calls.append(len(waiting))

    engine = start_with(Counting, "--allow-models", "any")
    first = submit(engine, "a", max_tokens=4000)
    first.receive(timeout=60)
    # There is room, but not for another model.
    other = submit(engine, "b", max_tokens=2, model=str(model_folder("lfm2")))
    while first.n_generated < 100:
        first.receive(timeout=60)
    engine.client.cancel(first)
    read(other)
    assert len(Counting.calls) <= 3


@pytest.mark.logs_errors
def test_scheduler_policy_hears_once_of_a_request_that_fails_alone(
    start_engine, monkeypatch
):
    class Counting(SchedulerPolicy):
        name = "counting"
        ended = []

        def on_finish(self, request):
            self.ended.append(request)

    def serve_single(self, queue, request, args, stream):
        queue.put(ArithmeticError("a fault of this request"))

    monkeypatch.setattr(SingleGenerator, "serve_single", serve_single)
    hook = plugin(mlx_lm_register_scheduler_policies=lambda: [Counting])
    argv = [*ALONE, "--scheduler", "counting"]
    engine = start_engine("llama", *argv, plugin=hook)
    job = submit(engine, "a", max_tokens=2)
    with pytest.raises(RequestError):
        read(job)
    engine.stop_and_join()
    assert Counting.ended == [job]


@pytest.mark.logs_errors
def test_scheduler_policy_hears_once_of_each_start(start_with, model_folder):
    class Counting(SchedulerPolicy):
        name = "counting"
        started, ended = [], []

        def on_start(self, request):
            assert request not in self.ended
            self.started.append(request)

        def on_finish(self, request):
            self.ended.append(request)

    engine = start_with(Counting, "--batch-size", "2")
    step, failures = engine.step, []

    def failing_step():
        if not failures and engine.running and engine.running[0].n_generated == 3:
            failures.append(True)
            raise ArithmeticError("a step failed")
        step()

    engine.step = failing_step
    jobs = [submit(engine, p, max_tokens=8) for p in texts(3)]
    for job in jobs:
        read(job)
    engine.stop_and_join()
    assert failures
    assert sorted(Counting.started, key=jobs.index) == jobs


@pytest.mark.logs_errors
def test_error_of_scheduling_is_no_failed_step(start_engine, monkeypatch, caplog):
    engine = start_engine("llama", "--use-prompt-cache", "--scheduler", "lpm")
    stream = submit(engine, "a stream that runs", max_tokens=3000)
    stream.receive(timeout=60)
    search = engine.prompt_cache.search

    def failing_search(model, tokens):
        if tokens == bad.prompt:
            raise ArithmeticError("a fault of the lookup")
        return search(model, tokens)

    bad = submit(engine, "b", max_tokens=1)
    read(bad)
    monkeypatch.setattr(engine.prompt_cache, "search", failing_search)
    with pytest.raises(RequestError, match="its log says why"):
        read(submit(engine, "b", max_tokens=1))
    n_steps = engine.batch.n_steps
    read(submit(engine, "c", max_tokens=1))
    assert engine.batch.n_steps > n_steps and not stream.finished
    assert engine.max_rows == engine.cli_args.batch_size
    assert stream in engine.running
    engine.client.cancel(stream)
    assert "a fault of the lookup" in caplog.text
    assert "A step of" not in caplog.text


class Twice(SchedulerPolicy):
    name = "twice"

    def order(self, waiting, view):
        return [*waiting, waiting[0]]


class Invented(SchedulerPolicy):
    name = "invented"

    def order(self, waiting, view):
        return [SimpleNamespace(id="x")]


class Failing(SchedulerPolicy):
    name = "failing"

    def on_tokens(self, counts):
        raise ArithmeticError("no tokens")


class Wordy(SchedulerPolicy):
    name = "wordy"

    def prefill_tokens(self, view):
        return "many"


class Unmatched(SchedulerPolicy):
    name = "unmatched"
    most_known = None

    def order(self, waiting, view):
        return waiting


@pytest.mark.logs_errors
@pytest.mark.parametrize("cls", [Twice, Invented, Failing, Wordy, Unmatched])
def test_scheduler_policy_that_fails_is_replaced(cls, start_with, model_folder, caplog):
    engine = start_with(cls)
    reference = Reference(model_folder())
    prompts = texts(4)
    jobs = [submit(engine, p, max_tokens=8) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 8)
    message = f"'{cls.name}' of plugin 'test' (tests 0) failed; 'fcfs'"
    assert message in only_error(caplog)


def test_requests_that_a_policy_leaves_out_follow_in_order_of_arrival(start_with):
    class Favourite(SchedulerPolicy):
        name = "favourite"

        def order(self, waiting, view):
            return [r for r in waiting if r.user == "x"]

    engine = start_with(Favourite, "--batch-size", "1")
    first = submit(engine, "a", max_tokens=4000)
    first.receive(timeout=60)
    jobs = [submit(engine, "b", max_tokens=2, user=user) for user in "abxc"]
    engine.client.cancel(first)
    for job in jobs:
        read(job)
    started = sorted(jobs, key=lambda job: job.started)
    assert [job.user for job in started] == ["x", "a", "b", "c"]


class Watch:
    """A model that notes the most tokens of a call."""

    def __init__(self, model):
        self.model, self.longest = model, 0

    def __call__(self, inputs, cache):
        self.longest = max(self.longest, inputs.size)
        return self.model(inputs, cache=cache)

    def __getattr__(self, name):
        return getattr(self.model, name)


def test_prefill_budget_of_a_policy_is_kept(start_with, model_folder):
    class Careful(SchedulerPolicy):
        name = "careful"

        def prefill_tokens(self, view):
            return 20

    engine = start_with(Careful)
    provider = engine.model_provider
    provider.model = watch = Watch(provider.model)
    reference = Reference(model_folder())
    prompts = [letter * 150 for letter in "abcd"]
    jobs = [submit(engine, p, max_tokens=8) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 8)
    assert 8 < watch.longest <= 20


def test_long_prompt_is_run_in_small_parts_beside_a_stream(start_engine, model_folder):
    engine = start_engine("llama", "--prefill-budget", "20")
    provider = engine.model_provider
    provider.model = watch = Watch(provider.model)
    expected = Reference(model_folder()).tokens("y" * 100, 8)
    stream = submit(engine, "x" * 100, max_tokens=3900)
    stream.receive(timeout=60)
    assert watch.longest == 99
    watch.longest = 0
    late = submit(engine, "y" * 100, max_tokens=8)
    assert read(late) == expected
    assert not stream.finished
    engine.client.cancel(stream)
    assert 8 < watch.longest <= 20


def test_scheduler_policy_hears_of_all_tokens_and_of_each_end_once(
    start_with, model_folder
):
    class Counting(SchedulerPolicy):
        name = "counting"
        tokens, ended = {}, []

        def on_tokens(self, counts):
            for request, n in counts:
                self.tokens[request] = self.tokens.get(request, 0) + n

        def on_finish(self, request):
            self.ended.append(request)

    engine = start_with(Counting, "--batch-size", "2", "--allow-models", "any")
    running = [submit(engine, "a", max_tokens=4000) for _ in range(2)]
    for job in running:
        job.receive(timeout=60)
    never_ran = submit(engine, "b", max_tokens=5)
    jobs = [submit(engine, "b", max_tokens=n) for n in (1, 5)]
    alone = str(model_folder("llama4"))
    jobs += [submit(engine, "b", max_tokens=5, model=alone)]
    for job in (never_ran, *running):
        engine.client.cancel(job)
    for job in jobs:
        read(job)
    assert sorted(map(id, Counting.ended)) == sorted(
        map(id, [never_ran, *running, *jobs])
    )
    assert [Counting.tokens.get(job) for job in jobs] == [1, 5, None]
    assert never_ran not in Counting.tokens


# Sampling


class Greedy(BatchSampler):
    """Chooses the most likely token, from log probabilities."""

    name = "greedy"

    def __call__(self, logprobs):
        return mx.argmax(logprobs, axis=-1)


def row(policy_class, n):
    """The sampler of a request whose tokens start at n."""
    return GuardedSampler(policy_class, None, SimpleNamespace(n=n), None)


class Counter(Always):
    name = "counter"

    def __init__(self, args, request, tokenizer):
        self.n = [request.n]

    def __call__(self, logprobs):
        tokens = mx.array(self.n)
        self.n = [n + 1 for n in self.n]
        return tokens


def test_rows_keep_their_own_state_as_they_come_and_go():
    rng = random.Random(0)
    classes = [PolicyClass(SAMPLER, str(i), Counter, "test", Greedy) for i in range(3)]
    samplers, expected = SamplerGroups([]), []
    for i in range(200):
        if rng.random() < 0.5 or not expected:
            new = [rng.randrange(100, 10**6) for _ in range(rng.randint(1, 4))]
            samplers.extend(SamplerGroups([row(rng.choice(classes), n) for n in new]))
            expected += new
        else:
            keep = [i for i in range(len(expected)) if rng.random() < 0.7]
            rng.shuffle(keep)
            samplers.filter(keep)
            expected = [expected[i] for i in keep]
        if expected:
            assert samplers(mx.zeros((len(expected), 10**7))).tolist() == expected
            expected = [n + 1 for n in expected]


def test_tokens_of_samplers_share_a_batch_with_those_of_others(
    start_engine, model_folder
):
    hook = plugin(mlx_lm_register_samplers=lambda: [Always])
    engine = start_engine(plugin=hook)
    reference = Reference(model_folder())
    prompts = texts(9)
    extra = [{}, dict(sampler="always"), dict(temperature=0.7)] * 3
    jobs = [
        submit(engine, p, max_tokens=10 + i, **e)
        for i, (p, e) in enumerate(zip(prompts, extra))
    ]
    answers = [read(job) for job in jobs]
    for i in (0, 3, 6):
        assert answers[i] == reference.tokens(prompts[i], 10 + i)
    for i in (1, 4, 7):
        assert answers[i] == list(range(65, 75 + i))


class Shapeless(BatchSampler):
    name = "shapeless"

    def __call__(self, logprobs):
        return logprobs


class Listing(Greedy):
    name = "listing"

    def __call__(self, logprobs):
        return super().__call__(logprobs).tolist()


class Undecided(Greedy):
    name = "undecided"

    @property
    def needs_logprobs(self):
        raise ArithmeticError("perhaps")


class Unready(Greedy):
    name = "unready"

    def __init__(self, args, request, tokenizer):
        raise ArithmeticError("not ready")


class Lonely(Greedy):
    name = "lonely"

    def extend(self, other):
        raise ArithmeticError("no company")


class Tired(Greedy):
    name = "tired"
    needs_logprobs = False
    calls = 0

    def __call__(self, logprobs):
        Tired.calls += 1
        if Tired.calls > 20:
            raise ArithmeticError("no more")
        return super().__call__(logprobs)


@pytest.mark.logs_errors
@pytest.mark.parametrize("cls", [Shapeless, Undecided, Unready, Lonely, Tired])
def test_sampler_that_fails_is_replaced(cls, start_with, model_folder, caplog):
    engine = start_with(cls)
    reference = Reference(model_folder())
    prompts = texts(6)
    jobs = [submit(engine, p, max_tokens=20 + i) for i, p in enumerate(prompts)]
    for i, (prompt, job) in enumerate(zip(prompts, jobs)):
        assert read(job) == reference.tokens(prompt, 20 + i)
    message = f"sampler '{cls.name}' of plugin 'test' (tests 0) failed"
    assert message in only_error(caplog)


def test_sampler_may_use_up_the_list_of_rows_that_it_is_to_keep(
    start_with, model_folder
):
    class Consuming(Greedy):
        name = "consuming"

        def filter(self, keep):
            keep.clear()

    engine = start_with(Consuming)
    reference = Reference(model_folder())
    prompts = texts(6)
    jobs = [submit(engine, p, max_tokens=5 + 3 * i) for i, p in enumerate(prompts)]
    for i, (prompt, job) in enumerate(zip(prompts, jobs)):
        assert read(job) == reference.tokens(prompt, 5 + 3 * i)


class Fails(Greedy):
    name = "fails"
    needs_logprobs = False

    def __call__(self, logprobs):
        raise ArithmeticError("never")


def test_sampler_is_not_blamed_for_what_the_server_does(monkeypatch):
    calls = []

    def normalize(logits):
        calls.append(logits)
        raise MemoryError("no room")

    monkeypatch.setattr(guarded_sampler, "normalize", normalize)
    policy_class = PolicyClass(
        SAMPLER, "p", type("Plain", (Greedy,), {}), "test", Greedy
    )
    with pytest.raises(MemoryError):
        row(policy_class, 0)(mx.zeros((1, 3)))
    assert policy_class.cls is not Greedy
    assert len(calls) == 1


@pytest.mark.parametrize(
    "cls, problem",
    [
        (Listing, "it returned list, not an mx.array"),
        (Shapeless, "of shape (1, 3), not one token id for each of 1 rows"),
    ],
)
def test_log_says_what_is_wrong_with_the_tokens_of_a_sampler(cls, problem, caplog):
    row(PolicyClass(SAMPLER, cls.name, cls, "test", Greedy), 0)(mx.zeros((1, 3)))
    assert problem in caplog.text


def test_sampler_that_fails_leaves_the_logits_as_they_were():
    class Spoils(Fails):
        def __call__(self, logprobs):
            logprobs[:, 1] = -mx.inf
            super().__call__(logprobs)

    logits = mx.array([[1.0, 5.0, 2.0]])
    sampler = row(PolicyClass(SAMPLER, "spoils", Spoils, "test", Greedy), 0)
    assert sampler(logits).tolist() == [1]
    assert logits.tolist() == [[1.0, 5.0, 2.0]]


@pytest.mark.parametrize("use", ["call", "filter", "extend"])
def test_no_object_of_a_class_that_failed_is_used_again(use):
    used = []

    class Used(Fails):
        def filter(self, keep):
            used.append(self)

        def extend(self, other):
            used.append(self)

        def __call__(self, logprobs):
            used.append(self)
            super().__call__(logprobs)

    policy_class = PolicyClass(SAMPLER, "used", Used, "test", Greedy)
    first, second, third = (
        row(policy_class, 0),
        row(policy_class, 0),
        row(policy_class, 0),
    )
    logits = mx.array([[1.0, 5.0, 2.0]])
    first(logits)
    used.clear()
    if use == "filter":
        second.filter([0])
    elif use == "extend":
        second.extend(third)
        logits = mx.concatenate([logits, logits])
    assert second(logits).tolist() == [1] * len(logits)
    assert not used


def test_class_may_choose_the_type_of_its_objects():
    class Chooses(Counter):
        def __new__(cls, *args):
            return object.__new__(Chosen)

    class Chosen(Chooses):
        pass

    policy_class = PolicyClass(SAMPLER, "chooses", Chooses, "test", Greedy)
    sampler = row(policy_class, 7)
    assert [sampler(mx.zeros((1, 99))).item() for _ in range(3)] == [7, 8, 9]


def test_sampler_that_replaces_one_of_logits_gets_log_probabilities():
    class Normal(Greedy):
        def __call__(self, logprobs):
            assert mx.allclose(mx.exp(logprobs).sum(axis=-1), mx.array(1.0))
            return super().__call__(logprobs)

    sampler = row(PolicyClass(SAMPLER, "fails", Fails, "test", Normal), 0)
    assert sampler(mx.array([[1.0, 5.0, 2.0]])).tolist() == [1]


@pytest.mark.parametrize("token", [-1, 259, 10**9])
def test_token_that_the_model_lacks_is_not_run(token, start_with):
    class Wild(BatchSampler):
        name = "wild"

        def __call__(self, logprobs):
            return mx.full((len(logprobs),), token)

    assert read(submit(start_with(Wild), "a", max_tokens=4)) == [258] * 4


def test_sampler_refuses_a_request_without_being_replaced(start_with):
    class Strict(Greedy):
        name = "strict"

        def __init__(self, args, request, tokenizer):
            if request.body.get("tau", 0) < 0:
                raise RequestError(400, "tau must be at least 0", "tau")

    engine = start_with(Strict)
    with pytest.raises(RequestError, match="tau must be"):
        read(submit(engine, "a", max_tokens=2, tau=-1))
    assert len(read(submit(engine, "a", max_tokens=2, tau=1))) == 2
    assert engine.policies.samplers["strict"].cls is Strict


# Time


def test_time_of_each_policy_is_logged(start_with, caplog):
    caplog.set_level("INFO")

    class Slow(SchedulerPolicy):
        name = "slow"

        def order(self, waiting, view):
            self.clock()
            sum(range(10**5))

    engine = start_with(Slow)
    read(submit(engine, "a", max_tokens=5))
    engine.stop_and_join()
    lines = [r.message for r in caplog.records if "time in policies" in r.message]
    assert re.search(r"5 tokens, [\d.]+ a second", lines[0])
    assert float(re.search(r"scheduler policy slow ([\d.]+) s", lines[0])[1]) > 0


def test_overhead_is_measured():
    command = [sys.executable, "-m", "mlx_lm_ext.bench.policy_overhead"]
    command += ["--rounds", "2", "--steps", "3", "--rows", "2"]
    result = run_program(command, check=True)
    assert re.search(r"2 rows: \d+ us .*ratio \d\.\d+", result.stdout)
