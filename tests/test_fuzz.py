"""Requests that nobody has thought of: the server answers each of them, and goes on.

Rule: what a test finds must be a response below 500 in time, and nothing in the log.
"""

import http.client
import json
import random
import re
import socket
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import schemathesis
from helpers import JSON, complete, wait_until_idle
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis.checks import CHECKS, load_all_checks
from test_api import HELLO

from mlx_lm_ext.plugins.server_info import read_description

# Seconds after which a response counts as a hang.
PATIENCE = 30.0

# The description

load_all_checks()
CHECKED = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)
DESCRIPTION = read_description()
# The model of the tests has 259 tokens.
DESCRIPTION["components"]["schemas"]["TokenId"]["maximum"] = 258
# schemathesis takes the schema of a stream for that of an event. Events are checked here.
STREAMS = {"/v1/chat/completions": "ChatChunk", "/v1/completions": "TextCompletion"}
for path in STREAMS:
    ok = DESCRIPTION["paths"][path]["post"]["responses"]["200"]
    del ok["content"]["text/event-stream"]["schema"]
OPERATIONS = {
    f"{found.ok().method.upper()} {found.ok().path}": found.ok()
    for found in schemathesis.openapi.from_dict(DESCRIPTION).get_all_operations()
}
# What makes requests long, and its value.
SHORT = {
    "max_tokens": 4,
    "max_completion_tokens": 4,
    "min_tokens": 2,
    "n": 2,
    "best_of": 2,
}


def shorten(body):
    """Let a body that may be right ask for short answers only."""
    if isinstance(body, dict):
        for name, most in SHORT.items():
            if type(body.get(name)) in (int, float) and body[name] > most:
                body[name] = most


def check_events(text, path):
    """Check the events of a stream, of which the last is [DONE] or an error."""
    *events, last = (e for e in text.split("\n\n") if e and not e.startswith(":"))
    chunk = {"$ref": f"#/components/schemas/{STREAMS[path]}"}
    error = {"$ref": "#/components/schemas/Error"}
    if last != "data: [DONE]":
        events.append(last)
        chunk = {"anyOf": [chunk, error]}
    validator = Draft202012Validator(DESCRIPTION | chunk)
    for event in events:
        validator.validate(json.loads(event.removeprefix("data: ")))


def errors(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]


