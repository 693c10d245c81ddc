"""What the prompt cache gives to requests: never other tokens than from cold."""

import logging
import random
import threading
from functools import partial
from types import SimpleNamespace

import integrity
import mlx.core as mx
import pytest
from helpers import (
    ALONE,
    Reference,
    active_memory,
    only_error,
    read,
    submit,
    texts,
    wait_until_idle,
)
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, make_prompt_cache
from mlx_lm.server import CompletionRequest, ModelProvider, ResponseGenerator
from tiny_models import CONFIGS, UNBATCHABLE, make_adapter, make_model

from mlx_lm_ext import demo_model
from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.bench.random_model import SPECIAL, write_model
from mlx_lm_ext.cache import prompt_cache as radix_cache
from mlx_lm_ext.cache.prompt_cache import RadixPromptCache
from mlx_lm_ext.engine.alone import SaltedCache
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.request.fields import make_generation_arguments

CACHE = "--use-prompt-cache"


@pytest.fixture
def folder_of(model_folder):
    """The folder of a tiny model, or of the default model."""

    def find(architecture):
        if architecture == "default model":
            return demo_model.ensure(False)
        return model_folder(architecture)

    return find


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*CONFIGS, *UNBATCHABLE, "default model"])
def test_tokens_equal_those_from_cold(architecture, folder_of, start_engine):
    folder = folder_of(architecture)
    reference = Reference(folder)
    argv = [CACHE, "--prefill-step-size", "32", "--model", str(folder)]
    engine = start_engine("llama", *argv)
    prompt = reference.tokenizer.encode(texts(1, seed=3)[0] * 9)[:90]
    other = [t for t in range(65, 91) if t not in (prompt[0], prompt[45], prompt[-1])]
    n = 8 if architecture == "default model" else 20
    answer = reference.tokens(prompt, n)
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
        job = submit(engine, tokens, max_tokens=n)
        assert read(job) == reference.tokens(tokens, n), name
        found[name] = job.n_matched
        integrity.check(engine.prompt_cache)
    assert found["cold"] == found["one other token"] == found["one token"] == 0
    # On the CPU the last token is not run: it is handed out first.
    assert found["next turn"] in (90 + n - 1, 90 + n)
    # Upstream keeps what it serves alone at its end only.
    if architecture not in UNBATCHABLE:
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
    engine.client.cancel(job)
    retry = submit(engine, prompt + job.generated[:20], max_tokens=2)
    read(retry)
    assert retry.n_matched == len(prompt) + 19


def test_rows_that_end_together_are_copied_in_one_call(start_engine, monkeypatch):
    class PatientEngine(Engine):
        def admit(self):
            if self.batch or len(self.waiting) == 3:
                super().admit()

    engine = start_engine("llama", "--use-prompt-cache", make_engine=PatientEngine)
    cache, calls = engine.prompt_cache, []
    evaluate = cache.evaluate
    monkeypatch.setattr(
        cache, "evaluate", lambda: (calls.append(len(cache)), evaluate())
    )
    for job in [submit(engine, [token] * 9, max_tokens=3) for token in (65, 66, 67)]:
        read(job)
    wait_until_idle(engine)
    assert set(calls) == {0, 3} and len(cache) == 3


@pytest.mark.logs_errors
def test_rows_end_as_always_when_their_kv_cannot_be_copied(
    start_engine, monkeypatch, caplog
):
    class HearingEngine(Engine):
        def forget(self, request):
            super().forget(request)
            forgotten.append(request)

    def out_of_memory(arrays):
        raise MemoryError("no room")

    forgotten = []
    engine = start_engine("llama", "--use-prompt-cache", make_engine=HearingEngine)
    expected = Reference(engine.cli_args.model).tokens("hello", 3)
    with monkeypatch.context() as patch:
        patch.setattr(radix_cache, "mx", SimpleNamespace(eval=out_of_memory))
        job = submit(engine, "hello", max_tokens=3)
        assert read(job) == expected
        wait_until_idle(engine)
    assert only_error(caplog).startswith("KV cannot be copied")
    assert forgotten == [job] and not engine.prompt_cache.nbytes
    assert read(submit(engine, "hello", max_tokens=3)) == expected


