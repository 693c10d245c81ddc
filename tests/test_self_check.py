"""The check of a model's batches when it is loaded."""

import mlx.core as mx
import pytest
from helpers import Reference, active_memory, read, submit, texts, wait_until_idle
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm import load
from tiny_models import CONFIGS, UNBATCHABLE, WRONG_TOGETHER

from mlx_lm_ext.batch.generator import LeanGenerationBatch
from mlx_lm_ext.engine import loop, self_check
from mlx_lm_ext.engine.self_check import compare, find_fault

CHECK = "--self-check"


@pytest.fixture
def model(model_folder):
    """Loads tiny models, with their weights in a type or in 4 bits."""

    def make(architecture="llama", weights=mx.float32):
        model, _tokenizer = load(str(model_folder(architecture)))
        if weights == "4 bits":
            model.set_dtype(mx.bfloat16)
            # As of most models in 4 bits, what has few columns stays as it is.
            few = "to_quantized"
            nn.quantize(
                model,
                group_size=32,
                bits=4,
                class_predicate=lambda _, m: hasattr(m, few)
                and m.weight.shape[-1] % 32 == 0,
            )
        else:
            model.set_dtype(weights)
        mx.eval(model.parameters())
        return model

    return make


def one_line_about(caplog, text):
    (line,) = [r.message for r in caplog.records if text in r.message]
    return line


@pytest.mark.parametrize("architecture", WRONG_TOGETHER)
def test_requests_to_a_model_with_wrong_batches_are_served_alone_and_are_right(
    architecture, model_folder, start_engine, caplog
):
    engine = start_engine(architecture, CHECK, "--use-prompt-cache")
    assert not engine.has_batches
    line = one_line_about(caplog, "one at a time")
    assert "in a batch, the logits" in line and "--no-self-check" in line
    reference = Reference(model_folder(architecture))
    prompts = texts(3, longest=20) * 2
    jobs = [submit(engine, p, max_tokens=4) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 4)


def test_without_the_check_wrong_batches_are_served(start_engine):
    assert start_engine("longcat_flash_ngram", "--no-self-check").has_batches


def test_a_model_that_is_loaded_for_a_request_is_checked(
    model_folder, start_engine, caplog
):
    engine = start_engine("llama", CHECK, "--allow-models", "any")
    assert engine.has_batches
    other = str(model_folder("longcat_flash_ngram"))
    tokens = read(submit(engine, "abc", max_tokens=3, model=other))
    assert tokens == Reference(other).tokens("abc", 3)
    assert other in one_line_about(caplog, "one at a time")
    read(submit(engine, "abc", max_tokens=3))
    assert engine.has_batches


@pytest.mark.parametrize(
    "architecture, argv", [(*UNBATCHABLE, []), ("llama", ["--kv-bits", "8"])]
)
def test_models_that_are_served_alone_in_any_case_are_not_checked(
    architecture, argv, start_engine, monkeypatch
):
    checked = []
    monkeypatch.setattr(loop, "find_fault", lambda *args: checked.append(args) or "")
    engine = start_engine(architecture, CHECK, *argv)
    read(submit(engine, "abc", max_tokens=1))
    assert not checked


