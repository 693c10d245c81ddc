"""SIGTERM and SIGINT: what is there may end, what comes is refused, and no text is lost."""

import http.client
import json
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from conftest import server_process
from helpers import JSON, call
from test_api import wait_until

N_STREAMS = 32
# Long enough that the signal comes in the middle.
PROMPTS = [f"stream {i}" for i in range(N_STREAMS)]
SIGNALS = ["SIGINT", "SIGTERM"]


@pytest.fixture(autouse=True)
def interruptible():
    """Processes start with the default action of SIGINT, also if this one ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def server(model_folder, *argv):
    argv = ["--model", str(model_folder()), "--warmup", "off", *argv]
    with server_process(*argv) as started:
        yield started


class Client(threading.Thread):
    """A client that reads a stream to its end, or an answer in one piece."""

    def __init__(self, port, prompt, stream=True, max_tokens=300):
        super().__init__()
        self.port = port
        self.body = dict(prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
        self.body["stream"] = stream
        self.began = threading.Event()
        self.text, self.reason, self.error, self.answer = "", None, None, None
        self.start()

    def run(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(self.body), JSON)
        response = connection.getresponse()
        self.status = response.status
        if not self.body["stream"]:
            self.answer = json.loads(response.read())
        else:
            for line in response:
                if line.startswith(b"data: {"):
                    self.take(json.loads(line[6:]))
                    self.began.set()
        connection.close()

    def take(self, event):
        if "error" in event:
            self.error = event["error"]
        else:
            (choice,) = event["choices"]
            self.text += choice["text"]
            self.reason = choice["finish_reason"]


def answer(port, prompts, max_tokens):
    """The texts of answers in one piece."""
    clients = [Client(port, p, stream=False, max_tokens=max_tokens) for p in prompts]
    for client in clients:
        client.join(60)
    return [client.answer["choices"][0]["text"] for client in clients]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
def test_streams_end_as_ever_after_a_signal_and_others_are_refused(name, model_folder):
    with server(model_folder) as (port, lines, process):
        expected = answer(port, PROMPTS, 300)
        clients = [Client(port, prompt) for prompt in PROMPTS]
        # One waits for its turn: --batch-size is 32.
        clients.append(Client(port, "waits", stream=False))
        for client in clients[:-1]:
            assert client.began.wait(60)
        process.send_signal(getattr(signal, name))
        wait_until(lambda: call(port, "GET", "/health")[0] == 503)
        assert call(port, "GET", "/health") == (503, {"status": "stopping"})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", '{"prompt": "x"}', JSON)
        response = connection.getresponse()
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert response.headers["Connection"] == "close"
        connection.close()
        for client in clients:
            client.join(60)
        assert process.wait(60) == 0
    texts = [client.text for client in clients[:-1]]
    assert texts == expected
    assert {client.reason for client in clients[:-1]} == {"length"}
    assert clients[-1].answer["usage"]["completion_tokens"] == 300
    assert "did not end" not in "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("timeout", ["0", "0.5"])
def test_what_has_not_ended_in_time_loses_no_text(timeout, model_folder):
    argv = ["--shutdown-timeout", timeout, "--batch-size", str(N_STREAMS + 1)]
    with server(model_folder, *argv) as (port, lines, process):
        expected = answer(port, ["whole", *PROMPTS], 500)
        whole = Client(port, "whole", stream=False, max_tokens=8000)
        clients = [Client(port, prompt, max_tokens=8000) for prompt in PROMPTS]
        for client in clients:
            assert client.began.wait(60)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for client in (*clients, whole):
            client.join(60)
        assert process.wait(60) == 0
        assert time.monotonic() - start < float(timeout) + 8
    for client in clients:
        assert client.reason is None
        assert client.error["message"] == "the server is stopping"
    # Where a character is cut, its bytes are replaced.
    for client, text in zip(clients, expected[1:]):
        assert client.text and text.startswith(client.text.rstrip("\ufffd"))
    (choice,) = whole.answer["choices"]
    assert whole.status == 200
    assert (choice["finish_reason"], choice["timeout"]) == ("length", True)
    text = choice["text"].rstrip("\ufffd")
    assert text and expected[0].startswith(text)
    assert f"{N_STREAMS + 1} requests did not end in time" in "".join(lines)


def test_second_signal_ends_the_process_at_once(model_folder):
    with server(model_folder) as (port, _, process):
        client = Client(port, "endless", max_tokens=8000)
        assert client.began.wait(60)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: call(port, "GET", "/health")[0] == 503)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        assert time.monotonic() - start < 5
        client.join(60)


@pytest.mark.slow
def test_reader_that_takes_nothing_does_not_delay_the_end_beyond_the_limit(
    model_folder,
):
    with server(model_folder, "--shutdown-timeout", "1") as (port, lines, process):
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.settimeout(60)
            stalled.connect(("127.0.0.1", port))
            body = dict(prompt="x", max_tokens=8000, stream=True, ignore_eos=True)
            raw = json.dumps(body | {"n": 8}).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(raw)}\r\n\r\n"
            )
            stalled.sendall(head.encode() + raw)
            assert stalled.recv(1)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert time.monotonic() - start < 9


def test_route_of_a_plugin_may_end_too(model_folder, tmp_path):
    (tmp_path / "slow.py").write_text("""
import sys, threading
from mlx_lm_ext import hookimpl
from mlx_lm_ext.routes import Route

def wait(request):
    sys.stderr.write("entered\\n")
    sys.stderr.flush()
    threading.Event().wait(4)
    return {"done": True}

@hookimpl
def mlx_lm_register_routes():
    return [Route("GET", "/slow", wait)]
""")
    argv = ["--model", str(model_folder()), "--warmup", "off", "-p", "slow"]
    with server_process(*argv, cwd=tmp_path) as (port, lines, process):
        answers = []
        client = threading.Thread(
            target=lambda: answers.append(call(port, "GET", "/slow"))
        )
        client.start()
        wait_until(lambda: "entered\n" in lines)
        process.send_signal(signal.SIGTERM)
        client.join(60)
        assert process.wait(60) == 0
    assert answers == [(200, {"done": True})]


def test_body_that_has_not_arrived_at_the_end_is_a_503(model_folder):
    with server(model_folder, "--shutdown-timeout", "0") as (port, _, process):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{")
            # It is read by now, as the answer to another request shows.
            assert call(port, "GET", "/health")[0] == 200
            process.send_signal(signal.SIGTERM)
            assert s.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
        assert process.wait(60) == 0


def test_idle_server_ends_at_once(model_folder):
    with server(model_folder) as (port, _, process):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status": "ok"}'
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert time.monotonic() - start < 5
        assert connection.sock.recv(1) == b""
        connection.close()