def test_request_cancelled_in_its_prefill_leaves_what_it_has_run(start_engine):
    class CancellingBatch(Batch):
        def step(self):
            if self.n_steps == 3:
                engine.client.cancel(self.requests[0])
            return super().step()

    class CancellingEngine(Engine):
        batch_class = CancellingBatch

    argv = ["--use-prompt-cache", "--batch-size", "1", "--prefill-step-size", "8"]
    engine = start_engine("llama", *argv, make_engine=CancellingEngine)
    submit(engine, "x" * 300, max_tokens=5)
    retry = submit(engine, "x" * 300, max_tokens=2)
    read(retry)
    assert retry.n_matched == 8 * 4


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v2"])
def test_prompt_takes_what_a_running_request_has_of_it(architecture, start_engine):
    engine = start_engine(architecture, "--use-prompt-cache")
    prefix = "what two prompts have in common"
    expected = Reference(engine.cli_args.model).tokens(prefix + "?", 5)
    running = submit(engine, prefix + "!", max_tokens=4000)
    running.receive(timeout=60)
    assert not engine.prompt_cache.nbytes
    other = submit(engine, prefix + "?", max_tokens=5)
    assert read(other) == expected
    assert other.n_matched == len(prefix) and not running.finished
    engine.client.cancel(running)


def test_prompt_of_one_token_is_cancelled_before_its_first_step(start_engine):
    class CancellingBatch(Batch):
        def prefill(self, *args):
            super().prefill(*args)
            for request in self.requests:
                engine.client.cancel(request)

    class CancellingEngine(Engine):
        batch_class = CancellingBatch

        def forget(self, request):
            super().forget(request)
            gone.set()

    gone = threading.Event()
    engine = start_engine("llama", "--use-prompt-cache", make_engine=CancellingEngine)
    job = submit(engine, [65], max_tokens=5)
    assert gone.wait(60) and not job.generated


def test_nothing_is_kept_without_a_prompt_cache(start_engine):
    engine = start_engine()
    for _ in range(2):
        job = submit(engine, "the same prompt twice", max_tokens=4)
        read(job)
        assert job.n_matched == 0
    assert engine.prompt_cache is None and engine.batch.prompt_cache.nbytes == 0


def test_request_alone_leaves_its_kv_however_it_ends(start_engine):
    engine = start_engine("llama", "--use-prompt-cache", *ALONE)
    prompt = Reference(engine.cli_args.model).tokenizer.encode("served alone")
    for max_tokens in (4000, 25):
        job = submit(engine, prompt, max_tokens=max_tokens)
        while len(job.generated) < 20:
            job.receive(timeout=60)
        engine.client.cancel(job)
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


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*CONFIGS, "default model"])
def test_turns_of_a_chat_equal_those_from_cold(architecture, folder_of, start_engine):
    folder = folder_of(architecture)
    reference = Reference(folder)
    engine = start_engine("llama", CACHE, "--model", str(folder))
    messages = [{"role": "system", "content": "Be brief, and kind, and so on."}]
    for question in texts(4, longest=40):
        messages.append({"role": "user", "content": question})
        job = submit(engine, messages=messages, max_tokens=12)
        assert read(job) == reference.tokens(job.prompt, 12)
        assert job.n_matched >= job.n_prompt - len(question) - 60
        messages.append({"role": "assistant", "content": "x" * 10})
    integrity.check(engine.prompt_cache)


@pytest.mark.slow
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
    integrity.check(cache)
    stats = cache.stats()
    assert stats.evictions["evicted"] > 10
    assert 0 < stats.bytes <= bound
    assert stats.hit_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "falcon_h1"])
def test_memory_is_what_the_cache_says(architecture, start_engine, tmp_path, request):
    # A buffer that MLX uses again may be larger than what is in it.
    request.addfinalizer(partial(mx.set_cache_limit, mx.set_cache_limit(0)))
    # Heads as large as those of real models: MLX allocates whole pages.
    config = CONFIGS[architecture] | dict(head_dim=64, num_key_value_heads=4)
    folder = write_model(tmp_path / "model", architecture, config)
    argv = [CACHE, "--radix-cache-size", "50MB", "--model", str(folder)]
    engine = start_engine(architecture, *argv)
    before = active_memory()
    rng = random.Random(5)
    known = texts(5, longest=100, seed=6)
    for _ in range(40):
        prompts = [rng.choice(known) + end for end in texts(25, 30, rng.random())]
        known = rng.sample(prompts, 3) + rng.sample(known, 2)
        for job in [submit(engine, p, max_tokens=3) for p in prompts]:
            read(job)
    cache = engine.prompt_cache
    wait_until_idle(engine)
    integrity.check(cache)
    assert cache.stats().evictions["evicted"] > 10
    held = active_memory() - before
    assert held == pytest.approx(cache.nbytes, rel=0.01)


