"""Rows that decode in several groups: their answers are those of each request alone, however
often they change their group."""

import random
import threading

import pytest
from helpers import LETTERS, Always, Reference, plugin, read, submit, wait_until_idle
from integrity import check
from test_constraints import Stairs, constraining
from tiny_models import CONFIGS

from mlx_lm_ext.batch import generator, groups
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.batch.grouping import Grouping
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
        seen.append(len(parts))

    move_rows = groups.GenerationGroups.move
    monkeypatch.setattr(groups.GenerationGroups, "move", move)
    monkeypatch.setattr(groups, "INTERVAL", 2)
    return seen


def prompts_of(n, longest, seed=0):
    rng = random.Random(seed)
    lengths = [round(longest ** rng.random()) for _ in range(n)]
    return ["".join(rng.choices(LETTERS, k=k)) for k in lengths]


@pytest.mark.parametrize("cache", [[], ["--use-prompt-cache"]], ids=str)
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
    assert moves.count(1) > 5 and sum(n > 2 for n in moves) > 5
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
    with_logprobs, order, moves, start_engine
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


@pytest.mark.parametrize("cache", [[], ["--use-prompt-cache"]], ids=str)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_rows_leave_groups_early_and_come_back(
    architecture, cache, order, model_folder, start_engine
):
    """They are cancelled, or have to wait for memory."""

    class Outgrows(ShuffledBatch):
        n_preempted = 0

        @property
        def outgrows_memory(self):
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
