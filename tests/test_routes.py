"""Routes of plugins: those that are built in, and what any plugin can do with its own."""

import http.client
import json
import socket

import pytest
from helpers import JSON, call, complete, only_error, plugin, stream
from test_api import (
    CHAT,
    HELLO,
    WatchedEngine,
    assert_is_error,
    send_raw,
    wait_until,
)

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.plugins.tokens import MAX_TOKENS
from mlx_lm_ext.policies.loading import PluginError, Plugins
from mlx_lm_ext.routes import METHODS, Route, RouteResponse

TEXT = "/v1/completions"


def adding(*routes):
    """A plugin with these routes."""
    return plugin(mlx_lm_register_routes=lambda: list(routes))


def get(path, function, **kwargs):
    return Route("GET", path, function, **kwargs)


def post(path, function, **kwargs):
    return Route("POST", path, function, **kwargs)


def fetch(port, method, path, body=None, **headers):
    """The response to a request, and its whole body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        raw = None if body is None else json.dumps(body)
        connection.request(method, path, raw, JSON | headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


# Tokens


def tokenize(port, **body):
    status, answer = call(port, "POST", "/tokenize", body)
    assert status == 200, answer
    assert answer["count"] == len(answer["tokens"])
    return answer


def test_text_is_tokenized_and_back(start_server):
    engine, port = start_server()
    answer = tokenize(port, prompt="h\u00e9llo", model="default_model")
    tokenizer = engine.client.model_info().tokenizer
    assert answer["tokens"] == tokenizer.encode("h\u00e9llo")
    assert (answer["max_model_len"], answer["token_strs"]) == (4096, None)
    body = dict(tokens=answer["tokens"])
    assert call(port, "POST", "/detokenize", body) == (200, {"prompt": "h\u00e9llo"})


def test_texts_of_tokens_are_those_of_the_vocabulary(start_server):
    _, port = start_server()
    answer = tokenize(port, prompt="h\u00e9", return_token_strs=True)
    assert answer["token_strs"] == ["h", "\u00c3", "\u00a9"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"continue_final_message": True}},
    ],
)
def test_chat_has_the_tokens_with_which_it_is_answered(fields, start_server):
    engine, port = start_server("llama", "--use-prompt-cache")
    body = dict(messages=HELLO, max_tokens=1, **fields)
    prompts = []
    submit = engine.inbox.put
    engine.inbox.put = lambda request: (prompts.append(request.prompt), submit(request))
    assert call(port, "POST", CHAT, body)[0] == 200
    assert tokenize(port, **body)["tokens"] == prompts[0]


def test_special_tokens_may_be_left_out_of_a_text(start_server, monkeypatch):
    engine, port = start_server()
    tokenizer = engine.client.model_info().tokenizer
    encode = type(tokenizer._tokenizer).encode

    def with_start(self, text, add_special_tokens=True, **kwargs):
        tokens = encode(self, text, add_special_tokens=False, **kwargs)
        return [1] * add_special_tokens + tokens

    monkeypatch.setattr(type(tokenizer._tokenizer), "encode", with_start)
    with_special = tokenize(port, prompt="ab")["tokens"]
    assert (
        tokenize(port, prompt="ab", add_special_tokens=True)["tokens"] == with_special
    )
    assert [1, *tokenize(port, prompt="ab", add_special_tokens=False)["tokens"]] == (
        with_special
    )


def test_special_tokens_have_their_texts(start_server):
    engine, port = start_server()
    (end,) = engine.client.model_info().tokenizer.eos_token_ids
    _, answer = call(port, "POST", "/detokenize", dict(tokens=[end, 74.0]))
    assert answer["prompt"].startswith("<|") and answer["prompt"].endswith("|>h")


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"),
        ("/tokenize", {"prompt": ""}, "prompt"),
        ("/tokenize", {"prompt": [1, 2]}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "messages"),
        ("/tokenize", {"prompt": "x", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 0}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "model": 3}, "model"),
        ("/tokenize", {"prompt": "x", "model": "nobody/nothing"}, "model"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "tools": {}}, "tools"),
        ("/tokenize", {"prompt": "x" * 10**5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "12"}, "tokens"),
        ("/detokenize", {"tokens": [1, "2"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, True]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 2, 259]}, "tokens[2]"),
        ("/detokenize", {"tokens": [10**30]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * (MAX_TOKENS + 1)}, "tokens"),
        ("/detokenize", {"tokens": [], "model": "x" * 5000}, "model"),
        ("/detokenize", {"tokens": [], "model": "nobody/nothing"}, "model"),
    ],
)
def test_wrong_field_is_named(path, body, param, start_server):
    _, port = start_server()
    status, answer = call(port, "POST", path, body)
    assert status == (404 if body.get("model") == "nobody/nothing" else 400)
    assert_is_error(answer, param)


# The server's own figures


def test_server_info_has_the_figures_and_no_secret(start_server):
    argv = ["--api-key", "me:secret", "--served-model-name", "tiny", "small"]
    _, port = start_server("llama", *argv)
    key = {"Authorization": "Bearer secret"}
    assert call(port, "GET", "/server_info")[0] == 401
    body = dict(prompt="hello", max_tokens=3)
    assert call(port, "POST", TEXT, body, **key)[0] == 200

    def ask():
        response, raw = fetch(port, "GET", "/server_info", **key)
        assert response.status == 200
        return raw

    # A client has its answer a moment before it is counted.
    wait_until(lambda: json.loads(ask())["statistics"]["prompt_tokens"])
    raw = ask()
    info = json.loads(raw)
    assert info["names"] == ["tiny", "small"]
    assert info["statistics"]["model"] == "tiny"
    assert info["statistics"]["prompt_tokens"] == 5
    assert info["statistics"]["status"] == "ok"
    assert set(info["versions"]) == {"mlx-lm-ext", "mlx-lm", "mlx"}
    assert info["plugins"]["server_info"].startswith("mlx-lm-ext ")
    assert b"secret" not in raw


# What a route can be


@pytest.mark.logs_errors
@pytest.mark.parametrize("error", [KeyError("secret"), SystemExit(3)])
def test_route_that_raises_is_a_500_and_its_plugin_is_named(
    error, start_server, caplog
):
    def fail(request):
        raise error

    _, port = start_server(plugin=adding(get("/fail", fail)))
    status, answer = call(port, "GET", "/fail")
    assert status == 500
    assert answer["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(answer)
    assert "plugin 'test' (tests 0): the route /fail failed" in only_error(caplog)
    assert complete(port, "hello", max_tokens=2)


def test_route_may_refuse_a_request(start_server):
    def refuse(request):
        raise RequestError(418, "no tea", "cup", headers={"X-Pot": "1"})

    _, port = start_server(plugin=adding(get("/tea", refuse)))
    response, raw = fetch(port, "GET", "/tea")
    assert (response.status, response.getheader("X-Pot")) == (418, "1")
    assert_is_error(json.loads(raw), "cup")


@pytest.mark.logs_errors
def test_route_that_raises_in_its_stream_ends_it_with_an_error(start_server, caplog):
    def pieces():
        yield "data: 1\n\n"
        raise KeyError("secret")

    _, port = start_server(plugin=adding(get("/fail", lambda request: pieces())))
    response, raw = fetch(port, "GET", "/fail")
    first, second = raw.decode().strip().split("\n\n")
    assert (response.status, first) == (200, "data: 1")
    assert json.loads(second.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "the route /fail failed" in only_error(caplog)


CONTENTS = {
    "dict": ({"a": "\u00e9"}, b'{"a": "\\u00e9"}', "application/json"),
    "list": ([1, None], b"[1, null]", "application/json"),
    "str": ("h\u00e9", "h\u00e9".encode(), "text/plain; charset=utf-8"),
    "empty": ("", b"", "text/plain; charset=utf-8"),
    "bytes": (b"\0\xff", b"\0\xff", "application/octet-stream"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_content_is_sent_with_its_type_and_length(name, start_server):
    content, raw, kind = CONTENTS[name]
    responses = {
        "/plain": content,
        "/whole": RouteResponse(content, 207, "text/x-own", {"X-Own": "1"}),
    }
    routes = [get(path, lambda _, r=r: r) for path, r in responses.items()]
    _, port = start_server(plugin=adding(*routes))
    response, body = fetch(port, "GET", "/plain")
    assert (response.status, body) == (200, raw)
    assert response.getheader("Content-Type") == kind
    assert response.getheader("Content-Length") == str(len(raw))
    response, body = fetch(port, "GET", "/whole")
    assert (response.status, body) == (207, raw)
    assert response.getheader("Content-Type") == "text/x-own"
    assert response.getheader("X-Own") == "1"


@pytest.mark.parametrize("kind", [None, "application/x-ndjson"])
def test_iterator_is_sent_piece_by_piece(kind, start_server):
    def answer(request):
        pieces = iter(["data: \u00e9\n\n", None, "", "data: 2\n\n"])
        return RouteResponse(pieces, content_type=kind, headers={"X-Own": "1"})

    _, port = start_server(plugin=adding(get("/events", answer)))
    response, raw = fetch(port, "GET", "/events")
    assert response.getheader("Content-Type") == (kind or "text/event-stream")
    assert response.getheader("X-Own") == "1"
    # Other streams have no comments.
    comment = "" if kind else ": keepalive\n\n"
    assert raw.decode() == f"data: \u00e9\n\n{comment}data: 2\n\n"


def test_iterator_may_be_empty(start_server):
    _, port = start_server(plugin=adding(get("/events", lambda request: iter([]))))
    response, raw = fetch(port, "GET", "/events")
    assert (response.status, raw) == (200, b"")


@pytest.mark.logs_errors
@pytest.mark.parametrize("content", [None, 3, object(), {"a": {1}}, iter(["", 3])])
def test_content_that_cannot_be_sent_is_an_error_of_the_plugin(
    content, start_server, caplog
):
    _, port = start_server(plugin=adding(get("/x", lambda request: content)))
    _, raw = fetch(port, "GET", "/x")
    assert b"server_error" in raw
    assert "plugin 'test' (tests 0)" in only_error(caplog)


@pytest.mark.logs_errors
@pytest.mark.parametrize(
    "given",
    [
        dict(headers={"X-Own": "snow \u2603"}),
        dict(headers={"X-Own": "1\r\nX-Evil: 1"}),
        dict(headers={"X Own": "1"}),
        dict(headers={"Content-Length": "9"}),
        dict(content_type="text/plain\r\nX-Evil: 1"),
        dict(status=9999),
        dict(content={"x": float("nan")}),
    ],
)
def test_response_that_is_no_http_is_an_error_of_the_plugin(given, start_server):
    def answer(request):
        return RouteResponse(**{"content": {}} | given)

    _, port = start_server(plugin=adding(get("/x", answer)))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for path, status in (("/x", 500), ("/health", 200)):
        connection.request("GET", path)
        response = connection.getresponse()
        assert (response.status, response.getheader("X-Evil")) == (status, None)
        response.read()
    connection.close()


def test_head_is_a_get_without_its_content(start_server):
    seen = []

    def answer(request):
        seen.append(request.method)
        return "hello"

    events = get("/events", lambda request: iter(["data: 1\n\n"]))
    _, port = start_server(plugin=adding(get("/x", answer), events))
    raw = send_raw(port, b"HEAD /x HTTP/1.1\r\nConnection: close\r\n\r\n", shut=False)
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"Content-Length: 5" in head and body == b""
    assert seen == ["GET"]
    response, raw = fetch(port, "HEAD", "/events")
    assert (response.status, raw) == (200, b"")


def test_connection_goes_on_after_a_head_of_a_stream(start_server):
    events = get("/events", lambda request: iter(["data: 1\n\n"]))
    _, port = start_server(plugin=adding(events))
    raw = b"HEAD /events HTTP/1.1\r\n\r\nGET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    first, second, body = send_raw(port, raw, shut=False).split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 ") and second.startswith(b"HTTP/1.1 200 ")
    assert json.loads(body) == {"status": "ok"}


@pytest.mark.parametrize(
    "methods, method, allowed",
    [
        (["GET"], "POST", "GET, HEAD, OPTIONS"),
        (["POST"], "GET", "POST, OPTIONS"),
        (["POST"], "HEAD", "POST, OPTIONS"),
        (["GET", "POST"], "DELETE", "GET, HEAD, POST, OPTIONS"),
    ],
)
def test_other_method_is_a_405_that_names_those_there_are(
    methods, method, allowed, start_server
):
    routes = [Route(m, "/x", lambda request: {}) for m in methods]
    _, port = start_server(plugin=adding(*routes))
    response, _ = fetch(port, method, "/x", {} if method == "POST" else None)
    assert (response.status, response.getheader("Allow")) == (405, allowed)


def test_key_is_needed_unless_the_route_needs_none(start_server):
    def name(request):
        return {"name": request.key_name}

    routes = get("/closed", name), get("/open", name, needs_key=False)
    _, port = start_server("llama", "--api-key", "me:secret", plugin=adding(*routes))
    key = {"Authorization": "Bearer secret"}
    assert call(port, "GET", "/closed")[0] == 401
    assert call(port, "GET", "/closed", **key) == (200, {"name": "me"})
    assert call(port, "GET", "/open") == (200, {"name": None})
    # Of a path that has both, each method asks by itself.
    assert call(port, "POST", "/open", {})[0] == 401


def test_route_sees_its_request(start_server):
    def show(request):
        return {
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "header": request.headers["x-own"],
            "body": request.body.decode(),
            "json": request.json(),
            "model": request.model().context_length,
        }

    _, port = start_server(plugin=adding(post("/a/b", show)))
    target = "//a/%62/?x=1&x=2&y=%C3%A9&z"
    status, seen = call(port, "POST", target, {"k": 1}, **{"X-Own": "v"})
    assert status == 200
    assert seen == {
        "method": "POST",
        "path": "/a/b",
        "query": {"x": "2", "y": "\u00e9", "z": ""},
        "header": "v",
        "body": '{"k": 1}',
        "json": {"k": 1},
        "model": 4096,
    }


@pytest.mark.parametrize("raw", [b"[]", b"{", b"\xff", b""])
def test_body_that_is_no_object_is_a_400(raw, start_server):
    _, port = start_server(plugin=adding(post("/x", lambda request: request.json())))
    status, answer = call(port, "POST", "/x", raw)
    assert status == 400
    assert_is_error(answer, None)


# What a route can ask of the server


def comparable(answer):
    """An answer without what is another for each request."""
    return {k: v for k, v in answer.items() if k not in ("id", "created", "usage")}


BODIES = {
    CHAT: dict(messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=1),
    TEXT: dict(prompt=["hello", "you"], n=2, max_tokens=5, temperature=0),
}


@pytest.fixture
def relay(start_server):
    """The port of a server with /answer and /stream, which do what the API's routes do, and
    its engine."""

    def answer(request):
        return request.answer(request.json())

    def chunks(request):
        for chunk in request.stream(request.json()):
            yield None if chunk is None else json.dumps(chunk) + "\n"

    def streamed(request):
        return RouteResponse(chunks(request), content_type="application/x-ndjson")

    routes = adding(post("/answer", answer), post("/stream", streamed))
    return start_server(make_engine=WatchedEngine, plugin=routes)


@pytest.mark.parametrize("path", BODIES)
def test_answer_is_that_of_the_api(path, relay):
    _, port = relay
    status, expected = call(port, "POST", path, BODIES[path])
    assert status == 200
    status, answer = call(port, "POST", "/answer", BODIES[path] | {"stream": True})
    assert status == 200
    assert comparable(answer) == comparable(expected)
    assert (
        answer["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]
    )


@pytest.mark.parametrize("path", BODIES)
def test_stream_is_that_of_the_api(path, relay):
    _, port = relay

    def texts(chunks):
        """The text of each choice, and how it has ended."""
        found = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                text, end = found.get(choice["index"], ("", None))
                delta = choice.get("delta", choice)
                text += delta.get("content", delta.get("text", ""))
                found[choice["index"]] = text, end or choice["finish_reason"]
        return found

    response, raw = fetch(port, "POST", "/stream", BODIES[path])
    chunks = [json.loads(line) for line in raw.splitlines()]
    expected = stream(port, path, **BODIES[path])
    assert response.status == 200
    assert texts(chunks) == texts(expected) != {}
    assert {c["object"] for c in chunks} == {c["object"] for c in expected}


@pytest.mark.parametrize("path", ["/answer", "/stream"])
def test_wrong_body_of_an_answer_is_a_400(path, relay):
    _, port = relay
    body = dict(messages=HELLO, max_tokens=-5)
    status, answer = call(port, "POST", path, body)
    assert status == 400
    assert_is_error(answer, "max_tokens")
    assert complete(port, "hello", max_tokens=2)


@pytest.mark.parametrize("path", ["/answer", "/stream"])
def test_client_that_leaves_a_route_frees_its_row(path, relay, caplog):
    engine, port = relay
    raw = json.dumps(dict(messages=HELLO, max_tokens=4000, ignore_eos=True)).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\nUser-Agent: x\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        assert engine.came.wait(60)
        if path == "/stream":
            assert b"200" in s.recv(1000)
    assert engine.left.wait(60)
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_route_that_leaves_its_stream_frees_the_row(start_server):
    def first(request):
        return next(request.stream(request.json()))

    engine, port = start_server(
        make_engine=WatchedEngine, plugin=adding(post("/first", first))
    )
    body = dict(messages=HELLO, max_tokens=4000, ignore_eos=True)
    assert call(port, "POST", "/first", body)[1]["object"] == "chat.completion.chunk"
    assert engine.left.wait(60)


# What is wrong with them


def routes_of(**plugins):
    found = Plugins()
    for name, loaded in plugins.items():
        found.add(name, lambda loaded=loaded: loaded, f"{name}-dist", "1.0")
    return found.routes(make_parser().parse_args([]))


def test_two_plugins_with_one_route_are_both_named():
    routes = (adding(get("/x", lambda request: {})) for _ in range(2))
    with pytest.raises(PluginError) as error:
        routes_of(**dict(zip(("first", "second"), routes)))
    assert "GET /x is also a route of" in str(error.value)
    assert "'first' (first-dist 1.0)" in str(error.value)
    assert "'second' (second-dist 1.0)" in str(error.value)


def test_two_plugins_may_have_one_path_with_two_methods():
    one, two = adding(get("/x", dict)), adding(post("/x", dict))
    assert {("GET", "/x"), ("POST", "/x")} <= set(routes_of(one=one, two=two))


@pytest.mark.parametrize("version", ["", "/v1"])
@pytest.mark.parametrize("path", [*METHODS, "/models/any/name"])
def test_route_of_the_server_cannot_be_taken(version, path):
    route = get(version + path, dict, needs_key=False)
    with pytest.raises(PluginError, match=f"{path} is a route of the server"):
        routes_of(mine=adding(route))


@pytest.mark.parametrize("path", METHODS)
def test_path_of_the_server_has_no_other_method(path):
    with pytest.raises(PluginError, match=f"{path} is a route of the server"):
        routes_of(mine=adding(post(path, dict)))


@pytest.mark.parametrize(
    "route, reason",
    [
        ("/x", "is not a mlx_lm_ext.routes.Route"),
        (Route("PUT", "/x", dict), "takes 'PUT', not GET or POST"),
        (Route("GET", "x", dict), "must be like /name/name"),
        (Route("GET", "/x/", dict), "must be like /name/name"),
        (Route("GET", "/x?y", dict), "must be like /name/name"),
        (Route("GET", "/x", None), "cannot be called"),
    ],
)
def test_wrong_route_is_named_with_its_plugin(route, reason):
    with pytest.raises(PluginError, match="plugin 'mine'") as error:
        routes_of(mine=adding(route))
    assert reason in str(error.value)