def test_no_other_model_finds_a_prompt(model_folder, start_engine, tmp_path):
    other = str(make_model(tmp_path / "other", "llama", seed=7))
    adapter = str(make_adapter(tmp_path / "adapter", model_folder()))
    engine = start_engine("llama", CACHE, "--allow-models", "any")
    prompt = "the same tokens for all of them"
    answers = {}
    for kwargs in ({}, {"model": other}, {"adapters": adapter}):
        for expected in (0, len(prompt) - 1):
            job = submit(engine, prompt, max_tokens=10, **kwargs)
            answers.setdefault(str(kwargs), []).append(read(job))
            assert job.n_matched == expected
    references = [
        Reference(model_folder()),
        Reference(other),
        Reference(model_folder(), adapter),
    ]
    for found, reference in zip(answers.values(), references):
        assert found == [reference.tokens(prompt, 10)] * 2
    assert len({str(a) for a in answers.values()}) == 3


@pytest.mark.parametrize("argv", [[], ALONE])
def test_requests_with_other_salts_share_nothing(argv, start_engine):
    engine = start_engine("llama", CACHE, *argv)
    prompt = "a secret that others would like to guess"

    def n_matched(**body):
        job = submit(engine, prompt, max_tokens=3, **body)
        read(job)
        wait_until_idle(engine)
        return job.n_matched

    known = len(prompt) - 1
    assert n_matched(cache_salt="mine") == 0
    assert n_matched(cache_salt="mine") == known
    assert n_matched(cache_salt="theirs") == 0
    assert n_matched() == 0
    assert n_matched() == known


@pytest.mark.parametrize("size", [0, 9])
@pytest.mark.parametrize("argv", [[], ALONE])
def test_penalties_see_what_comes_from_the_cache(argv, size, start_engine):
    engine = start_engine("llama", CACHE, *argv)
    body = dict(frequency_penalty=-2.0, frequency_context_size=size)
    prompt = "a text that its answer likes to repeat"
    answers = []
    for _ in range(2):
        job = submit(engine, prompt, max_tokens=20, **body)
        answers.append(read(job))
        wait_until_idle(engine)
    assert answers[0] == answers[1]
    assert job.n_matched or not size


@pytest.mark.parametrize(
    "context, draft, n_sought",
    # A context of 0 is all tokens. Those of the image are run together.
    [
        (None, None, 8),
        (1, None, 8),
        (2, None, 7),
        (5, None, 2),
        (0, None, 1),
        (0, "x", 8),
    ],
)
def test_request_alone_runs_what_its_penalties_look_at(context, draft, n_sought):
    class Cache:
        def fetch_nearest_cache(self, key, tokens):
            self.n_sought = len(tokens)
            return None, tokens

    body = {"presence_penalty": 1.0, "presence_context_size": context}
    if context is None:
        body = {}
    args = make_generation_arguments(body, make_parser().parse_args([]))
    model = SimpleNamespace(key=("model", None, draft))
    cache = Cache()
    single = SaltedCache(SimpleNamespace(args=args, model=model, cache_key=1), cache)
    tokens = [1, 2, -7, -7, -7, 3, 4, 5]
    assert single.fetch_nearest_cache(None, tokens) == (None, tokens)
    assert cache.n_sought == n_sought


THINKING = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'].split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("last", ["user", "tool"])
def test_turn_after_reasoning_that_the_template_drops(
    architecture, last, start_engine, model_folder, tmp_path
):
    folder = write_model(
        tmp_path / "thinking",
        architecture,
        CONFIGS[architecture],
        special=[*SPECIAL, "<think>", "</think>"],
        chat_template=THINKING,
    )
    engine = start_engine(architecture, CACHE, "--model", str(folder))
    messages = [
        {"role": "user", "content": "What is the answer to all of this?"},
        {"role": last, "content": "It may be a number."},
    ]
    first = submit(engine, messages=messages, max_tokens=8)
    read(first)
    answer = {"role": "assistant", "content": "Let me see.</think>It is 42."}
    messages += [answer, {"role": "user", "content": "Why?"}]
    second = submit(engine, messages=messages, max_tokens=8)
    assert read(second) == Reference(folder).tokens(second.prompt, 8)
    # All of the prompt but the start of the reasoning.
    assert second.n_matched == first.n_prompt - len("_\n")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_branch_is_resumed_from_the_third_time_on(architecture, start_engine):
    engine = start_engine(architecture, CACHE)
    start = "a long beginning that several prompts have and no one has asked for"
    n_matched = []
    for end in ("A end", "B other", "C", "D last"):
        job = submit(engine, start + end, max_tokens=3)
        read(job)
        wait_until_idle(engine)
        n_matched.append(job.n_matched)
    integrity.check(engine.prompt_cache)
    # A segment can be cut at once; a state has to be left there by the second.
    second = len(start) if architecture in ("llama", "deepseek_v2") else 0
    assert n_matched == [0, second, len(start), len(start)]


