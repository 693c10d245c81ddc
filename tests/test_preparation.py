"""The preparation of a request before the engine has it, and what ends it."""

import json
import socket
import struct
import threading
from dataclasses import replace

import pytest
from helpers import call, complete
from processes import join
from test_api import CHAT, HELLO, post_whole

from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.request import tokenizing
from mlx_lm_ext.request.preparation import Interrupted, Preparations
from mlx_lm_ext.request.tokenizing import SLICE, USUAL_CHARACTERS, most_characters
from mlx_lm_ext.server import api, connection, http_server

# For one content, a template that runs for hours and writes nothing.
ENDLESS = (
    "{% if messages[0].content == 'endless' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
)

ENDLESS_CHAT = post_whole(
    json.dumps({"messages": [{"role": "user", "content": "endless"}]}).encode()
)


def loop():
    while True:
        pass


@pytest.fixture
def watch():
    """Starts a thread that checks the preparations of a server again and again."""
    stop, threads = threading.Event(), []

    def start(server):
        def look():
            while not stop.wait(0.01):
                server.end_due()

        threads.append(threading.Thread(target=look))
        threads[-1].start()

    yield start
    stop.set()
    join(*threads)


@pytest.fixture
def limit_preparing(monkeypatch):
    """Sets the limits of preparations in this test; gives the ``Preparations``."""

    def limit(n, seconds):
        made = Preparations(n, seconds)
        monkeypatch.setattr(http_server, "Preparations", lambda: made)
        return made

    return limit


@pytest.mark.parametrize(
    "reason, error, text",
    [
        ("time", RequestError, "0.1 seconds"),
        ("client", ConnectionError, "gone"),
        ("stop", RequestError, "stopping"),
    ],
)
def test_step_is_interrupted(reason, error, text, watch):
    server = Preparations(seconds=0.1 if reason == "time" else 60)
    running = threading.Event()

    def is_gone():
        if reason == "stop" and running.is_set():
            server.stopping = True
        return reason == "client" and running.is_set()

    def step():
        running.set()
        loop()

    preparation = server.begin(is_gone)
    watch(server)
    with pytest.raises(error, match=text), preparation.turn():
        preparation.run(step)
    assert not server.running
    # The turn was given back.
    server.stopping = False
    running.clear()
    with server.begin().turn():
        pass


def test_step_that_catches_everything_is_interrupted_again(watch):
    server = Preparations(seconds=0.1)
    caught = []

    def step():
        while len(caught) < 2:
            try:
                loop()
            except BaseException as e:
                caught.append(type(e))
        loop()

    watch(server)
    preparation = server.begin()
    with pytest.raises(RequestError), preparation.turn():
        preparation.run(step)
    assert caught == [Interrupted] * 2


def test_interruption_never_comes_after_the_step():
    """Whenever it is interrupted, ``run`` returns the result or raises the reason."""
    server = Preparations(seconds=60)
    stop = threading.Event()
    current = []

    def look():
        while not stop.is_set():
            for preparation in current[-1:]:
                preparation.is_gone = lambda: True
                preparation.end_if_due()

    thread = threading.Thread(target=look)
    thread.start()
    results = {"done": 0, "ended": 0}
    try:
        for i in range(3000):
            preparation = server.begin()
            current.append(preparation)
            try:
                preparation.run(lambda: sum(range(i % 300)))
                results["done"] += 1
            except ConnectionError:
                results["ended"] += 1
            current.clear()
    finally:
        stop.set()
        join(thread)
    assert sum(results.values()) == 3000


def test_only_so_many_are_prepared_at_once():
    server = Preparations(n=1, seconds=0.1)
    with server.begin().turn():
        with pytest.raises(RequestError) as error:
            with server.begin().turn():
                pass
    assert error.value.status == 503
    with server.begin().turn():
        pass


