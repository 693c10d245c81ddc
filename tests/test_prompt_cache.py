"""What the prompt cache gives to requests: never other tokens than from cold."""

import logging
import threading

import mlx.core as mx
import pytest
from helpers import Reference, read, submit, texts
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import CompletionRequest, ResponseGenerator
from tiny_models import CONFIGS, UNBATCHABLE, make_model

from mlx_lm_ext.batching import Batch
from mlx_lm_ext.engine import Engine
from mlx_lm_ext.examples.random_model import LLAMA, SPECIAL, write_model
from mlx_lm_ext.radix_cache import RadixPromptCache

CACHE = "--use-prompt-cache"


@pytest.mark.parametrize("architecture", [*CONFIGS, *UNBATCHABLE])
def test_tokens_equal_those_from_cold(architecture, model_folder, start_engine):
    reference = Reference(model_folder(architecture))
    engine = start_engine(architecture, CACHE, "--prefill-step-size", "32")
    prompt = reference.tokenizer.encode(texts(1, seed=3)[0] * 3)[:90]
    other = [t for t in range(65, 91) if t not in (prompt[0], prompt[45], prompt[-1])]
    answer = reference.tokens(prompt, 20)
    prompts = {
        "cold": prompt,
        "next turn": prompt + answer + other,
        "exact repeat": prompt,
        "strict prefix": prompt[:60],
        "extension": prompt + other,
        "divergence in the middle": prompt[:45] + other,
        "divergence there again": prompt[:45] + other[::-1],
        "divergence at the first token": other[:1] + prompt[1:],
        "divergence at the last token": prompt[:-1] + other[:1],
        "one token": prompt[:1],
        "one token again": prompt[:1],
        "one other token": other[:1],
    }
    found = {}
    for name, tokens in prompts.items():
        job = submit(engine, tokens, max_tokens=20)
        assert read(job) == reference.tokens(tokens, 20), name
        found[name] = job.n_matched
        engine.prompt_cache.check_integrity()
    assert found["cold"] == found["one other token"] == found["one token"] == 0
    assert found["next turn"] == 90 + 20
    # Upstream keeps what it serves alone at its end only.
    if architecture in CONFIGS:
        assert found["exact repeat"] == 89
        assert found["divergence there again"] == 45


def test_exact_repeat_is_taken_from_the_cache(model_folder, start_engine):
    engine = start_engine("llama", "--use-prompt-cache")
    reference = Reference(model_folder())
    prompt = "the same prompt twice"
    tokens = reference.tokenizer.encode(prompt)
    answer = read(submit(engine, prompt, max_tokens=4))
    # The stored key is the prompt with its answer: no token would be left to run.
    job = submit(engine, tokens + answer, max_tokens=3)
    assert read(job) == reference.tokens(tokens + answer, 3)
    assert job.n_matched == len(tokens + answer) - 1


def test_cancelled_request_leaves_its_kv_in_the_cache(start_engine):
    # With one row, the second starts after the cancelled one has left.
    engine = start_engine("llama", "--use-prompt-cache", "--batch-size", "1")
    prompt = Reference(engine.cli_args.model).tokenizer.encode("its client goes away")
    job = submit(engine, prompt, max_tokens=4000)
    while len(job.generated) < 20:
        job.receive(timeout=60)
    job.cancel()
    retry = submit(engine, prompt + job.generated[:20], max_tokens=2)
    read(retry)
    assert retry.n_matched == len(prompt) + 19


def test_request_cancelled_in_its_prefill_leaves_what_it_has_run(start_engine):
    class CancellingBatch(Batch):
        def step(self):
            if self.steps == 3:
                self.requests[0].cancel()
            return super().step()

    class CancellingEngine(Engine):
        batch_class = CancellingBatch

    argv = ["--use-prompt-cache", "--batch-size", "1", "--prefill-step-size", "8"]
    engine = start_engine("llama", *argv, make_engine=CancellingEngine)
    submit(engine, "x" * 300, max_tokens=5)
    retry = submit(engine, "x" * 300, max_tokens=2)
    read(retry)
    assert retry.n_matched == 8 * 4


def test_nothing_is_kept_without_a_prompt_cache(start_engine):
    engine = start_engine()
    for _ in range(2):
        job = submit(engine, "the same prompt twice", max_tokens=4)
        read(job)
        assert job.n_matched == 0
    assert engine.prompt_cache.nbytes == 0


def test_request_alone_leaves_its_kv_however_it_ends(start_engine):
    engine = start_engine("llama", "--use-prompt-cache")
    prompt = Reference(engine.cli_args.model).tokenizer.encode("served alone")
    for max_tokens in (4000, 25):
        job = submit(engine, prompt, max_tokens=max_tokens, seed=1)
        while len(job.generated) < 20:
            job.receive(timeout=60)
        job.cancel()
        retry = submit(engine, prompt + job.generated[:20], max_tokens=2)
        read(retry)
        assert retry.n_matched >= len(prompt) + 19
        prompt = prompt[::-1]


def test_draft_model_leaves_no_wrong_kv_in_the_cache(
    model_folder, start_engine, tmp_path
):
    draft = make_model(tmp_path / "draft", "llama", seed=5)
    reference = Reference(model_folder())
    argv = ["--use-prompt-cache", "--draft-model", str(draft)]
    engine = start_engine("llama", *argv)
    for text in texts(6, longest=40):
        prompt = reference.tokenizer.encode(text)
        prompt += read(submit(engine, prompt, max_tokens=9)) + [50]
        assert read(submit(engine, prompt, max_tokens=9)) == reference.tokens(prompt, 9)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_turns_of_a_chat_equal_those_from_cold(
    architecture, model_folder, start_engine
):
    reference = Reference(model_folder(architecture))
    engine = start_engine(architecture, CACHE)
    messages = [{"role": "system", "content": "Be brief, and kind, and so on."}]
    for question in texts(4, longest=40):
        messages.append({"role": "user", "content": question})
        job = submit(engine, messages=messages, max_tokens=12)
        assert read(job) == reference.tokens(job.prompt, 12)
        assert job.n_matched >= job.n_prompt - len(question) - 60
        messages.append({"role": "assistant", "content": "x" * 10})
    engine.prompt_cache.check_integrity()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_requests_that_come_together_equal_those_from_cold(
    architecture, model_folder, start_engine
):
    """Four prefixes, and a bound at which something always has to leave."""
    reference = Reference(model_folder(architecture))
    row = make_prompt_cache(reference.model)
    reference.model(mx.zeros((1, 250), dtype=mx.int32), cache=row)
    bound = 7 * sum(c.nbytes for c in row)
    argv = [CACHE, "--radix-cache-size", str(bound), "--batch-size", "4"]
    engine = start_engine(architecture, *argv)
    prefixes = texts(4, seed=8)
    prompts = [prefixes[i % 4] + end for i, end in enumerate(texts(32, 60, seed=9))]
    for _ in range(2):
        jobs = [submit(engine, p, max_tokens=20) for p in prompts]
        for prompt, job in zip(prompts, jobs):
            assert read(job) == reference.tokens(prompt, 20)
    cache = engine.prompt_cache
    cache.check_integrity()
    stats = cache.stats()
    assert stats.evictions["evicted"] > 10
    assert 0 < stats.bytes <= bound
    assert stats.hit_tokens > 0
