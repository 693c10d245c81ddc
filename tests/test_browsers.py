"""Web pages: which may call the server, and by which names."""

import http.client
import json
import socket

import pytest
from helpers import JSON, call
from test_api import CHAT, HELLO

from mlx_lm_ext.server.browsers import BrowserGuard

LOCAL = [
    "localhost",
    "LOCALHOST:80",
    "a.localhost",
    "127.0.0.1:8080",
    "127.9.9.9",
    "[::1]:1",
    # A name of the own network.
    "my-server:8080",
]
FOREIGN = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example#localhost",
    "localhost@evil.example",
    "0.0.0.0",
    "192.168.0.1",
    "[::2]",
    "localhost:80:80",
    "",
]


def guard(origins=("loopback",), hosts=None, address="127.0.0.1", name="localhost"):
    return BrowserGuard(list(origins), hosts, address, name)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_server_on_loopback_goes_by_the_names_of_loopback(address):
    assert all(map(guard(address=address).allows_host, LOCAL))
    assert not any(map(guard(address=address).allows_host, FOREIGN))
    assert guard(name="my-machine").allows_host("My-Machine:8080")


def test_server_elsewhere_goes_by_all_names_unless_told_otherwise():
    assert all(map(guard(address="0.0.0.0").allows_host, [*LOCAL, *FOREIGN]))
    told = guard(hosts=["api.example", "*.b.example", "loopback"], address="0.0.0.0")
    for host in ("api.example", "API.example:443", "x.b.example", *LOCAL):
        assert told.allows_host(host)
    for host in ("evil.example", "api.example.evil", "b.example", "x.b.example.evil"):
        assert not told.allows_host(host)


def test_pages_of_loopback_may_call_and_others_when_they_are_named():
    local = ["http://localhost", "https://127.0.0.1:3000", "http://[::1]:8080"]
    others = [
        "null",
        "http://evil.example",
        "file://",
        "http://localhost.evil",
        "http://[",
        "http://localhost\r\n\t/X: 1",
        "http://evil.example\\@localhost",
        "http://evil.example?localhost",
    ]
    assert all(map(guard().allows_origin, local))
    assert not any(map(guard().allows_origin, others))
    assert all(map(guard(["*"]).allows_origin, [*local, "null", "http://evil.example"]))
    assert not guard(["https://*.example"]).allows_origin("https://evil.com?.example")
    named = guard(["https://*.chat.example", "chrome-extension://*"])
    assert named.allows_origin("https://a.chat.example")
    assert named.allows_origin("chrome-extension://abcdef")
    for origin in ("https://chat.example", "https://a.chat.example.evil", *local):
        assert not named.allows_origin(origin)


@pytest.mark.parametrize(
    "headers, named",
    [
        ({"Host": "evil.example"}, "--allowed-hosts"),
        ({"Origin": "http://evil.example"}, "--allowed-origins"),
        ({"Origin": "null"}, "--allowed-origins"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_foreign_page_is_refused_before_its_body_is_read(
    method, headers, named, start_server
):
    _, port = start_server()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    skip_host = "Host" in headers
    connection.putrequest(method, CHAT, skip_host=skip_host)
    for name, value in {**JSON, "Content-Length": "1000", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 403
    assert named in json.loads(response.read())["error"]["message"]
    assert response.getheader("Access-Control-Allow-Origin") is None
    connection.close()


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""],
)
def test_body_of_a_type_that_browsers_send_without_asking_is_refused(
    kind, start_server
):
    _, port = start_server()
    body = {"messages": HELLO, "max_tokens": 1}
    status, answer = call(port, "POST", CHAT, body, **{"Content-Type": kind})
    assert status == 415
    assert "application/json" in answer["error"]["message"]
    kind = "application/json; charset=utf-8"
    assert call(port, "POST", CHAT, body, **{"Content-Type": kind})[0] == 200


def test_body_without_a_type_is_taken_from_programs_only(start_server):
    _, port = start_server()
    raw = json.dumps({"messages": HELLO, "max_tokens": 1})
    for origin, expected in ({}, 200), ({"Origin": "http://localhost"}, 415):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", CHAT, raw, origin)
        assert connection.getresponse().status == expected
        connection.close()


def test_page_that_is_named_may_ask_and_read_the_answer(start_server):
    origin = "https://chat.example"
    _, port = start_server("llama", "--allowed-origins", f"{origin},loopback")
    for method, body in (("OPTIONS", None), ("POST", {"messages": HELLO})):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        raw = json.dumps(body | {"max_tokens": 1}) if body else None
        connection.request(method, CHAT, raw, {**JSON, "Origin": origin})
        response = connection.getresponse()
        assert response.status in (200, 204)
        assert response.getheader("Access-Control-Allow-Origin") == origin
        assert response.getheader("Vary") == "Origin"
        connection.close()


def test_client_that_names_no_host_is_no_browser(start_server):
    _, port = start_server()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 200 ")
