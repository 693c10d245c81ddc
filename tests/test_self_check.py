"""The check of a model's batches when it is loaded."""

import mlx.core as mx
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
    assert "in a batch, the logits" in line and "--no-self-check" in line
    reference = Reference(model_folder(architecture))
    prompts = texts(3, longest=20)
    jobs = [submit(engine, p, max_tokens=4) for p in prompts]
    for prompt, job in zip(prompts, jobs):
        assert read(job) == reference.tokens(prompt, 4)


def test_without_the_check_wrong_batches_are_served(start_engine):
    assert start_engine("longcat_flash_ngram", "--no-self-check").has_batches


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_right_batches_pass(architecture, dtype, start_engine, caplog):
    provider = start_engine(architecture, CHECK).model_provider
    assert provider.is_batchable
    provider.model.set_dtype(dtype)
    if dtype != mx.float32 and architecture == "deepseek_v2":
        pytest.skip("on a CPU, experts run in float32 only")
    for seed in range(3):
        assert SelfCheck(provider).compare(seed) == ""
    assert "self-check" not in caplog.text


def test_it_leaves_no_arrays_and_draws_no_random_number(start_engine):
    provider = start_engine().model_provider
    check = SelfCheck(provider)
    assert check.find_fault() == ""
    n_bytes, state = active_memory(), mx.random.state[0].tolist()
    assert check.find_fault() == ""
    assert (active_memory(), mx.random.state[0].tolist()) == (n_bytes, state)
