"""The check of a model's batches when it is loaded."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import Reference, active_memory, read, submit, texts
from tiny_models import CONFIGS, WRONG_TOGETHER

from mlx_lm_ext.engine.self_check import SelfCheck

CHECK = "--self-check"


@pytest.mark.parametrize("architecture", WRONG_TOGETHER)
def test_wrong_batches_are_found_and_answers_are_those_of_each_prompt_alone(
    architecture, model_folder, start_engine, caplog
):
    engine = start_engine(architecture, CHECK)
    assert not engine.has_batches
    (line,) = [r.message for r in caplog.records if "one at a time" in r.message]
    assert "in a batch of two prompts" in line and "--no-self-check" in line
    reference = Reference(model_folder(architecture))
    prompts = texts(3, longest=20)
    jobs = [submit(engine, p, max_tokens=4) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 4)


def test_without_the_check_wrong_batches_are_served(start_engine):
    assert start_engine("longcat_flash_ngram", "--no-self-check").has_batches


def test_a_model_that_is_loaded_later_is_checked_too(model_folder, start_engine):
    other = str(model_folder("longcat_flash_ngram"))
    engine = start_engine("llama", CHECK, "--allow-models", other)
    assert engine.has_batches
    assert len(read(submit(engine, "a", model=other, max_tokens=2))) == 2
    assert not engine.has_batches
    assert len(read(submit(engine, "a", max_tokens=2))) == 2
    assert engine.has_batches


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "4 bits"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_right_batches_pass(architecture, kind, start_engine, caplog):
    provider = start_engine(architecture, CHECK).model_provider
    assert provider.is_batchable
    model = provider.model
    if kind == "4 bits":
        model.set_dtype(mx.bfloat16)
        nn.quantize(
            model,
            group_size=32,
            bits=4,
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
            ),
        )
    else:
        model.set_dtype(getattr(mx, kind))
    for seed in range(3):
        assert SelfCheck(provider).compare(seed) == ""
    assert "one at a time" not in caplog.text


@pytest.fixture
def find_fault(start_engine, monkeypatch):
    """What the check finds of logits that are so far apart in each step of the two prompts, which
    are alone what they should be."""
    provider = start_engine().model_provider

    def find(shorter, longer, dtype=mx.float32):
        logits = mx.random.normal((2, 64), key=mx.random.key(0)).astype(dtype)
        spread = mx.std(logits.astype(mx.float32), axis=-1).tolist()
        monkeypatch.setattr(SelfCheck, "run_alone", lambda check, request: logits)

        def run_together(check, requests):
            return {
                request: [row + d * s for row, d, s in zip(logits, apart, spread)]
                for request, apart in zip(requests, (shorter, longer))
            }

        monkeypatch.setattr(SelfCheck, "run_together", run_together)
        return SelfCheck(provider).find_fault()

    return find


@pytest.mark.parametrize(
    "shorter, longer, dtype, is_fault",
    [
        ([2e-3, 2e-3], [0, 0], mx.float32, True),
        ([5e-4, 5e-4], [0, 0], mx.float32, False),
        ([0.1, 0.1], [0, 0], mx.float16, True),
        ([5e-3, 5e-3], [0, 0], mx.float16, False),
        # In one step, a mixture may have chosen another expert.
        ([0.4, 0], [0, 0], mx.float32, False),
        # The longer prompt has no padding: this is rounding,
        ([0.1, 0.1], [0, 0.02], mx.float32, False),
        ([0.25, 0.25], [0, 0.02], mx.float32, True),
        # and this is more than rounding can be.
        ([0.4, 0.4], [0.1, 0.1], mx.float32, True),
        ([0, 0], [0.4, 0.4], mx.float32, True),
        ([float("nan")] * 2, [0, 0], mx.float32, True),
        ([0, 0], [float("nan")] * 2, mx.float32, True),
    ],
)
def test_rounding_is_no_fault(shorter, longer, dtype, is_fault, find_fault):
    assert bool(find_fault(shorter, longer, dtype)) is is_fault


def test_a_batch_that_fails_is_a_fault_unless_each_prompt_does(
    start_engine, monkeypatch
):
    provider = start_engine().model_provider

    def fail(*args):
        raise ValueError("no such shape")

    monkeypatch.setattr(SelfCheck, "run_together", fail)
    assert "fails: no such shape" in SelfCheck(provider).find_fault()
    monkeypatch.setattr(SelfCheck, "run_alone", fail)
    assert SelfCheck(provider).find_fault() == ""


def test_a_model_without_finite_logits_is_not_found_fault_with(
    start_engine, monkeypatch
):
    provider = start_engine().model_provider
    provider.model.update({"model": {"norm": {"weight": mx.full((64,), float("nan"))}}})
    assert SelfCheck(provider).find_fault() == ""


def test_it_leaves_no_arrays_and_draws_no_random_number(start_engine):
    provider = start_engine().model_provider
    check = SelfCheck(provider)
    assert check.find_fault() == ""
    n_bytes, state = active_memory(), mx.random.state[0].tolist()
    assert check.find_fault() == ""
    assert (active_memory(), mx.random.state[0].tolist()) == (n_bytes, state)
