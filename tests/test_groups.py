"""Rows that decode in several groups: their answers are those of each request alone, however
often they change their group."""

import random
import re
import sys
import threading

import mlx.core as mx
import pytest
from helpers import (
    LETTERS,
    Always,
    Reference,
    peak_memory,
    plugin,
    read,
    submit,
    wait_until_idle,
)
from integrity import check
from mlx_lm.sample_utils import make_logits_processors
from processes import run_program
from test_constraints import Stairs, constraining
from test_kv_memory import ENDS, TOKEN
from tiny_models import CONFIGS

from mlx_lm_ext.batch import generator, groups
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.batch.grouping import Grouping
from mlx_lm_ext.cache.segmented import BatchSegmentedKVCache
from mlx_lm_ext.engine.loop import Engine


class Shuffled(Grouping):
    """Puts rows into groups, and groups others, at random."""

    def __init__(self, costs, *args):
        super().__init__(costs, *args, min_length=1)
        self.rng = random.Random(0)

    def place(self, groups, lengths):
        n = min(len(groups) + 1, self.max_groups)
        return [self.rng.randrange(n) if groups else 0 for _ in lengths]

    def plan(self, groups):
        rows = range(sum(map(len, groups)))
        wanted = [self.rng.randrange(self.rng.choice([1, 2, 4])) for _ in rows]
        parts = [[i for i in rows if wanted[i] == part] for part in set(wanted)]
        self.rng.shuffle(parts)
        return parts


class ShuffledBatch(Batch):
    grouping_class = Shuffled


class ShuffledEngine(Engine):
    batch_class = ShuffledBatch


CACHE = ["--use-prompt-cache"]


@pytest.fixture(params=[True, False], ids=["samples last", "samples first"])
def order(request, monkeypatch):
    """The order of a step on a CPU, and on a GPU."""
    monkeypatch.setattr(generator, "on_cpu", lambda: request.param)
    return request.param


@pytest.fixture(autouse=True)
def moves(monkeypatch):
    """How many groups each move made. Rows move in each second step."""
    seen = []

    def move(self, parts):
        move_rows(self, parts)
        assert sorted(map(len, parts)) == sorted(map(len, self.groups))
        for group in self.groups:
            # Nothing is left of what was known of the groups before.
            assert (group.longest, group.seconds) == (max(group.lengths), 0)
        seen.append(len(parts))

    move_rows = groups.GenerationGroups.move
    monkeypatch.setattr(groups.GenerationGroups, "move", move)
    monkeypatch.setattr(groups, "INTERVAL", 2)
    return seen


def prompts_of(n, longest, seed=0):
    rng = random.Random(seed)
    lengths = [round(longest ** rng.random()) for _ in range(n)]
    return ["".join(rng.choices(LETTERS, k=k)) for k in lengths]


@pytest.mark.parametrize(
    "order, cache", [(True, []), (False, CACHE)], ids=str, indirect=["order"]
)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_tokens_equal_those_of_generate_while_rows_change_their_groups(
    architecture, cache, order, moves, model_folder, start_engine
):
    reference = Reference(model_folder(architecture))
    argv = ["--batch-size", "9", "--prefill-step-size", "64", *cache]
    engine = start_engine(architecture, *argv, make_engine=ShuffledEngine)
    prompts = prompts_of(20, 300)
    rng = random.Random(1)
    lengths = [rng.randint(1, 50) for _ in prompts]
    jobs = [submit(engine, p, max_tokens=n) for p, n in zip(prompts, lengths)]
    for prompt, n, job in zip(prompts, lengths, jobs):
        assert read(job) == reference.tokens(prompt, n)
    assert 1 in moves and max(moves) > 2
    wait_until_idle(engine)
    if cache:
        check(engine.prompt_cache)


class Countdown(Always):
    """A sampler of a plugin that keeps something for each row, and cannot be copied."""

    name = "countdown"

    def __init__(self, args, request, tokenizer):
        self.n, self.lock = [request.n_generated], threading.Lock()


