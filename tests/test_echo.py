"""Text completions that begin with the prompt, and the log probabilities of its tokens."""

from functools import cache
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers import (
    ALONE,
    Reference,
    active_memory,
    call,
    only_error,
    read,
    saying,
    stream,
    submit,
    texts,
    wait_until_idle,
)
from mlx_lm.server import CompletionRequest
from test_kv_memory import memory_of
from test_logprobs import EXACT
from tiny_models import CONFIGS, UNBATCHABLE
from tiny_tokenizers import KINDS

from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.bench.random_model import SPECIAL
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.engine.prompt_scores import PromptScores
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.request.request import NO_TIME, Token
from mlx_lm_ext.request.served_model import ServedModel
from mlx_lm_ext.server.answer import AnswerParser

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
END = SPECIAL.index("<|im_end|>")
GREEDY = {"temperature": 0, "logit_bias": {END: -1000}}


@cache
def model_of(kind):
    return ServedModel(None, KINDS[kind](), 0, None, 0, False, None)


def ask(port, prompt, **body):
    body = {"prompt": prompt, "echo": True} | body
    status, answer = call(port, "POST", TEXT, body)
    assert status == 200, answer
    return answer


def expected_logprobs(model, ids):
    """The log probabilities of all tokens after each token of a prompt, in one pass."""
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def assert_scored(choice, model, ids, n_top):
    """Check the log probabilities of a prompt, which those of the answer may follow."""
    found = choice["logprobs"]
    wanted = expected_logprobs(model, ids)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    n = len(ids)
    own = [wanted[i, token] for i, token in enumerate(ids[1:])]
    assert found["token_logprobs"][1:n] == pytest.approx(own, abs=1e-3)
    for i, tops in enumerate(found["top_logprobs"][1:n]):
        best = sorted(wanted[i])[::-1][:n_top]
        assert sorted(tops.values())[::-1][:n_top] == pytest.approx(best, abs=1e-3)
        # What is compared to see whether a token is the most likely one.
        assert max(tops.values(), default=own[i]) >= found["token_logprobs"][i + 1]
    assert "".join(found["tokens"]) == choice["text"]
    offsets = [len("".join(found["tokens"][:i])) for i in range(len(found["tokens"]))]
    assert found["text_offset"] == offsets


@pytest.mark.parametrize("argv", [[], ALONE], ids=["batch", "alone"])
@pytest.mark.parametrize("n_tokens", [0, 5])
def test_prompt_comes_before_the_answer(n_tokens, argv, start_server):
    engine, port = start_server("llama", *argv)
    reference = Reference(engine.cli_args.model)
    prompts = texts(4)
    ids = list(map(reference.tokenizer.encode, prompts))
    answers = [reference.text(p, n_tokens) if n_tokens else "" for p in prompts]
    for sent in (prompts, ids):
        answer = ask(port, sent, max_tokens=n_tokens)
        for choice, prompt, rest in zip(answer["choices"], prompts, answers):
            assert choice["text"] == prompt + rest
            assert n_tokens or choice["finish_reason"] == "length"
        usage = answer["usage"]
        assert usage["prompt_tokens"] == sum(map(len, ids))
        if not n_tokens:
            assert usage["completion_tokens"] == 0