def test_template_that_takes_too_long_costs_its_request(start_server, limit_preparing):
    limit_preparing(1, 0.3)
    _, port = start_server("llama", "--chat-template", ENDLESS)
    body = {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 2}
    status, answer = call(port, "POST", CHAT, body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert call(port, "POST", CHAT, {"messages": HELLO, "max_tokens": 2})[0] == 200


def test_body_that_takes_too_long_costs_its_request(
    start_server, limit_preparing, monkeypatch
):
    limit_preparing(1, 0.3)
    _, port = start_server()
    with monkeypatch.context() as patch:
        patch.setattr(api, "parse_messages", lambda body: loop())
        status, answer = call(port, "POST", CHAT, {"messages": HELLO})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert call(port, "POST", CHAT, {"messages": HELLO, "max_tokens": 2})[0] == 200


def test_template_ends_when_its_client_leaves(
    start_server, limit_preparing, monkeypatch
):
    # The client leaves so soon that it could also be waiting.
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    limit_preparing(1, 60)
    _, port = start_server("llama", "--chat-template", ENDLESS)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(ENDLESS_CHAT)
    # This needs the only turn, so the endless template has ended.
    assert complete(port, "hello", max_tokens=2)


def test_client_that_resets_its_connection_ends_nothing_but_its_request(
    start_server, limit_preparing
):
    made = limit_preparing(1, 60)
    _, port = start_server("llama", "--chat-template", ENDLESS)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
            s.sendall(ENDLESS_CHAT)
            while not any(preparation.thread for preparation in list(made.running)):
                pass
            linger = struct.pack("ii", 1, 0)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert complete(port, "hello", max_tokens=2)


def test_template_ends_when_the_server_stops(start_server, limit_preparing):
    made = limit_preparing(1, 60)
    _, port = start_server("llama", "--chat-template", ENDLESS)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(ENDLESS_CHAT)
        while not made.running:
            pass
        made.stop()
        assert s.recv(100).startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
        "{% macro m() %}{% for i in range(99999) %}{{ messages[0].content }}"
        "{% endfor %}{% endmacro %}{{ m() | length }}",
        "{% set x %}{% for i in range(99999) %}{{ messages[0].content }}"
        "{% endfor %}{% endset %}{{ x | length }}",
    ],
)
def test_template_writes_no_more_than_can_fit(template, start_server):
    _, port = start_server("llama", "--chat-template", template)
    messages = [{"role": "user", "content": "x" * 10_000}]
    status, answer = call(port, "POST", CHAT, {"messages": messages})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "characters" in answer["error"]["message"]


def test_text_that_can_never_fit_is_not_tokenized(start_server, monkeypatch):
    engine, port = start_server()
    (model,) = engine.model_provider._served.values()
    limit = most_characters(model.tokenizer, model.context_length)
    assert limit == model.most_characters
    monkeypatch.setattr(type(model.tokenizer), "encode", None, raising=False)
    for path, body in (
        ("/v1/completions", {"prompt": "x" * (limit + 1)}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * (limit + 1)}]}),
    ):
        status, answer = call(port, "POST", path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_text_of_which_a_part_does_not_fit_is_not_tokenized_as_a_whole(
    start_server, monkeypatch
):
    engine, port = start_server()
    (model,) = engine.model_provider._served.values()
    lengths = []
    tokenizer = model.tokenizer

    class Watched:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, **kwargs):
            lengths.append(len(text))
            return tokenizer.encode(text, **kwargs)

    watched = replace(model, tokenizer=Watched(), most_characters=10**7)
    engine.model_provider._served[model.key] = watched
    body = {"prompt": "ab " * 100_000}
    status, answer = call(port, "POST", "/v1/completions", body)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert lengths == [SLICE]
    # A text that is long and has few tokens is served.
    monkeypatch.setattr(tokenizing, "SLICE", 1000)
    watched = replace(watched, context_length=2000)
    engine.model_provider._served[model.key] = watched
    few = max(tokenizer.get_vocab(), key=len) * 800
    assert len(few) > USUAL_CHARACTERS * 2000
    assert len(tokenizer.encode(few)) < 1900
    assert call(port, "POST", "/v1/completions", {"prompt": few})[0] == 200


def test_bounded_prompt_is_that_of_the_tokenizer(start_engine):
    engine = start_engine()
    (model,) = engine.model_provider._served.values()
    bounded = model.bounded_tokenizer("messages", Preparations().begin())
    for arguments in ({}, {"add_generation_prompt": True}, {"tokenize": False}):
        expected = model.tokenizer.apply_chat_template(HELLO, **arguments)
        assert bounded.apply_chat_template(HELLO, **arguments) == expected
    assert bounded.encode("a text") == model.tokenizer.encode("a text")


def test_other_requests_go_on_while_one_is_prepared(start_server, limit_preparing):
    limit_preparing(2, 60)
    _, port = start_server("llama", "--chat-template", ENDLESS)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(ENDLESS_CHAT)
        for _ in range(3):
            assert complete(port, "hello", max_tokens=2)