def fuzz_operation(operation, port, n):
    """Send ``n`` right and ``n`` wrong requests of an operation, and check the responses."""
    modes = schemathesis.GenerationMode
    statuses = set()
    for mode in (modes.POSITIVE, modes.NEGATIVE):
        if mode is modes.NEGATIVE and operation.method == "get":
            continue

        @settings(
            max_examples=n,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def run(case):
            shorten(case.body)
            response = case.call(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)
            case.validate_response(response, checks=CHECKED)
            if "text/event-stream" in response.headers["content-type"]:
                check_events(response.text, operation.path)
            statuses.add(response.status_code)

        run()
    return statuses


@pytest.mark.parametrize("n", [20, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_responses_are_as_described(name, n, start_server, caplog):
    operation = OPERATIONS[name]
    _, port = start_server("llama", "--max-tokens", "4", "--use-prompt-cache")
    has_choices = operation.method == "post" or operation.path_parameters
    statuses = fuzz_operation(operation, port, n if has_choices else 1)
    assert 200 in statuses or operation.path_parameters
    assert not errors(caplog)
    assert complete(port, "hello", max_tokens=2)


@pytest.mark.parametrize("path", STREAMS)
def test_streams_are_as_described(path, start_server):
    _, port = start_server()
    asked = dict(prompt="hello", logprobs=2)
    if "chat" in path:
        asked = dict(messages=HELLO, logprobs=True, top_logprobs=2)
    asked |= dict(n=2, max_tokens=4, stream_options={"include_usage": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", path, json.dumps(asked | {"stream": True}), JSON)
    check_events(connection.getresponse().read().decode(), path)
    connection.close()


# Bytes

METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "get", "G", "", "\x00")
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/health",
    "/tokenize",
    "/detokenize",
    "/server_info",
    "/",
    "*",
    "//",
    "http://[x/",
    "/%ff%00?a=%zz&&=",
    "/v1/models/" + "x" * 300,
)
VERSIONS = ("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0")
VERSIONS += ("HTTP/1.1.1", "HTTP/a.b", "http/1.1", "HTTP/1", "", "HTTP/-1.1")
HEADERS = (
    "Content-Type: application/json",
    "Content-Type: application/json; charset=utf-8",
    "Content-Type: text/plain",
    "Content-Type:",
    "Content-Length: 0",
    "Content-Length: 5",
    "Content-Length: -1",
    "Content-Length: +5",
    "Content-Length: 5, 5",
    "Content-Length: 99999999999999999999",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: identity",
    "Content-Encoding: gzip",
    "Expect: 100-continue",
    "Expect: more",
    "Connection: close",
    "Connection: keep-alive",
    "Connection: upgrade, close",
    "Upgrade: h2c",
    "Host: localhost",
    "Host: a b",
    "Host: site.example",
    "Origin: null",
    "Origin: http://localhost",
    "Origin: https://[",
    "X-Request-Id: \x7f",
    "X-Cache-Salt: a",
    "Authorization: Bearer",
    "Authorization: Basic :",
    "User-Agent: tests",
    " folded",
    "no colon",
    ": no name",
    "X: " + "y" * 3000,
    "Range: bytes=0-",
    "If-None-Match: *",
)
BODIES = (
    {"prompt": "hello", "max_tokens": 2},
    {"prompt": "hello", "max_tokens": 2, "stream": True},
    {"messages": HELLO, "max_tokens": 2},
    {"messages": HELLO, "max_tokens": 2, "stream": True},
    {"tokens": [1, 2]},
    {"tokens": [1, 2], "prompt": None},
    {},
)
SIZES = (b"0", b"1", b"5", b"a", b"-1", b"ffffffffffff", b"", b" 5", b"5 ;x=y", b"0x5")
ANY_BYTES = st.binary(max_size=60)

lines = st.builds(
    lambda *words: " ".join(words).encode("latin-1"),
    st.sampled_from(METHODS[:2]) | st.sampled_from(METHODS),
    st.sampled_from(PATHS) | st.text(st.characters(max_codepoint=255), max_size=30),
    st.sampled_from(VERSIONS[:2]) | st.sampled_from(VERSIONS),
)
headers = st.lists(
    st.sampled_from(HEADERS).map(lambda text: text.encode("latin-1")) | ANY_BYTES,
    max_size=6,
).map(b"\r\n".join)
objects = st.sampled_from(BODIES).map(lambda body: json.dumps(body).encode())
ends = st.sampled_from([b"\r\n", b"\r\n", b"\n", b"\r", b""])
bodies = objects | ANY_BYTES


@st.composite
def chunks(draw):
    """A body in chunks, whose framing may be wrong."""
    raw = draw(bodies)
    cut = draw(st.integers(0, len(raw)))
    parts = b""
    for part in (raw[:cut], raw[cut:], b""):
        size = b"%x" % len(part)
        if draw(st.integers(0, 5)) == 0:
            size = draw(st.sampled_from(SIZES))
        parts += size + draw(ends) + part + (draw(ends) if part else b"")
    return parts + draw(ends)


RIGHT = tuple(
    f"{line} HTTP/1.1\r\nUser-Agent: x\r\n{rest}".encode()
    for line, body in (
        ("GET /health", None),
        ("HEAD /", None),
        ("GET /server_info?x=1", None),
        ("OPTIONS /v1/models", None),
        *(("POST /v1/completions", json.dumps(body)) for body in BODIES[:2]),
        *(("POST /v1/chat/completions", json.dumps(body)) for body in BODIES[2:4]),
        ("POST /tokenize", json.dumps(BODIES[0])),
        ("POST /detokenize", json.dumps(BODIES[4])),
    )
    for rest in (
        (
            "\r\n"
            if body is None
            else f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ),
    )
)


@st.composite
def almost_right(draw):
    """A right request, in which a few bytes are others, more or fewer."""
    raw = draw(st.sampled_from(RIGHT))
    start = draw(st.integers(0, len(raw)))
    end = draw(st.integers(start, min(len(raw), start + 4)))
    return raw[:start] + draw(st.binary(max_size=4)) + raw[end:]


@st.composite
def composed(draw):
    """A request of which each part may be wrong."""
    head = draw(lines) + b"\r\n" + draw(headers)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return head + draw(ends) + draw(ends) + draw(bodies)
    head += b"\r\nUser-Agent: x\r\nContent-Type: application/json\r\n"
    if kind == 1:
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + draw(chunks())
    raw = draw(bodies)
    n = len(raw) if kind == 2 else draw(st.integers(0, 80))
    return head + b"Content-Length: %d\r\n\r\n%b" % (n, raw)


requests = st.one_of(st.sampled_from(RIGHT), almost_right(), composed(), ANY_BYTES)


def exchange(port, raw):
    """What the server sends for these bytes, after which nothing more comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as s:
        s.sendall(raw)
        s.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: s.recv(65536), b""))


def statuses_of(raw):
    return list(map(int, re.findall(rb"HTTP/1\.[01] (\d{3}) ", raw)))


def fuzz_bytes(port, n_requests, n_a_connection):
    """Send so many malformed requests, several on each connection; count the statuses."""
    seen = Counter()

    @settings(
        max_examples=n_requests // n_a_connection,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(requests, min_size=n_a_connection, max_size=n_a_connection))
    def run(sent):
        while sent:
            statuses = statuses_of(exchange(port, b"".join(sent)))
            # Versions of HTTP that the server does not have.
            assert all(status < 500 or status == 505 for status in statuses), sent
            seen.update(statuses)
            # After what may have no end, the server closes the connection.
            sent = sent[max(1, len(statuses)) :]

    run()
    return seen


@pytest.mark.parametrize("n", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_requests_are_answered_and_the_server_goes_on(
    n, start_server, caplog
):
    engine, port = start_server("llama", "--max-tokens", "2", "--use-prompt-cache")
    seen = fuzz_bytes(port, n, 4)
    assert {200, 400, 404, 405} <= set(seen)
    assert not errors(caplog)
    assert complete(port, "hello", max_tokens=2)
    assert_all_is_free(engine)


# Connections


def assert_all_is_free(engine):
    """All handlers have ended, and no request is left."""
    httpd = engine.httpd
    with httpd.changed:
        assert httpd.changed.wait_for(lambda: not httpd.connections, PATIENCE)
    wait_until_idle(engine)
    assert not engine.running and not engine.waiting
    assert not engine.client.admission.tickets
    assert httpd.n_bytes == 0


def drop(port, rng):
    """Open a connection, and close it at some point of a request or of its answer. Gives how
    many tokens the answer would have had."""
    body = rng.choice([{"max_tokens": 30}, {"max_tokens": 3000, "stream": True}])
    prompt = {"prompt": "x" * rng.randint(1, 300), "ignore_eos": True}
    raw = json.dumps(prompt | body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    head += (
        rng.choice(["", "User-Agent: x\r\n"]) + f"Content-Length: {len(raw)}\r\n\r\n"
    )
    whole = head.encode() + raw
    sent = whole[: rng.choice([len(whole), rng.randint(0, len(whole))])]
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as s:
        s.sendall(sent)
        if sent == whole and b"stream" in raw and rng.random() < 0.5:
            s.recv(rng.randint(1, 500))
        if rng.random() < 0.5:
            # Closing it resets it.
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return body["max_tokens"] if sent == whole else 0


def drop_all(port, n, n_threads=8):
    """Drop ``n`` connections, several at a time; gives the sum of what ``drop`` gives."""

    def run(seed):
        rng = random.Random(seed)
        return sum(drop(port, rng) for _ in range(n // n_threads))

    with ThreadPoolExecutor(n_threads) as pool:
        return sum(pool.map(run, range(n_threads)))


@pytest.mark.parametrize("n", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_dropped_connections_leave_nothing(n, start_server, caplog):
    engine, port = start_server("llama", "--batch-size", "4")
    n_tokens = drop_all(port, n)
    assert_all_is_free(engine)
    # Nearly all of them belong to streams, which end when their clients leave.
    assert engine.counters.generated_tokens < n_tokens / 3
    assert not errors(caplog)
    assert complete(port, "hello", max_tokens=2)
