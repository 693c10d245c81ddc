"""What runs before requests need it."""

import threading
from types import SimpleNamespace

import pytest
from helpers import plugin, read, submit
from tiny_models import CONFIGS

from mlx_lm_ext.batch import batch as batching
from mlx_lm_ext.batch import batch_sampling, generator, prefill
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.engine import loop, warm_up
from mlx_lm_ext.engine.warm_up import GREEDY, Piece, WarmUp
from mlx_lm_ext.interfaces import SchedulerPolicy
from mlx_lm_ext.policies import loading as plugins
from mlx_lm_ext.sampling import default as sampling
from mlx_lm_ext.sampling import gpu as gpu_sampling
from mlx_lm_ext.sampling.penalties import Penalties

FULL = "--warmup", "full"
BACKGROUND = "--warmup", "background"


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


@pytest.fixture
def as_on_gpu(monkeypatch):
    """The warm-up runs what it runs on a GPU."""
    for module in (warm_up, sampling, generator):
        monkeypatch.setattr(module, "on_cpu", lambda: False)


@pytest.fixture
def ended(monkeypatch):
    """An event that says that no piece of the warm-up is left."""
    event = threading.Event()
    original = WarmUp.run_next

    def run_next(self, must_end):
        original(self, must_end)
        if not self.pieces:
            event.set()

    monkeypatch.setattr(WarmUp, "run_next", run_next)
    return event


@pytest.mark.parametrize("architecture", CONFIGS)
def test_one_and_several_rows_run_before_the_first_request(
    architecture, sizes, start_engine, caplog
):
    caplog.set_level("INFO")
    engine = start_engine(architecture, *FULL)
    assert set(sizes) == {1, 2}
    assert "Warmed up in" in caplog.text
    # Nothing is left of it.
    assert engine.batch is None and engine.counters.generated_tokens == 0
    assert len(read(submit(engine, "hello", max_tokens=3))) == 3


def test_on_a_gpu_batches_of_all_sizes_run(sizes, start_engine, as_on_gpu):
    start_engine("llama", *FULL, "--batch-size", "11")
    assert set(sizes) == {*range(1, 12)}
    # The likely ones come before the rare.
    assert [n for n in dict.fromkeys(sizes) if n in (4, 8, 10)] == [4, 8, 10]


def test_on_a_gpu_each_filter_and_penalty_runs(start_engine, monkeypatch, as_on_gpu):
    ran = set()

    def watch(module, name):
        original = getattr(module, name)

        def watched(*args):
            ran.add(name)
            return original(*args)

        monkeypatch.setattr(module, name, watched)

    names = ["keep_top_p", "keep_min_p", "keep_top_k", "apply_xtc", "draw"]
    for name in names:
        watch(gpu_sampling, name)
    watch(batching, "make_logits_processors")

    class WatchedPenalties(Penalties):
        def __call__(self, *args):
            ran.update(["bias"] * bool(self.bias), ["penalty"] * bool(self.penalized))
            return super().__call__(*args)

    monkeypatch.setattr(batch_sampling, "Penalties", WatchedPenalties)
    start_engine("llama", *FULL, "--batch-size", "2")
    assert ran == {*names, "make_logits_processors", "bias", "penalty"}


@pytest.mark.parametrize(
    "n_bytes, largest",
    # Of the tiny llama, a row of 256 tokens takes 128 KiB. A quarter may be spare.
    [("4MB", 24), ("131072", 1)],
)
def test_batches_are_as_large_as_the_memory_for_kv(
    n_bytes, largest, sizes, start_engine, caplog, as_on_gpu
):
    argv = [*FULL, "--batch-size", "64", "--max-kv-bytes", n_bytes]
    engine = start_engine("llama", *argv)
    assert max(sizes) == largest
    assert not caplog.records
    assert len(read(submit(engine, "hello", max_tokens=3))) == 3


def test_server_without_memory_for_a_request_says_so(start_engine, caplog):
    start_engine("llama", *FULL, "--max-kv-bytes", "1KB")
    (record,) = caplog.records
    assert record.message.startswith("There is no warm-up: the KV of 8 tokens")
    assert record.exc_info is None


def test_on_a_gpu_a_long_prompt_is_run(start_engine, monkeypatch, as_on_gpu):
    lengths = []

    def add(self, request):
        lengths.append(request.n_prompt)
        original(self, request)

    original = Batch.add
    monkeypatch.setattr(Batch, "add", add)
    start_engine("llama", *FULL, "--batch-size", "2")
    assert sorted(set(lengths)) == [8, 9, 256]