@pytest.mark.parametrize("weights", [mx.float32, mx.float16, mx.bfloat16, "4 bits"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_right_batches_pass_with_weights_of_all_types(
    architecture, weights, model, caplog
):
    tiny = model(architecture, weights)
    assert find_fault(tiny) == ""
    assert not caplog.records


@pytest.mark.parametrize("weights", [mx.float16, mx.bfloat16, "4 bits"])
def test_wrong_batches_are_found_with_weights_of_all_types(weights, model):
    assert "in a batch, the logits" in find_fault(model("longcat_flash_ngram", weights))


def test_a_model_with_few_tokens_is_checked_with_its_own(model, monkeypatch):
    tiny, ids = model(), []
    n = tiny.model.embed_tokens.weight.shape[0]
    call = nn.Embedding.__call__
    monkeypatch.setattr(
        nn.Embedding,
        "__call__",
        lambda self, x: (ids.append(x), call(self, x))[1],
    )
    assert find_fault(tiny) == ""
    assert max(mx.max(x).item() for x in ids) < n


class Wrong(LeanGenerationBatch):
    """A batch in which one step of a row is wrong."""

    step, row, error = 0, 0, 0.05

    def run(self, inputs):
        logits = super().run(inputs)
        if not hasattr(self, "n"):
            self.n = 0
        if self.n == self.step:
            logits[self.row] += self.error * mx.std(logits)
        self.n += 1
        return logits


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("step", range(self_check.N_STEPS))
def test_each_step_of_each_row_counts(step, row, model, monkeypatch):
    monkeypatch.setattr(self_check, "LeanGenerationBatch", Wrong)
    monkeypatch.setattr(Wrong, "step", step)
    monkeypatch.setattr(Wrong, "row", row)
    assert "in a batch, the logits" in find_fault(model())


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_in_a_batch_only_are_a_fault(
    error, model, monkeypatch
):
    monkeypatch.setattr(self_check, "LeanGenerationBatch", Wrong)
    monkeypatch.setattr(Wrong, "error", error)
    assert find_fault(model())


def test_a_batch_that_fails_is_a_fault(model, monkeypatch):
    def fail(self, inputs):
        raise ValueError("shapes differ")

    monkeypatch.setattr(LeanGenerationBatch, "run", fail)
    assert find_fault(model()) == "a batch of two prompts fails: shapes differ"


def test_a_difference_that_other_prompts_do_not_show_is_no_fault(model, monkeypatch):
    tiny, faults = model(), ["rounding", ""]
    monkeypatch.setattr(self_check, "compare", lambda model, seed: faults[seed])
    assert find_fault(tiny) == ""


def test_a_model_whose_prompts_alone_fail_is_not_blamed_on_batches(
    model, monkeypatch, caplog
):
    tiny = model()
    monkeypatch.setattr(
        self_check, "run_alone", lambda *args: mx.array([[float("nan")]])
    )
    assert find_fault(tiny) == ""
    assert "not finite" in one_line_about(caplog, "There is no self-check")


def test_a_model_that_does_not_compute_in_float32_is_not_checked(
    model, monkeypatch, caplog
):
    monkeypatch.setattr(
        self_check.Float32Embedding, "__call__", lambda s, x: s.embedding(x)
    )
    assert find_fault(model(weights=mx.float16)) == ""
    assert "float32" in one_line_about(caplog, "There is no self-check")


@pytest.mark.parametrize("weights", [mx.bfloat16, "4 bits"])
def test_the_model_stays_as_it_was(weights, model):
    tiny = model("gemma3_text", weights)
    modules, parameters = dict(tiny.named_modules()), tree_flatten(tiny.parameters())
    assert find_fault(tiny) == ""
    assert all(tiny_m is modules[n] for n, tiny_m in tiny.named_modules())
    assert all(
        a is b for (_, a), (_, b) in zip(tree_flatten(tiny.parameters()), parameters)
    )


def test_it_leaves_no_arrays_and_draws_no_random_number(model):
    tiny = model()
    assert compare(tiny, 0) == ""
    n_bytes, state = active_memory(), mx.random.state[0].tolist()
    assert find_fault(tiny) == ""
    # Less, if arrays of tests before this one are freed meanwhile.
    assert active_memory() <= n_bytes
    assert mx.random.state[0].tolist() == state


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_logits_that_are_all_the_same_are_right(architecture, model):
    flat = model(architecture)
    flat.update(tree_map(mx.ones_like, flat.parameters()))
    assert find_fault(flat) == ""


class Compiling:
    """Compiles kernels until it is told that they are there."""

    is_running = True

    def start(self, dtype):
        pass

    def stop(self):
        pass


def test_while_kernels_are_compiled_the_check_waits_and_then_drops_what_is_wrong(
    start_engine, monkeypatch, caplog
):
    compiling = Compiling()
    monkeypatch.setattr(loop, "KernelBuild", lambda: compiling)
    engine = start_engine("longcat_flash_ngram", CHECK, "--use-prompt-cache")
    read(submit(engine, "abc", max_tokens=3))
    assert engine.has_batches and len(engine.prompt_cache)
    dropped = []
    monkeypatch.setattr(
        engine.prompt_cache, "trim_to", lambda n_bytes: dropped.append(n_bytes)
    )
    compiling.is_running = False
    wait_until_idle(engine)
    read(submit(engine, "b", max_tokens=1))
    assert "one at a time" in caplog.text and not engine.has_batches
    assert dropped == [0]
