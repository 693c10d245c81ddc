"""How many requests are taken, and how long an answer may take."""

import http.client
import json
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from helpers import ALONE, JSON, call, complete, plugin, saying, stream
from test_access import bearer
from test_api import WatchedEngine

from mlx_lm_ext.engine.admission import MOST_WAIT, Admission
from mlx_lm_ext.errors import RequestError

LONG = dict(prompt="hello", max_tokens=8000, ignore_eos=True)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def admission(max_queue=None, max_per_key=None):
    clock = Clock()
    return Admission(max_queue, max_per_key, clock), clock


def request(started=None, finished=False):
    return SimpleNamespace(started=started, finished=finished)


def retry_after(admission, n=1, key=None):
    with pytest.raises(RequestError) as e:
        with admission.admit(n, key):
            pass
    assert e.value.status == 429
    assert e.value.code == "rate_limit_exceeded"
    return int(e.value.headers["Retry-After"])


# The count


def test_answers_wait_until_their_requests_start():
    gate, _ = admission()
    with gate.admit(3, None) as ticket:
        assert gate.n_waiting == 3
        ticket.requests = [request(), request(started=1.0), request(finished=True)]
        assert gate.n_waiting == 1
    assert gate.n_waiting == 0


def test_queue_takes_so_many_answers_and_a_single_request_of_any_size():
    gate, _ = admission(max_queue=4)
    with gate.admit(9, None) as ticket:
        assert retry_after(gate) == 1
        ticket.requests = [request(started=1.0)] * 9
        with gate.admit(3, None), gate.admit(1, None):
            retry_after(gate)
    assert gate.n_waiting == 0


def test_request_that_is_refused_or_raises_leaves_nothing_behind():
    gate, _ = admission(max_queue=1, max_per_key=1)
    with gate.admit(1, "a"):
        retry_after(gate, key="a")
    with pytest.raises(ArithmeticError):
        with gate.admit(1, "a"):
            raise ArithmeticError
    assert not gate.tickets and not gate.ends


def test_key_has_so_many_answers_whoever_else_has_some():
    gate, _ = admission(max_per_key=2)
    with gate.admit(1, "a") as ticket, gate.admit(2, "b"), gate.admit(1, "a"):
        ticket.requests = [request(started=1.0)]
        retry_after(gate, key="a")
        with gate.admit(1, "c"):
            pass


def test_wait_is_the_time_in_which_as_many_answers_have_ended():
    gate, clock = admission(max_queue=8)
    for _ in range(5):
        clock.now += 2.0
        with gate.admit(1, None) as ticket:
            ticket.requests = [request(started=1.0)]
    with gate.admit(8, None):
        # One answer has ended every two seconds.
        assert retry_after(gate) == 16
        # A pause says nothing.
        clock.now += 1000
        assert retry_after(gate) == 16
    with gate.admit(80, None):
        assert retry_after(gate) == MOST_WAIT


def test_nothing_is_taken_once_it_is_closed_and_the_rest_may_end():
    gate, _ = admission()
    with gate.admit(1, None):
        gate.close()
        assert not gate.wait_until_empty(0.0)
        with pytest.raises(RequestError) as e:
            with gate.admit(1, None):
                pass
        assert e.value.status == 503
    assert gate.wait_until_empty(0.0)


# The server