def test_with_cuda_prompts_of_all_lengths_are_run(monkeypatch, as_on_gpu):
    assert len(warm_up.size_pieces(4, 2048)) == 3
    for module in (warm_up, prefill):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    monkeypatch.setattr(prefill, "on_cpu", lambda: False)

    def shapes(step_size):
        pieces = warm_up.size_pieces(4, step_size)
        return {(len(p.bodies), p.n_prompt) for p in pieces}

    lengths = {(1, 60), (1, 128), (1, 256), (1, 1920), (1, 2048), (3, 60), (4, 60)}
    assert lengths <= shapes(2048)
    # No chunk is longer.
    assert max(n for _, n in shapes(512)) == 512


def test_server_serves_before_it_is_warm(start_engine, ended, monkeypatch):
    ran = []

    def run(self, piece, must_end):
        ran.append(piece)
        # As if it took for ever.
        while not must_end():
            pass
        return False

    with monkeypatch.context() as patch:
        patch.setattr(WarmUp, "run", run)
        engine = start_engine("llama", *BACKGROUND)
        assert engine.client.status == "ok"
        for _ in range(2):
            assert len(read(submit(engine, "hello", max_tokens=3))) == 3
    # What was interrupted runs again.
    assert len({*map(id, ran)}) == 1
    submit(engine, "hello", max_tokens=1)
    assert ended.wait(60)


def test_warm_up_goes_on_while_nothing_else_is_to_be_done(start_engine, ended, sizes):
    engine = start_engine("llama", *BACKGROUND)
    assert ended.wait(60)
    assert set(sizes) == {1, 2}
    assert len(read(submit(engine, "hello", max_tokens=3))) == 3


def test_interrupted_piece_leaves_nothing(start_engine, sizes):
    engine = start_engine("llama")
    warming = WarmUp(engine.model_provider, [Piece([GREEDY] * 4)])
    asked = []

    def must_end():
        asked.append(True)
        return len(asked) == 3

    warming.run_next(must_end)
    assert len(warming.pieces) == 1
    warming.run_next(lambda: False)
    assert not warming.pieces
    assert max(sizes) == 4


class Compiler:
    """Compiles until it has been asked three times whether it still does."""

    def __init__(self, sizes):
        self.sizes, self.seen = sizes, []

    def start(self, dtype):
        self.dtype = dtype

    def stop(self):
        pass

    @property
    def is_running(self):
        self.seen.append(len(self.sizes))
        return len(self.seen) <= 3


@pytest.mark.parametrize("warmup", [FULL, BACKGROUND])
def test_warm_up_waits_until_kernels_are_compiled(
    warmup, start_engine, ended, sizes, monkeypatch
):
    compiler = Compiler(sizes)
    monkeypatch.setattr(loop, "KernelBuild", lambda: compiler)
    start_engine("llama", *warmup)
    assert ended.wait(60)
    assert compiler.dtype == "float32"
    assert compiler.seen[:4] == [0, 0, 0, 0]
    assert sizes


def test_no_kernels_are_compiled_without_a_warm_up(start_engine, monkeypatch):
    compiler = Compiler([])
    monkeypatch.setattr(loop, "KernelBuild", lambda: compiler)
    start_engine("llama")
    assert not hasattr(compiler, "dtype")


def test_stop_does_not_wait_for_the_warm_up(start_engine, monkeypatch):
    running = threading.Event()

    def run(self, piece, must_end):
        running.set()
        while not must_end():
            pass
        return False

    monkeypatch.setattr(WarmUp, "run", run)
    engine = start_engine("llama", *BACKGROUND)
    assert running.wait(60)
    assert engine.stop_and_join(timeout=60)


def test_no_warm_up_begins_when_a_server_stops_that_compiles_kernels(
    start_engine, sizes, monkeypatch
):
    engines = []

    class Build(Compiler):
        is_running = True

        def stop(self):
            self.is_running = False
            engines[0].ended.wait(60)

    monkeypatch.setattr(loop, "KernelBuild", lambda: Build(sizes))
    engines.append(start_engine("llama", *BACKGROUND))
    assert engines[0].stop_and_join(timeout=60)
    assert not sizes


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
    argv = [*FULL, "--scheduler", "nosy"]
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
    start_engine("llama", *FULL, "--batch-size", "1")
    assert loads == ["loaded"]


@pytest.mark.parametrize("warmup", [FULL, BACKGROUND])
def test_server_serves_although_the_warm_up_fails(
    warmup, start_engine, ended, monkeypatch, caplog
):
    def fail(self, request):
        raise MemoryError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "add", fail)
        engine = start_engine("llama", *warmup)
        assert ended.wait(60)
    assert "The warm-up failed" in caplog.text
    assert len(read(submit(engine, "hello", max_tokens=3))) == 3


def test_full_warm_up_tells_how_far_it_is(start_engine, monkeypatch, caplog):
    monkeypatch.setattr(warm_up, "PROGRESS_INTERVAL", 0)
    caplog.set_level("INFO")
    start_engine("llama", *FULL)
    assert "Warming up: 1 of 3 batches" in caplog.text
