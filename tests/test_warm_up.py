"""What runs before the first request."""

from types import SimpleNamespace

import pytest
from helpers import plugin, read, submit
from tiny_models import CONFIGS

from mlx_lm_ext.batch import batch as batching
from mlx_lm_ext.batch import generator as _upstream
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.engine import warm_up
from mlx_lm_ext.engine.client import EngineClient
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.interfaces import SchedulerPolicy
from mlx_lm_ext.policies import loading as plugins
from mlx_lm_ext.sampling import default as sampling
from mlx_lm_ext.sampling import gpu as gpu_sampling
from mlx_lm_ext.sampling.penalties import Penalties


@pytest.fixture
def sizes(monkeypatch):
    """The sizes of the batches that the warm-up runs."""
    seen = []

    class WatchedBatch(Batch):
        def step(self):
            if not self.prefilling:
                seen.append(len(self))
            return super().step()

    monkeypatch.setattr(warm_up, "Batch", WatchedBatch)
    return seen


@pytest.mark.parametrize("architecture", CONFIGS)
def test_batches_of_all_sizes_run_before_the_first_request(
    architecture, sizes, start_engine, caplog
):
    caplog.set_level("INFO")
    engine = start_engine(architecture, "--warmup", "--batch-size", "12")
    assert list(dict.fromkeys(sizes)) == [1, 2, 4, 8, 12, 6]
    assert "Warmed up in" in caplog.text
    # Nothing is left of it.
    assert engine.batch is None and engine.n_generated == 0
    assert len(read(submit(engine, "hello", max_tokens=3))) == 3


def test_on_a_gpu_rows_leave_one_by_one(sizes, start_engine, monkeypatch):
    monkeypatch.setattr(warm_up, "on_cpu", lambda: False)
    start_engine("llama", "--warmup", "--batch-size", "6")
    assert sizes[-5:] == [5, 4, 3, 2, 1]


def test_on_a_gpu_each_filter_and_penalty_runs(start_engine, monkeypatch):
    ran = set()

    def watch(module, name):
        original = getattr(module, name)

        def watched(*args):
            ran.add(name)
            return original(*args)

        monkeypatch.setattr(module, name, watched)

    for module in (warm_up, sampling, _upstream):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    names = ["keep_top_p", "keep_min_p", "keep_top_k", "apply_xtc", "draw"]
    for name in names:
        watch(gpu_sampling, name)
    watch(batching, "make_logits_processors")

    class WatchedPenalties(Penalties):
        def __call__(self, *args):
            ran.update(["bias"] * bool(self.bias), ["penalty"] * bool(self.penalized))
            return super().__call__(*args)

    monkeypatch.setattr(_upstream, "Penalties", WatchedPenalties)
    start_engine("llama", "--warmup", "--batch-size", "1")
    assert ran == {*names, "make_logits_processors", "bias", "penalty"}


@pytest.mark.parametrize(
    "n_bytes, expected",
    [
        # Of the tiny llama, a row of 512 tokens takes 256 KiB. A quarter may be spare.
        ("4MB", [1, 2, 4, 8, 12, 6]),
        ("262144", [1, 0]),
    ],
)
def test_batches_are_as_large_as_the_memory_for_kv(
    n_bytes, expected, sizes, start_engine, caplog
):
    argv = ["--warmup", "--batch-size", "64", "--max-kv-bytes", n_bytes]
    engine = start_engine("llama", *argv)
    assert list(dict.fromkeys(sizes)) == expected
    assert not caplog.records
    assert len(read(submit(engine, "hello", max_tokens=3))) == 3


def test_server_without_memory_for_a_request_says_so(start_engine, caplog):
    start_engine("llama", "--warmup", "--max-kv-bytes", "1KB")
    (record,) = caplog.records
    assert record.message.startswith("There is no warm-up: the KV of 8 tokens")
    assert record.exc_info is None


def test_long_prompt_is_run_if_it_fits(sizes, start_engine, monkeypatch):
    lengths = []

    def add(self, request):
        lengths.append(request.n_prompt)
        original(self, request)

    original = Batch.add
    monkeypatch.setattr(Batch, "add", add)
    start_engine("llama", "--warmup", "--batch-size", "1")
    assert len(lengths) == 2 and max(lengths) > 256
    assert set(sizes) == {0, 1}


def test_policies_of_plugins_do_not_hear_of_the_warm_up(start_engine):
    class Nosy(SchedulerPolicy):
        name = "nosy"
        heard = []

        def on_tokens(self, counts):
            self.heard.append(counts)

    hooks = plugin(
        mlx_lm_register_scheduler_policies=lambda: [Nosy],
        mlx_lm_make_logits_processors=lambda request: Nosy.heard.append(request),
    )
    argv = ["--warmup", "--scheduler", "nosy"]
    engine = start_engine("llama", *argv, plugin=hooks)
    assert not Nosy.heard
    read(submit(engine, "hello", max_tokens=3))
    assert Nosy.heard


def test_installed_plugins_are_not_loaded_again_for_the_warm_up(
    start_engine, monkeypatch
):
    loads = []
    entry = SimpleNamespace(
        name="installed",
        load=lambda: loads.append("loaded") or plugin(),
        dist=SimpleNamespace(name="a-dist", version="1"),
    )
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    start_engine("llama", "--warmup", "--batch-size", "1")
    assert loads == ["loaded"]


def test_server_serves_although_the_warm_up_fails(start_engine, monkeypatch, caplog):
    def fail(self, request):
        raise MemoryError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "add", fail)
        engine = start_engine("llama", "--warmup")
    assert "The warm-up failed" in caplog.text
    assert len(read(submit(engine, "hello", max_tokens=3))) == 3


def test_server_is_not_healthy_until_it_is_warm(start_engine, monkeypatch):
    engines, healthy = [], []

    class WatchedEngine(Engine):
        def __init__(self, *args):
            engines.append(self)
            super().__init__(*args)

    def warm_up(provider, is_stopping):
        (engine,) = engines
        client = EngineClient(engine.model_provider, engine.policies, engine.inbox)
        healthy.append(client.is_healthy)

    monkeypatch.setattr("mlx_lm_ext.engine.loop.warm_up", warm_up)
    engine = start_engine("llama", "--warmup", make_engine=WatchedEngine)
    assert healthy == [False] and engine.client.is_healthy