@pytest.mark.parametrize("bound", ["0", "1KB"])
def test_bound_below_one_prompt_keeps_nothing(bound, model_folder, start_engine):
    engine = start_engine("llama", CACHE, "--radix-cache-size", bound)
    for _ in range(2):
        job = submit(engine, "the same prompt twice", max_tokens=4)
        assert read(job) == Reference(model_folder()).tokens("the same prompt twice", 4)
        assert job.n_matched == 0
    assert engine.prompt_cache.nbytes == 0


def test_bound_counts_the_running_batch(start_engine):
    held = []

    class Watched(Batch):
        def step(self):
            finished = super().step()
            if self.generator:
                held.append(self.generator.prompt_cache_nbytes + cache.nbytes)
                integrity.check(cache)
            return finished

    class WatchedEngine(Engine):
        batch_class = Watched

    # 512 bytes a token: two rows of 256, a spare one, and 100 tokens beside them.
    bound = 868 * 512
    argv = [CACHE, "--radix-cache-size", str(bound), "--batch-size", "2"]
    engine = start_engine("llama", *argv, make_engine=WatchedEngine)
    cache = engine.prompt_cache
    for job in [submit(engine, p, max_tokens=20) for p in texts(20)]:
        read(job)
    wait_until_idle(engine)
    assert max(held) <= bound
    assert max(held) > 512 * 512
    assert cache.stats().evictions["evicted"] > 5


def test_what_a_hit_takes_is_held_for_one_step_at_most(start_engine):
    class Watched(Batch):
        def step(self):
            assert len(self.prefilling) <= 2
            return super().step()

    class WatchedEngine(Engine):
        batch_class = Watched

    argv = [CACHE, "--prompt-concurrency", "2"]
    engine = start_engine("llama", *argv, make_engine=WatchedEngine)
    for job in [submit(engine, p, max_tokens=5) for p in texts(20)]:
        read(job)
    assert engine.max_rows == 32, "a step failed"


def test_model_with_an_unknown_cache_type_is_served(
    model_folder, start_engine, monkeypatch, caplog
):
    monkeypatch.setattr(
        "mlx_lm.models.llama.Model.make_cache",
        lambda self: [ConcatenateKVCache(), KVCache()],
        raising=False,
    )
    engine = start_engine("llama", CACHE)
    for _ in range(3):
        job = submit(engine, "hello", max_tokens=5)
        assert read(job) == Reference(model_folder()).tokens("hello", 5)
        assert job.n_matched == 0
    wait_until_idle(engine)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        "The prompt cache cannot keep the KV of mlx_lm.models.cache.ConcatenateKVCache"
    ]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "lfm2"])
def test_upstreams_engine_takes_it_for_its_own_cache(architecture, model_folder):
    folder = str(model_folder(architecture))
    args = make_parser().parse_args(["--model", folder])
    args.decode_concurrency, args.prompt_cache_bytes = 4, None
    cache = RadixPromptCache()
    generator = ResponseGenerator(ModelProvider(args), cache)
    reference = Reference(folder)
    start = texts(1, seed=4)[0] + "!"

    def generate(prompt):
        request = CompletionRequest("text", prompt, [], None, None)
        body = dict(max_tokens=10)
        context, responses = generator.generate(
            request, make_generation_arguments(body, args)
        )
        return [r.token for r in responses], context.prompt_cache_count

    try:
        expected = [0, len(start), 0, len(start) - 1]
        for prompt, n_cached in zip((start, start + "?", "other", start), expected):
            tokens, found = generate(prompt)
            assert tokens == reference.tokens(prompt, 10)
            # Others can be resumed only where upstream has stored them.
            assert found == n_cached or architecture != "llama"
    finally:
        generator.stop_and_join()
    integrity.check(cache)
    assert len(cache) > 0
    cache.trim_to(n_sequences=1)
    assert len(cache) == 1
    cache.trim_to(n_bytes=0)
    assert cache.nbytes == 0