FEATURES = [
    {},
    {"seed": 1, "temperature": 1.0, "top_p": 0.9},
    {"seed": 2, "temperature": 0.7, "repetition_penalty": 1.3},
    {"presence_penalty": 0.9, "frequency_penalty": 0.5, "logit_bias": {"70": 3}},
    {"restricted": 1},
    {"restricted": 1, "seed": 3, "temperature": 1.2},
    {"sampler": "always"},
    {"sampler": "countdown"},
    {"min_tokens": 9, "logit_bias": {"2": 50}},
    {"repetition_penalty": 1.3, "repetition_context_size": 200},
]


def answers_of(engine, prompts, **body):
    """The tokens of the answers, each with its log probability and the likeliest tokens."""
    jobs = [
        submit(engine, p, **body, **FEATURES[i % len(FEATURES)])
        for i, p in enumerate(prompts)
    ]
    answers = []
    for job in jobs:
        tokens = []
        while not tokens or tokens[-1].finish_reason is None:
            tokens += job.receive(timeout=60)
        answers.append([(t.id, t.logprob, [i for i, _ in t.top]) for t in tokens])
    return answers


@pytest.mark.parametrize("with_logprobs", [False, True])
def test_rows_keep_their_sampling_penalties_and_constraints(
    with_logprobs, order, moves, start_engine, caplog
):
    hooks = constraining(lambda _: Stairs())
    hooks.mlx_lm_register_samplers = plugin(
        mlx_lm_register_samplers=lambda: [Always, Countdown]
    ).mlx_lm_register_samplers
    prompts = prompts_of(30, 200)
    body = {"max_tokens": 30} | ({"logprobs": 3} if with_logprobs else {})
    kept, shuffled = (
        answers_of(
            start_engine("llama", plugin=hooks, make_engine=make_engine),
            prompts,
            **body,
        )
        for make_engine in (Engine, ShuffledEngine)
    )
    for expected, found in zip(kept, shuffled):
        assert [t for t, *_ in found] == [t for t, *_ in expected]
        assert [top for *_, top in found] == [top for *_, top in expected]
        if with_logprobs:
            assert [p for _, p, _ in found] == pytest.approx(
                [p for _, p, _ in expected], abs=1e-4
            )
    assert len(moves) > 10
    (record,) = (r for r in caplog.records if "cannot be copied" in r.message)
    assert record.levelname == "WARNING" and "'countdown'" in record.message


@pytest.mark.parametrize(
    "order, cache", [(True, CACHE), (False, [])], ids=str, indirect=["order"]
)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_rows_leave_groups_early_and_come_back(
    architecture, cache, order, model_folder, start_engine
):
    """They are cancelled, or have to wait for memory."""

    class Outgrows(ShuffledBatch):
        n_preempted = 0

        def outgrows_memory(self, beside):
            # Each that is taken out comes back.
            wanted = self.n_steps // 9
            return self.n_preempted < wanted and len(self) > 3

        def preempt(self, request):
            self.n_preempted += 1
            super().preempt(request)

    class ShortEngine(Engine):
        batch_class = Outgrows

    reference = Reference(model_folder(architecture))
    engine = start_engine(
        architecture, "--batch-size", "9", *cache, make_engine=ShortEngine
    )
    prompts = prompts_of(20, 200, seed=2)
    jobs = [submit(engine, p, max_tokens=20 + i) for i, p in enumerate(prompts)]
    for i, (prompt, job) in enumerate(zip(prompts, jobs)):
        if i % 3 == 0:
            job.receive(timeout=60)
            engine.client.cancel(job)
        else:
            assert read(job) == reference.tokens(prompt, 20 + i)
    wait_until_idle(engine)
    assert engine.batch.n_preempted > 3
    assert not len(engine.batch.generator.generation_batch)
    if cache:
        check(engine.prompt_cache)