def begin(port, **headers):
    """A stream that has begun."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps(LONG | {"stream": True})
    connection.request("POST", "/v1/completions", body, JSON | headers)
    response = connection.getresponse()
    assert response.status == 200
    return connection, response


@pytest.mark.parametrize(
    "argv", [["--max-queue", "1"], ["--max-requests-per-key", "1"]]
)
def test_request_too_many_is_a_429_until_another_has_left(argv, start_server):
    argv = [
        "llama",
        "--batch-size",
        "1",
        "--api-key",
        "a:key-a",
        "--api-key",
        "key-b",
        *argv,
    ]
    engine, port = start_server(*argv, make_engine=WatchedEngine)
    opened = [begin(port, **bearer("key-a"))]
    opened[0][1].readline()
    if "--max-queue" in argv:
        opened.append(begin(port, **bearer("key-b")))
        other = bearer("key-b")
    else:
        other = bearer("key-a")
    status, answer = call(port, "POST", "/v1/completions", LONG, **other)
    assert status == 429
    assert answer["error"]["type"] == "requests"
    assert argv[-2] in answer["error"]["message"]
    for connection, response in opened:
        response.close()
        connection.close()
    assert engine.client.admission.wait_until_empty(60)
    body = dict(prompt="hello", max_tokens=1)
    assert call(port, "POST", "/v1/completions", body, **other)[0] == 200


def test_refused_request_says_when_to_come_again(start_server):
    _, port = start_server("llama", "--batch-size", "1", "--max-queue", "1")
    opened = [begin(port)]
    opened[0][1].readline()
    opened.append(begin(port))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(LONG), JSON)
    opened.append((connection, connection.getresponse()))
    assert 1 <= int(opened[-1][1].headers["Retry-After"]) <= MOST_WAIT
    for connection, response in opened:
        response.close()
        connection.close()


# --request-timeout


@pytest.mark.parametrize("flags", [[], ALONE])
def test_answer_ends_in_time_with_what_there_is_of_it(flags, start_server):
    seen = SimpleQueue()
    hook = plugin(mlx_lm_request_finished=lambda stats: seen.put(stats))
    argv = ["llama", "--request-timeout", "0.3", *flags]
    _, port = start_server(*argv, plugin=hook)
    status, answer = call(port, "POST", "/v1/completions", LONG)
    (choice,) = answer["choices"]
    assert status == 200
    assert (choice["finish_reason"], choice["timeout"]) == ("length", True)
    n = answer["usage"]["completion_tokens"]
    assert 0 < n < 8000
    _, other = start_server("llama", *flags)
    text = complete(other, "hello", max_tokens=n, ignore_eos=True)
    assert choice["text"] == text
    *events, last = stream(port, "/v1/completions", **LONG)
    (choice,) = last["choices"]
    assert (choice["finish_reason"], choice["timeout"]) == ("length", True)
    assert not any("timeout" in e["choices"][0] for e in events)
    for _ in range(2):
        assert seen.get(timeout=60).finish_reason == "timeout"


@pytest.mark.logs_errors
def test_text_that_was_held_back_is_sent_before_an_error(start_server):
    # "ab" may be the beginning of a stop word when the third token fails.
    def processors(request, tokenizer):
        (force,) = saying("ab").mlx_lm_make_logits_processors(request, tokenizer, None)
        calls = iter([force, force])
        return [lambda tokens, logits: next(calls)(tokens, logits)]

    _, port = start_server(plugin=plugin(mlx_lm_make_logits_processors=processors))
    body = dict(prompt="x", max_tokens=9, stop=["abc"], stream=True)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    lines = connection.getresponse().read().decode().split("\n\n")
    connection.close()
    *chunks, error = [json.loads(e[6:]) for e in lines if e.startswith("data: ")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == "ab"
    assert not any(c["choices"][0]["finish_reason"] for c in chunks)
    assert error["error"]["type"] == "server_error"


# Names


def test_served_names_stand_for_the_model_and_answers_have_what_was_asked(start_server):
    _, port = start_server("llama", "--served-model-name", "main", "gpt-4o")
    for name in ("main", "gpt-4o", "default_model"):
        body = dict(prompt="x", max_tokens=1, model=name)
        status, answer = call(port, "POST", "/v1/completions", body)
        assert (status, answer["model"]) == (200, name)
        assert call(port, "GET", f"/v1/models/{name}")[0] == 200
    _, answer = call(port, "GET", "/v1/models")
    assert [m["id"] for m in answer["data"]][:2] == ["main", "gpt-4o"]


def test_name_that_is_not_served_is_a_404_that_lists_the_right_ones(start_server):
    _, port = start_server("llama", "--served-model-name", "main", "other")
    body = dict(prompt="x", max_tokens=1, model="gpt-4o")
    status, answer = call(port, "POST", "/v1/completions", body)
    assert status == 404
    assert answer["error"]["code"] == "model_not_found"
    assert "'main' or 'other'" in answer["error"]["message"]


def test_any_name_stands_for_the_model_if_the_command_line_says_so(start_server):
    _, port = start_server("llama", "--any-model-name")
    body = dict(prompt="x", max_tokens=1, model="gpt-4o")
    status, answer = call(port, "POST", "/v1/completions", body)
    assert (status, answer["model"]) == (200, "gpt-4o")
    # A draft model or an adapter that is not there is still an error.
    status, _ = call(port, "POST", "/v1/completions", body | {"adapters": "none"})
    assert status == 404