@pytest.mark.parametrize("architecture", [*CONFIGS, *UNBATCHABLE])
@pytest.mark.parametrize("argv", [[], ["--use-prompt-cache"]], ids=["without", "cache"])
def test_prompt_is_scored_as_in_one_pass(argv, architecture, start_server):
    argv = [*argv, "--prefill-step-size", "16"]
    engine, port = start_server(architecture, *argv)
    reference = Reference(engine.cli_args.model)
    prompts = ["Hello there, " * 5, "x", "ab"]
    for n_tokens in (0, 4):
        answer = ask(port, prompts, max_tokens=n_tokens, logprobs=3, **GREEDY)
        plain = ask(port, prompts, max_tokens=max(1, n_tokens), echo=False, **GREEDY)
        for choice, prompt, one in zip(answer["choices"], prompts, plain["choices"]):
            ids = reference.tokenizer.encode(prompt)
            assert_scored(choice, reference.model, ids, 3)
            assert len(choice["logprobs"]["tokens"]) == len(ids) + n_tokens
            if n_tokens:
                assert choice["text"] == prompt + one["text"]
        if engine.has_batches:
            usage = answer["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_request_of_an_evaluation_is_answered(start_server):
    engine, port = start_server()
    reference = Reference(engine.cli_args.model)
    ids = [reference.tokenizer.encode(text) for text in texts(5)]
    body = dict(max_tokens=1, logprobs=1, temperature=0, seed=1234)
    for choice, prompt in zip(ask(port, ids, **body)["choices"], ids):
        assert_scored(choice, reference.model, prompt, 1)


def test_scores_of_the_prompt_know_no_penalties(start_server):
    engine, port = start_server()
    reference = Reference(engine.cli_args.model)
    body = dict(logit_bias={100: 50}, repetition_penalty=1.5, temperature=2.0)
    (choice,) = ask(port, "Hello", max_tokens=0, logprobs=0, **body)["choices"]
    assert_scored(choice, reference.model, reference.tokenizer.encode("Hello"), 0)


def test_several_answers_have_the_same_scores_which_are_computed_once(
    start_server, monkeypatch
):
    made = []
    init = PromptScores.__init__
    monkeypatch.setattr(
        PromptScores, "__init__", lambda self, *args: made.append(init(self, *args))
    )
    _, port = start_server()
    answer = ask(port, ["Hello", "you"], n=3, max_tokens=4, logprobs=1, temperature=1.5)
    for i, prompt in enumerate(["Hello"] * 3 + ["you"] * 3):
        logprobs = answer["choices"][i]["logprobs"]["token_logprobs"]
        first = answer["choices"][i // 3 * 3]["logprobs"]["token_logprobs"]
        assert logprobs[: len(prompt)] == first[: len(prompt)]
        assert answer["choices"][i]["text"].startswith(prompt)
    assert len(made) == 2


def test_answer_starts_with_what_was_run_of_its_prompt(start_engine):
    engine = start_engine()
    ran = []
    make = engine.batch_class.add

    def add(batch, request):
        make(batch, request)
        ran.extend(row.n_tokens - row.n_run for row in batch.rows.values())

    engine.batch_class = type("Watched", (engine.batch_class,), {"add": add})
    read(submit(engine, "x" * 300, max_tokens=2, echo=True, logprobs=1, **GREEDY))
    assert ran == [1]
    assert engine.batch.prompt_cache.nbytes == 0


@pytest.mark.parametrize("logprobs", [None, 2])
def test_prompt_is_the_first_chunk_of_a_stream(logprobs, start_server):
    _, port = start_server()
    body = dict(prompt="Hello", echo=True, max_tokens=6, logprobs=logprobs, **GREEDY)
    (whole,) = ask(port, **body)["choices"]
    parts = [event["choices"][0] for event in stream(port, TEXT, **body)]
    assert parts[0]["text"] == "Hello"
    assert "".join(part["text"] for part in parts) == whole["text"]
    if logprobs:
        for name, values in whole["logprobs"].items():
            streamed = [v for part in parts for v in part["logprobs"][name]]
            assert streamed == values


def parse(kind, prompt, ids, answer, stop=()):
    """The text and the chosen tokens of an answer after the prompt of these ids."""
    body = {"echo": True}
    request = SimpleNamespace(
        model=model_of(kind),
        completion=CompletionRequest("text", prompt, [], None, None),
        body=body,
        args=SimpleNamespace(stop_words=list(stop), logprobs=True),
        initial_state="normal",
        prompt=ids,
        prompt_logprobs=[Token(i, -0.5) for i in ids],
    )
    parser = AnswerParser(request)
    tokens = [*(Token(i, -0.5) for i in answer), Token(2, -0.5, (), "stop")]
    deltas = [parser.echo(request), *(parser.feed([token]) for token in tokens)]
    chosen = [c for delta in deltas for c in delta.logprobs]
    return "".join(delta.text for delta in deltas), chosen


@pytest.mark.parametrize("kind", EXACT)
def test_text_goes_on_after_the_prompt_wherever_it_ends(kind):
    text = "hello the 世 😀, x 世. " * 3
    tokenizer = model_of(kind).tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    for n in range(1, len(ids)):
        said, chosen = parse(kind, ids[:n], ids[:n], ids[n:])
        assert said == "".join(c.text for c in chosen) == whole
        assert [c.token.id for c in chosen] == ids
        # As if the client had sent the text of these tokens.
        prompt = tokenizer.decode(ids[:n])
        if "\ufffd" not in prompt:
            said, chosen = parse(kind, prompt, ids[:n], ids[n:])
            assert said == "".join(c.text for c in chosen) == whole
            assert [c.offset for c in chosen][n] == len(prompt)


def test_token_before_a_text_has_no_text():
    ids = model_of("byte level").tokenizer.encode("hello", add_special_tokens=False)
    model_of("byte level").tokenizer.bos_token = "<s>"
    said, chosen = parse("byte level", "hello", [1, *ids], [])
    assert said == "hello"
    assert [c.text for c in chosen] == ["", *"hello"]
    said, _ = parse("byte level", [1, *ids], [1, *ids], [])
    assert said == "<s>hello"


def test_answer_begins_after_the_text_of_a_prompt_whose_tokens_have_another():
    kind = "sentencepiece without strip"
    tokenizer = model_of(kind).tokenizer
    ids = tokenizer.encode("hello hello", add_special_tokens=False)
    assert tokenizer.decode(ids) == " hello hello"
    said, chosen = parse(kind, "hello hello", ids, ids[-1:])
    assert said == "hello helloo"
    assert chosen[-1].offset == len("hello hello")


def test_stop_words_are_not_looked_for_in_the_prompt(start_server):
    _, port = start_server(plugin=saying("world. Hello"))
    (choice,) = ask(port, "Hello ", stop="Hello", logprobs=1)["choices"]
    assert choice["text"] == "Hello world. "
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_prompt_may_fill_the_context_if_nothing_is_to_follow(start_server):
    _, port = start_server("llama", "--context-length", "20")
    assert ask(port, "x" * 20, max_tokens=0, logprobs=1)
    for prompt, n in (("x" * 20, 1), ("x" * 21, 0)):
        body = {"prompt": prompt, "max_tokens": n, "echo": True}
        status, answer = call(port, "POST", TEXT, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_streams_go_on_while_a_long_prompt_is_scored(start_engine):
    engine = start_engine("llama", "--prefill-step-size", "8")
    other = submit(engine, "Hello", max_tokens=3000, **GREEDY)
    other.receive(timeout=60)
    scored = submit(engine, "x" * 800, max_tokens=0, echo=True, logprobs=1)
    n_before, n_after = other.n_generated, 0
    while not scored.finished:
        scored.receive(timeout=60)
        n_after = other.n_generated
    assert n_after - n_before > 800 // 8 - 10
    assert len(scored.prompt_logprobs) == 800
    engine.client.cancel(other)


class Beside(Engine):
    """Notes which requests begin while a prompt is scored."""

    def begin(self, request):
        self.begun = getattr(self, "begun", {}) | {request: bool(self.scored)}
        super().begin(request)


@pytest.mark.parametrize(
    "n_places, is_running, is_beside",
    [(768, False, False), (3072, False, True), (3072, True, False), (8000, True, True)],
)
def test_kv_of_a_prompt_that_is_scored_counts_when_others_start(
    n_places, is_running, is_beside, start_engine
):
    argv = *memory_of(1, n_places), "--prefill-step-size", "4"
    engine = start_engine("llama", *argv, make_engine=Beside)
    if is_running:
        running = submit(engine, "Hello", max_tokens=600, **GREEDY)
        running.receive(timeout=60)
    scored = submit(engine, "x" * 600, max_tokens=1, echo=True, logprobs=1)
    while engine.scores is None:
        pass
    other = submit(engine, "y" * 300, max_tokens=1)
    assert len(read(other)) == len(read(scored)) == 1
    assert engine.begun[other] == is_beside
    if is_running:
        engine.client.cancel(running)


def test_kv_of_a_prompt_that_is_scored_counts_when_rows_grow(start_engine):
    counted = set()

    class Counting(Batch):
        def outgrows_memory(self, beside):
            counted.update(beside)
            return super().outgrows_memory(beside)

    class CountingEngine(Engine):
        batch_class = Counting

    argv = "llama", "--prefill-step-size", "4"
    engine = start_engine(*argv, make_engine=CountingEngine)
    running = submit(engine, "Hello", max_tokens=600, **GREEDY)
    running.receive(timeout=60)
    scored = submit(engine, "x" * 100, max_tokens=0, echo=True, logprobs=1)
    read(scored)
    assert counted == {scored}
    engine.client.cancel(running)


@pytest.mark.parametrize("n_tokens", [0, 5])
def test_request_is_cancelled_while_its_prompt_is_scored(n_tokens, start_engine):
    engine = start_engine("llama", "--prefill-step-size", "4")
    before = active_memory()
    body = dict(max_tokens=n_tokens, echo=True, logprobs=1)
    jobs = [submit(engine, "x" * 4000, **body) for _ in range(3)]
    for job in jobs:
        engine.client.cancel(job)
    wait_until_idle(engine)
    assert engine.scores is None and not engine.unfinished
    assert not any(job.prompt_logprobs for job in jobs)
    assert active_memory() <= before + 1e6


@pytest.mark.logs_errors
@pytest.mark.parametrize("argv", [[], ALONE], ids=["batch", "alone"])
def test_error_while_a_prompt_is_scored_ends_its_request_only(
    argv, start_engine, monkeypatch, caplog
):
    engine = start_engine("llama", *argv)
    other = submit(engine, "Hello", max_tokens=50, **GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(PromptScores, "step", lambda self, n: 1 / 0)
        scored = submit(engine, "Hello", max_tokens=1, echo=True, logprobs=1)
        with pytest.raises(RequestError):
            read(scored)
    assert only_error(caplog) == "A request failed"
    assert len(read(other)) == 50
    assert read(submit(engine, "Hello", max_tokens=1, echo=True, logprobs=1))


def test_request_ends_late_while_its_prompt_is_scored(start_engine):
    engine = start_engine(
        "llama", "--prefill-step-size", "1", "--request-timeout", "0.3"
    )
    scored = submit(engine, "x" * 4000, max_tokens=1, echo=True, logprobs=1)
    assert read(scored) == [NO_TIME.id]
    wait_until_idle(engine)
    assert engine.scores is None


def test_request_is_told_that_the_server_stops_while_its_prompt_is_scored(start_engine):
    engine = start_engine("llama", "--prefill-step-size", "1")
    scored = submit(engine, "x" * 4000, max_tokens=1, echo=True, logprobs=1)
    while engine.scores is None:
        pass
    engine.stop_and_join()
    with pytest.raises(RequestError) as e:
        read(scored)
    assert e.value.status == 503


@pytest.mark.parametrize(
    "path, body, param",
    [
        (TEXT, {"max_tokens": 0}, "max_tokens"),
        (TEXT, {"max_tokens": 0, "echo": False}, "max_tokens"),
        (TEXT, {"echo": 1}, "echo"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_what_cannot_be_repeated_is_refused(path, body, param, start_server):
    _, port = start_server()
    said = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    status, answer = call(port, "POST", path, said | body)
    assert (status, answer["error"]["param"]) == (400, param)