class Eager(Grouping):
    """Lets rows of 32 tokens form groups, whatever a step takes."""

    def __init__(self, costs, max_places):
        costs.measure = lambda: 1.0
        super().__init__(costs, max_places, min_length=32)


class EagerBatch(Batch):
    grouping_class = Eager

    def __init__(self, *args):
        super().__init__(*args)
        self.most_bytes, self.seen = 0, []

    def step(self):
        super().step()
        if not self.rows:
            return
        groups = self.generator.generation_batch.groups
        self.seen.append([group.lengths for group in groups])
        if not self.prefilling:
            n_bytes = self.generator.prompt_cache_nbytes
            self.most_bytes = max(self.most_bytes, n_bytes)


class EagerEngine(Engine):
    batch_class = EagerBatch


BIAS = {i: -100 for i in range(3)}
NO_END = {"logit_bias": BIAS}
NO_END_PROCESSORS = make_logits_processors(BIAS)


def start(engine, prompt, **body):
    """Submit a request, and wait for its first token."""
    job = submit(engine, prompt, **NO_END, **body)
    job.receive(timeout=60)
    return job


def test_long_row_takes_no_memory_beside_short_ones(model_folder, start_engine):
    reference = Reference(model_folder(), logits_processors=NO_END_PROCESSORS)
    engine = start_engine(make_engine=EagerEngine)
    prompts = ["y" * 3000, *prompts_of(6, 20)]
    jobs = [
        start(engine, p, max_tokens=100 if i else 300) for i, p in enumerate(prompts)
    ]
    for i, (prompt, job) in enumerate(zip(prompts, jobs)):
        read(job)
        assert job.generated == reference.tokens(prompt, 100 if i else 300)
    seen = [n for n in engine.batch.seen if sum(map(len, n)) == 7]
    assert seen and all(sorted(map(len, groups)) == [1, 6] for groups in seen)
    token = engine.batch.kv_memory.nbytes(1, 256) // 256
    # And room for a step of the arrays of each row, and for a spare row.
    assert engine.batch.most_bytes <= (3584 + 8 * 512) * token


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [300, 4000])
def test_groups_stay_within_the_limit(max_tokens, start_engine):
    argv = "--max-kv-bytes", str(20 * 512 * TOKEN), "--prefill-step-size", "256"
    engine = start_engine("llama", *argv, plugin=ENDS, make_engine=EagerEngine)
    prompts = prompts_of(50, 900)
    rng = random.Random(0)
    jobs = []
    for prompt in prompts:
        body = dict(max_tokens=rng.randint(1, max_tokens), **NO_END)
        if max_tokens > 900:
            body |= {"sampler": "ends"}
        jobs.append(submit(engine, prompt, **body))
    for job in jobs:
        read(job)
    limit = 20 * 512 * TOKEN
    assert limit / 4 < engine.batch.most_bytes <= limit
    assert any(len(groups) > 2 for groups in engine.batch.seen)


def test_rows_that_form_a_group_of_their_own_keep_their_arrays(start_engine):
    """Of a conversation from the prompt cache there is one copy, that of its row."""
    n_tokens = 3000
    engine = start_engine("llama", "--use-prompt-cache", make_engine=EagerEngine)
    read(submit(engine, "y" * n_tokens, max_tokens=1))
    jobs = [submit(engine, p, max_tokens=4000, **NO_END) for p in prompts_of(6, 20)]
    for job in jobs:
        job.receive(timeout=60)
    engine.batch.most_bytes = 0
    peaks = []

    def run():
        again = submit(engine, "y" * n_tokens, max_tokens=5)
        peaks.append(read(again))

    size = engine.batch.kv_memory.nbytes(1, n_tokens)
    assert peak_memory(run) < 1.5 * size
    for job in jobs:
        engine.client.cancel(job)


