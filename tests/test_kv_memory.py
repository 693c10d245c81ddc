"""Requests that start only if their KV fits beside that of the others."""

import random
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers import LETTERS, Reference, peak_memory, read, submit, texts
from mlx_lm.models.cache import ConcatenateKVCache
from tiny_models import CONFIGS

from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.batch.kv_memory import KVMemory
from mlx_lm_ext.cache.kinds import make_segmented_cache, prepare_step
from mlx_lm_ext.device import device_memory, give_back_freed
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.errors import RequestError

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
        ((), 2, 1500),
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


@pytest.mark.parametrize("freed, is_given_back", [(100, False), (101, True)])
def test_freed_memory_is_given_back_when_it_is_much(freed, is_given_back, monkeypatch):
    cleared = []
    monkeypatch.setattr(mx, "get_active_memory", lambda: 400)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: freed)
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(True))
    give_back_freed()
    assert bool(cleared) is is_given_back


def test_unknown_cache_type_is_not_bounded(model_folder, monkeypatch, caplog):
    model = Reference(model_folder()).model
    monkeypatch.setattr(
        type(model), "make_cache", lambda self: [ConcatenateKVCache()], raising=False
    )
    assert KVMemory(model).nbytes(1, 1000) == 0
    assert "ConcatenateKVCache is not known" in caplog.records[0].message


def test_no_more_requests_run_than_fit_at_their_longest(model_folder, start_engine):
    class Watched(Batch):
        most = 0

        def step(self):
            Watched.most = max(Watched.most, len(self))
            return super().step()

    class WatchedEngine(Engine):
        batch_class = Watched

    reference = Reference(model_folder())
    # Three rows of up to 512 tokens.
    argv = ["--max-kv-bytes", str(3 * 512 * TOKEN)]
    engine = start_engine("llama", *argv, make_engine=WatchedEngine)
    prompts = texts(9)
    jobs = [submit(engine, p, max_tokens=300) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 300)
    assert Watched.most == 3


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(200, 56), (5, 250), (None, None)], ids=str)
def test_batch_that_rows_join_and_leave_stays_within_the_limit(lengths, start_engine):
    held = []

    class Watched(Batch):
        def step(self):
            ended = super().step()
            if self.generator is not None:
                mx.eval([c.state for c in self.generator.generation_batch.prompt_cache])
                held.append(self.generator.prompt_cache_nbytes)
            return ended

    class WatchedEngine(Engine):
        batch_class = Watched

    limit = 20 * 512 * TOKEN
    argv = ["--max-kv-bytes", str(limit), "--prefill-step-size", "256"]
    engine = start_engine("llama", *argv, make_engine=WatchedEngine)
    rng = random.Random(0)
    jobs = []
    for _ in range(60):
        n_prompt, n_tokens = lengths
        n_prompt = n_prompt or rng.randint(1, 500)
        body = {"max_tokens": n_tokens or rng.randint(1, 300)}
        # Nothing ends an answer.
        body["logit_bias"] = {i: -100 for i in range(3)}
        jobs.append(submit(engine, "".join(rng.choices(LETTERS, k=n_prompt)), **body))
    for job in jobs:
        read(job)
    assert limit / 2 < max(held) <= limit


def test_request_that_can_never_fit_is_told_why(start_engine):
    engine = start_engine("llama", "--max-kv-bytes", str(512 * TOKEN))
    with pytest.raises(RequestError) as error:
        read(submit(engine, "x" * 13, max_tokens=500))
    assert error.value.status == 400
    assert str(error.value) == (
        "the KV of 13 tokens of prompt and 500 of max_tokens takes 0.4 MB, and the "
        "server has 0.3 MB (--max-kv-bytes)"
    )
    assert len(read(submit(engine, "x" * 12, max_tokens=500))) <= 500
