"""Several answers to one request: ``n``, and several prompts."""

import http.client
import json
import queue
from statistics import mean

import pytest
from helpers import ALONE, JSON, Reference, call, plugin, submit, texts, wait_until_idle

from mlx_lm_ext.request.request import Token
from mlx_lm_ext.server.answer import Delta
from mlx_lm_ext.server.api import rank

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello there"}]


def ask(port, path=TEXT, **body):
    status, answer = call(port, "POST", path, body)
    assert status == 200, answer
    assert [c["index"] for c in answer["choices"]] == [*range(len(answer["choices"]))]
    return answer


def texts_of(answer):
    return [
        c.get("text", c.get("message", {}).get("content")) for c in answer["choices"]
    ]


def streamed(port, path=TEXT, **body):
    """The texts, the finish reasons and the usage of a streamed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    connection.request("POST", path, json.dumps(body), JSON)
    raw = connection.getresponse().read().decode()
    connection.close()
    events = [e.removeprefix("data: ") for e in raw.split("\n\n") if e[:1] == "d"]
    assert events.pop() == "[DONE]"
    *chunks, last = map(json.loads, events)
    parts, reasons, roles = {}, {}, {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        i, delta = choice["index"], choice.get("delta", choice)
        text = delta.get("content", delta.get("text")) or ""
        parts[i] = parts.get(i, "") + text
        roles[i] = roles.get(i, 0) + ("role" in delta)
        if choice["finish_reason"] is not None:
            assert i not in reasons
            reasons[i] = choice["finish_reason"]
    if path == CHAT:
        assert set(roles.values()) == {1}
    n = len(parts)
    return [parts[i] for i in range(n)], [reasons[i] for i in range(n)], last["usage"]


def test_answer_that_ends_at_a_stop_word_leaves_the_others_alone(start_server):
    engine, port = start_server("llama", *ALONE)
    reference = Reference(engine.cli_args.model)
    whole = [reference.text(prompt, 40) for prompt in texts(3)]
    word = next(c for c in whole[0][4:] if c not in whole[1] + whole[2])
    answer = ask(port, prompt=texts(3), max_tokens=40, temperature=0, stop=word)
    assert texts_of(answer) == [whole[0].partition(word)[0], *whole[1:]]


@pytest.mark.parametrize("argv", [[], ["--use-prompt-cache"]], ids=["without", "cache"])
def test_each_prompt_is_answered(argv, start_server):
    engine, port = start_server("llama", *argv)
    reference = Reference(engine.cli_args.model)
    prompts = texts(5)
    answer = ask(port, prompt=prompts, max_tokens=6, temperature=0)
    assert texts_of(answer) == [reference.text(p, 6) for p in prompts]
    ids = [reference.tokenizer.encode(p) for p in prompts]
    assert texts_of(ask(port, prompt=ids, max_tokens=6)) == texts_of(answer)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_seed_of_each_answer_follows_that_of_the_first(start_server):
    _, port = start_server()
    body = dict(prompt="Hello", max_tokens=8, temperature=1.0)
    answers = texts_of(ask(port, n=3, seed=5, **body))
    assert answers == [texts_of(ask(port, seed=s, **body))[0] for s in (5, 6, 7)]
    # Those of each prompt begin anew.
    both = texts_of(ask(port, n=2, seed=5, **body | {"prompt": ["Hello", "Hello"]}))
    assert both == answers[:2] * 2


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_streamed_answers_are_those_in_one_piece(path, start_server):
    _, port = start_server()
    body = dict(max_tokens=9, temperature=1.0, seed=1, n=4)
    body |= {"messages": HELLO} if path == CHAT else {"prompt": ["One", "Two two"]}
    answer = ask(port, path, **body)
    parts, reasons, usage = streamed(port, path, **body)
    assert parts == texts_of(answer)
    assert reasons == [c["finish_reason"] for c in answer["choices"]]
    assert usage["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert usage["prompt_tokens"] == answer["usage"]["prompt_tokens"]


def test_usage_counts_the_prompt_once_and_all_answers(start_server):
    _, port = start_server()
    body = {"logit_bias": {i: -100 for i in range(3)}, "max_tokens": 7}
    one = ask(port, prompt="Hello there", **body)["usage"]
    three = ask(port, prompt="Hello there", n=3, **body)["usage"]
    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["completion_tokens"] == 3 * 7
    assert three["total_tokens"] == one["prompt_tokens"] + 21


@pytest.fixture
def observed():
    """A plugin that observes the end of requests; gives it, and a function that gives the
    statistics of the next ``n`` of them with their requests."""
    seen = queue.Queue()
    hooks = plugin(
        mlx_lm_request_finished=lambda request, stats: seen.put((request, stats))
    )
    return hooks, lambda n: [seen.get(timeout=60) for _ in range(n)]


def test_prompt_of_several_answers_is_run_once(start_server, observed):
    hooks, finished = observed
    _, port = start_server(plugin=hooks)
    usage = ask(port, prompt="x" * 1000, n=8, max_tokens=2)["usage"]
    ran = [stats.prompt_tokens - stats.cached_tokens for _, stats in finished(8)]
    assert sorted(ran) == [1] * 7 + [usage["prompt_tokens"]]


def test_each_answer_ends_by_itself(start_server):
    _, port = start_server()
    body = dict(prompt="Hello", n=6, max_tokens=40, temperature=1.5, seed=3)
    free = texts_of(ask(port, **body))
    stop = free[2][3:5]
    answer = ask(port, stop=stop, **body)
    assert texts_of(answer) == [text.partition(stop)[0] for text in free]
    parts, reasons, _ = streamed(port, stop=stop, **body)
    assert parts == texts_of(answer)
    assert reasons == [c["finish_reason"] for c in answer["choices"]]


def test_best_answers_are_those_that_had_time():
    def answer(logprob, reason):
        tokens = [] if logprob is None else [Token(1, logprob)]
        return Delta(tokens=tokens, finish_reason=reason)

    answers = [
        answer(None, "timeout"),
        answer(-1.0, "timeout"),
        answer(-3.0, "stop"),
        answer(-2.0, "length"),
    ]
    assert sorted(answers, key=rank) == [answers[i] for i in (3, 2, 1, 0)]


def test_all_answers_of_a_client_that_leaves_are_cancelled(start_server, observed):
    hooks, finished = observed
    engine, port = start_server(plugin=hooks)
    body = dict(prompt="x", n=4, max_tokens=3000, stream=True)
    body["logit_bias"] = {i: -100 for i in range(3)}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", TEXT, json.dumps(body), JSON)
    response = connection.getresponse()
    response.read(100)
    response.close()
    connection.close()
    assert {stats.finish_reason for _, stats in finished(4)} == {"cancelled"}
    wait_until_idle(engine)
    assert engine.counters.generated_tokens < 4 * 3000


def test_plugins_hear_of_the_end_of_each_answer(start_server, observed):
    hooks, finished = observed
    _, port = start_server(plugin=hooks)
    answer = ask(port, prompt=["a", "bc"], n=2, max_tokens=3, temperature=1.0)
    heard = finished(4)
    assert [request.id for request, _ in heard] == [answer["id"]] * 4
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    assert [stats.finish_reason for _, stats in heard] == reasons
    n_tokens = sum(stats.completion_tokens for _, stats in heard)
    assert n_tokens == answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("argv", [[], ALONE], ids=["batch", "alone"])
def test_best_answers_are_those_with_the_likeliest_tokens(argv, start_server):
    _, port = start_server("llama", *argv)
    body = dict(prompt=["Hello", "you"], max_tokens=6, temperature=1.5, seed=1)
    all_of_them = ask(port, n=5, logprobs=1, **body)
    best = []
    for i in (0, 5):
        group = all_of_them["choices"][i : i + 5]
        # The token that ends an answer counts, and is not shown.
        means = [mean(c["logprobs"]["token_logprobs"]) for c in group]
        assert {c["finish_reason"] for c in group} == {"length"}
        order = sorted(range(5), key=means.__getitem__, reverse=True)
        best += [group[j] for j in order[:2]]
    for logprobs in (None, 1):
        answer = ask(port, n=2, best_of=5, logprobs=logprobs, **body)
        assert texts_of(answer) == [c["text"] for c in best]
        assert answer["usage"] == all_of_them["usage"]
        for choice, wanted in zip(answer["choices"], best):
            shown = wanted["logprobs"] if logprobs else None
            assert choice.get("logprobs") == shown
    echoed = ask(port, n=2, best_of=5, echo=True, **body)
    said = ["Hello"] * 2 + ["you"] * 2
    assert texts_of(echoed) == [s + c["text"] for s, c in zip(said, best)]


def test_error_of_one_prompt_is_that_of_the_request(start_server):
    _, port = start_server()
    status, answer = call(port, "POST", TEXT, {"prompt": ["a", "x" * 5000]})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body, param",
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"n": 2, "best_of": 3, "stream": True}, "stream"),
        ({"prompt": ["a"] * 65, "best_of": 2}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ],
)
def test_what_cannot_be_answered_is_refused(body, param, start_server):
    _, port = start_server()
    status, answer = call(port, "POST", TEXT, {"prompt": "Hello"} | body)
    assert (status, answer["error"]["param"]) == (400, param)


def test_several_answers_are_served_although_one_row_runs_at_a_time(start_server):
    _, port = start_server("llama", "--batch-size", "1")
    body = dict(prompt=["a", "bc"], n=2, max_tokens=5, temperature=1.0, seed=1)
    answers = texts_of(ask(port, **body))
    assert len(answers) == 4 and streamed(port, **body)[0] == answers


def test_requests_served_alone_have_several_answers(start_server):
    engine, port = start_server("llama", "--kv-bits", "8")
    assert not engine.has_batches
    body = dict(prompt=["a", "bc"], n=2, max_tokens=5)
    answers = texts_of(ask(port, **body))
    assert len(answers) == 4 and answers[0] == answers[1]
    assert submit(engine, "a", max_tokens=1).index == 0