class FakeBatch:
    """Rows whose steps take no time."""

    joining = ()
    has_planned = must_plan = False

    def __init__(self, n_rows, length=100):
        self.tokens = [[0] * length for _ in range(n_rows)]
        self.uids = [*range(n_rows)]
        self.n_steps = 0

    def __len__(self):
        return len(self.tokens)

    def next(self):
        self.n_steps += 1
        return []


class KVRows:
    """Rows of which there is only the KV of one layer."""

    def __init__(self, n_rows, length):
        self.tokens = [[0] * length for _ in range(n_rows)]
        (self.layer,) = self.prompt_cache = [BatchSegmentedKVCache([0] * n_rows)]
        self.layer.update_and_fetch(
            *(mx.zeros((n_rows, 1, length, 1)) for _ in range(2))
        )

    def __len__(self):
        return len(self.tokens)

    def extend(self, other):
        self.tokens += other.tokens
        self.layer.extend(other.layer)


def test_rows_that_join_get_room_once():
    batch, others = KVRows(4, 10), [KVRows(5, 10), KVRows(1, 600)]
    groups.add(batch, others)
    assert len(batch) == 10 and len(batch.layer.keys) == 11


@pytest.mark.parametrize(
    "n_to_come, n_rows", [(0, 6), (1, 6), (2, 6), (3, 7), (4, 8), (9, 8)]
)
def test_arrays_get_room_for_rows_that_wait_and_double_at_most(n_to_come, n_rows):
    batch = KVRows(4, 10)
    groups.add(batch, [KVRows(1, 10)], n_to_come)
    assert len(batch) == 5 and len(batch.layer.keys) == n_rows


@pytest.mark.parametrize(
    "sizes, seconds, expected",
    [
        # The largest in each step, the others for three tenths of its time,
        ([31, 1], [1.0, 0.25], [120, 120]),
        ([31, 1], [1.0, 0.85], [120, 40]),
        ([1, 31], [0.85, 1.0], [40, 120]),
        # in each sixth step at least,
        ([31, 1], [1.0, 99.0], [120, 20]),
        ([31, 1, 1], [1.0, 99.0, 99.0], [120, 20, 20]),
        # or for as much as their share of the rows is.
        ([1, 1], [1.0, 2.0], [120, 60]),
        ([1, 1], [2.0, 1.0], [60, 120]),
        ([8, 4], [1.0, 1.0], [120, 60]),
        ([8, 4, 4], [1.0, 0.5, 0.5], [120, 120, 120]),
    ],
    ids=str,
)
def test_groups_beside_the_largest_hold_it_up_by_their_share(sizes, seconds, expected):
    running = groups.GenerationGroups(None)
    running.groups = [groups.Group(FakeBatch(n)) for n in sizes]
    for group, of_step in zip(running.groups, seconds):
        group.seconds = of_step
    for _ in range(120):
        running.next(is_timed=False)
    steps = [group.batch.n_steps for group in running.groups]
    assert steps == [pytest.approx(n, abs=2) for n in expected]


def test_new_rows_get_their_first_token_at_once():
    running = groups.GenerationGroups(None)
    running.groups = [groups.Group(FakeBatch(n)) for n in (31, 1)]
    main, other = running.groups
    main.seconds, other.seconds = 1.0, 99.0
    running.next(is_timed=False)
    other.batch.joining = ["new"]
    running.next(is_timed=False)
    assert other.batch.n_steps == 1


def test_what_a_long_row_costs_the_others_is_measured():
    command = [sys.executable, "-m", "mlx_lm_ext.bench.row_lengths", "--rounds", "1"]
    command += ["--short", "7", "--tokens", "10", "--layers", "2", "--hidden", "64"]
    result = run_program(command, check=True)
    pattern = (
        r"(.*), groups of (.*) rows: [\d.]+ ms a step, [\d.]+ times .* KV [\d.]+ MB"
    )
    assert re.findall(pattern, result.stdout) == [
        ("short rows", "[7]"),
        ("with a long one", "[7, 1]"),
        ("in one group", "[8]"),
    ]
