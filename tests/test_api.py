"""HTTP: routes, answers, streams, bad input, and clients that go away."""

import base64
import http.client
import io
import itertools
import json
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers import (
    JSON,
    Always,
    Reference,
    call,
    complete,
    plugin,
    stream,
    streamed_text,
    texts,
)
from PIL import Image
from processes import join
from tiny_models import CONFIGS

from mlx_lm_ext import hookimpl
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import BatchSampler
from mlx_lm_ext.request.fields import check_size, parse_logit_bias
from mlx_lm_ext.server import api, bodies
from mlx_lm_ext.server import connection as connections
from mlx_lm_ext.server import http_server
from mlx_lm_ext.server.api import BatchAPIHandler
from mlx_lm_ext.server.bodies import Incoming
from mlx_lm_ext.server.http_server import BatchHTTPServer

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CONFIGS)
def test_32_prompts_at_once_get_the_text_of_generate(
    architecture, model_folder, start_server
):
    reference = Reference(model_folder(architecture))
    _, port = start_server(architecture)
    prompts = texts(32)
    expected = [reference.text(p, 24) for p in prompts]
    with ThreadPoolExecutor(32) as pool:
        for answer in (complete, streamed_text):
            got = pool.map(lambda p: answer(port, p, max_tokens=24), prompts)
            assert list(got) == expected


def test_200_requests_from_64_clients_all_end(start_server):
    _, port = start_server()
    with ThreadPoolExecutor(64) as pool:
        answers = pool.map(
            lambda p: complete(port, p, max_tokens=8), texts(200, longest=40)
        )
        assert len(list(answers)) == 200


def test_chat_completion_has_the_shape_of_openai(start_server):
    _, port = start_server()
    status, answer = call(port, "POST", CHAT, {"messages": HELLO, "max_tokens": 5})
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_only_the_first_chunk_has_the_role(start_server):
    _, port = start_server()
    chunks = stream(port, CHAT, messages=HELLO, max_tokens=6)
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
    assert len(roles) > 1
    assert roles == ["assistant"] + [None] * (len(roles) - 1)
    # The first chunk has a content even if it is empty: clients append to it.
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    (chunk,) = stream(port, CHAT, messages=HELLO, max_tokens=6, stop=text[:1])
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_answer_without_text_has_an_empty_content(start_server):
    _, port = start_server()
    body = {"messages": HELLO, "max_tokens": 6}
    _, answer = call(port, "POST", CHAT, body)
    text = answer["choices"][0]["message"]["content"]
    _, answer = call(port, "POST", CHAT, body | {"stop": text[:1]})
    assert answer["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("knows, role", [(False, "system"), (True, "developer")])
def test_developer_message_becomes_a_system_message_if_the_template_lacks_developers(
    knows, role, start_server
):
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    template += "{# developer #}" if knows else ""
    _, port = start_server("llama", "--chat-template", template)
    counts = []
    for asked in ("developer", role):
        messages = [{"role": asked, "content": "Be brief."}, *HELLO]
        _, answer = call(port, "POST", CHAT, {"messages": messages, "max_tokens": 1})
        counts.append(answer["usage"]["prompt_tokens"])
    assert counts == [len(f"{role}:Be brief.;user:hello;")] * 2


def test_tool_call_without_arguments_is_one_with_none(start_server):
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    _, port = start_server("llama", "--chat-template", template)
    for function in ({}, {"arguments": ""}, {"arguments": "{}"}):
        body = called({"function": {"name": "f", **function}})
        status, answer = call(port, "POST", CHAT, body)
        assert (status, answer["usage"]["prompt_tokens"]) == (200, len("{}"))


def test_chat_route_without_version_is_the_same(start_server):
    _, port = start_server()
    body = {"messages": HELLO, "max_tokens": 5}
    answers = [call(port, "POST", p, body)[1] for p in (CHAT, "/chat/completions")]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_stream_gives_usage_when_asked(start_server):
    _, port = start_server()
    body = dict(messages=HELLO, max_tokens=6)
    *chunks, last = stream(port, CHAT, stream_options={"include_usage": True}, **body)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert {c["object"] for c in [*chunks, last]} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    for options in ({}, {"include_usage": False}):
        events = stream(port, CHAT, stream_options=options, **body)
        assert all("usage" not in e for e in events)


def test_cached_tokens_are_those_of_the_prompt_that_were_not_run(start_server):
    _, port = start_server("llama", "--use-prompt-cache")
    body = {"messages": [*HELLO, {"role": "user", "content": "x" * 50}]}
    body["max_tokens"] = 3
    details = []
    for _ in range(2):
        usage = call(port, "POST", CHAT, body)[1]["usage"]
        details.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert details == [0, usage["prompt_tokens"] - 1]


def test_logprobs_are_the_same_streamed_and_not(start_server):
    _, port = start_server()
    body = dict(messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=2)
    _, answer = call(port, "POST", CHAT, body)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        # Greedy: the token is the likeliest one.
        assert entry["logprob"] == max(t["logprob"] for t in entry["top_logprobs"])
        assert len(entry["top_logprobs"]) == 2
    events = stream(port, CHAT, **body)
    streamed = [
        entry for e in events for entry in e["choices"][0]["logprobs"]["content"]
    ]
    # The rounding errors depend on the size of the batch.
    assert [e["id"] for e in streamed] == [e["id"] for e in content]
    assert [e["logprob"] for e in streamed] == pytest.approx(
        [e["logprob"] for e in content], abs=1e-4
    )


def test_logprobs_of_tokens_that_are_ruled_out_are_json(start_server):
    def processors(request, tokenizer, args):
        def only_a(tokens, logits):
            return mx.where(mx.arange(logits.shape[-1]) == a, logits, -mx.inf)

        a = tokenizer.encode("a")[0]
        return [only_a]

    rules = plugin(mlx_lm_make_logits_processors=processors)
    _, port = start_server(plugin=rules)
    body = dict(max_tokens=2, temperature=1.0)
    _, answer = call(
        port, "POST", "/v1/completions", body | dict(prompt="b", logprobs=2)
    )
    tops = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert [sorted(top.values()) for top in tops] == [[-9999.0, 0.0]] * 2
    body |= dict(messages=HELLO, logprobs=True, top_logprobs=2)
    _, answer = call(port, "POST", "/v1/chat/completions", body)
    for entry in answer["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] == 0.0
        assert [top["logprob"] for top in entry["top_logprobs"]] == [0.0, -9999.0]


def test_text_completion_has_logprobs_of_its_own_shape(start_server):
    _, port = start_server()
    body = {"prompt": "hello", "max_tokens": 4, "logprobs": 2}
    _, answer = call(port, "POST", "/v1/completions", body)
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 4
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"])


def test_prompt_may_be_token_ids(model_folder, start_server):
    _, port = start_server()
    tokens = Reference(model_folder()).tokenizer.encode("hello")
    answers = {
        complete(port, p, max_tokens=8) for p in ("hello", ["hello"], tokens, [tokens])
    }
    assert len(answers) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_word_ends_the_answer_before_it(streamed, start_server):
    _, port = start_server("deepseek_v2")
    answer = streamed_text if streamed else complete
    whole = answer(port, "hello", max_tokens=40)
    # The text of two tokens, so that no single token is the stop word.
    word = whole[len(whole) // 2 :][:2]
    text = answer(port, "hello", max_tokens=40, stop=["never", word])
    assert text == whole[: whole.index(word)]


def test_images_are_served_by_upstream(start_server):
    class Processor:
        """Adds one token for the images, which does not change the answer."""

        image_token = "<|endoftext|>"

        def __call__(self, text, images):
            assert [image.shape for image in images] == [(2, 3, 3)]
            return text + self.image_token, [mx.zeros(1)]

    engine, port = start_server()
    provider = engine.model_provider
    provider.processor = Processor()
    (model,) = provider._served.values()
    provider._served[model.key] = replace(model, takes_images=True)
    provider.model.embed_inputs = lambda tokens, pixel_values: (
        provider.model.model.embed_tokens(tokens)
    )
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    body = {"messages": [{"role": "user", "content": [image]}], "max_tokens": 4}
    status, answer = call(port, "POST", CHAT, body)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["prompt_tokens"] > 1
    assert engine.batch is None
    # The first is refused before it is tokenized, the second after.
    limit = model.most_characters
    for n in (limit + 1, 5000):
        text = {"type": "text", "text": "x" * n}
        long = {"messages": [{"role": "user", "content": [text, image]}]}
        status, answer = call(port, "POST", CHAT, long)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    image["image_url"]["url"] = "data:image/png;base64,AAAA"
    status, answer = call(port, "POST", CHAT, body)
    assert (status, answer["error"]["param"]) == (400, "messages")


def test_model_names_of_the_command_line_mean_the_served_model(
    start_server, monkeypatch
):
    engine, port = start_server()
    # Each request comes a second after the last.
    seconds = itertools.count(2_000_000_000)
    clock = SimpleNamespace(time=lambda: next(seconds), monotonic=time.monotonic)
    monkeypatch.setattr(connections, "time", clock)
    answers = {
        complete(port, "hello", max_tokens=5, model=m)
        for m in ("default_model", engine.cli_args.model_id, "")
    }
    assert len(answers) == 1
    _, models = call(port, "GET", "/v1/models")
    assert models["data"][0]["id"] == engine.cli_args.model_id
    for name in (engine.cli_args.model_id, "default_model"):
        status, model = call(port, "GET", f"/v1/models/{name}")
        assert (status, model) == (200, models["data"][0])
    assert call(port, "GET", "/v1/models/nobody/nothing")[0] == 404


def test_health_tells_whether_the_engine_serves(start_server):
    engine, port = start_server()
    assert call(port, "GET", "/health") == (200, {"status": "ok"})
    engine.loaded.clear()
    assert call(port, "GET", "/health") == (503, {"status": "loading"})
    engine.loaded.set()
    engine.stop_and_join()
    assert call(port, "GET", "/health") == (
        503,
        {"status": "unavailable", "reason": "the server is stopping"},
    )
    assert call(port, "POST", CHAT, {"messages": HELLO})[0] == 503


def test_answer_of_a_server_that_cannot_serve_yet_says_when_to_come_back(start_server):
    engine, port = start_server()
    engine.loaded.clear()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    response = connection.getresponse()
    response.read()
    assert (response.status, response.getheader("Retry-After")) == (503, "1")
    engine.loaded.set()
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert (response.status, response.getheader("Retry-After")) == (200, None)
    connection.close()


@pytest.fixture
def post_while_loading(start_server, monkeypatch):
    """Sends a chat to a server that loads its model. Gives the engine, the connection, and
    a function that waits until the server has noticed ``n`` times that it still loads.
    """
    connections = []

    def post(*argv, **fields):
        engine, port = start_server("llama", *argv)
        engine.loaded.clear()
        waits, original = threading.Semaphore(0), engine.loaded.wait

        def wait(timeout):
            waits.release()
            return original(timeout)

        monkeypatch.setattr(engine.loaded, "wait", wait)
        monkeypatch.setattr(api, "HEARTBEAT", 0.05)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connections.append(connection)
        connection.request("POST", CHAT, chat(**fields), JSON)

        def wait_for(n):
            for _ in range(n):
                assert waits.acquire(timeout=60)

        return engine, connection, wait_for

    yield post
    for connection in connections:
        connection.close()


def test_request_waits_until_the_model_is_loaded(post_while_loading):
    engine, connection, wait_for = post_while_loading()
    wait_for(3)
    engine.loaded.set()
    response = connection.getresponse()
    answer = json.load(response)
    assert (response.status, answer["usage"]["completion_tokens"]) == (200, 2)


def test_stream_is_kept_alive_until_the_model_is_loaded(post_while_loading):
    engine, connection, wait_for = post_while_loading(stream=True)
    response = connection.getresponse()
    assert response.status == 200
    assert response.readline() == b": keepalive\n"
    engine.loaded.set()
    raw = response.read()
    assert b"data: {" in raw and raw.endswith(b"data: [DONE]\n\n")
    # The connection serves on.
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


def test_error_of_a_stream_that_was_kept_alive_is_its_last_event(post_while_loading):
    engine, connection, wait_for = post_while_loading(stream=True, model="none")
    response = connection.getresponse()
    assert response.readline() == b": keepalive\n"
    engine.loaded.set()
    event = response.read().rpartition(b"data: ")[2]
    assert json.loads(event)["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_has_closed_its_sending_side_waits_for_the_model(
    stream, post_while_loading, monkeypatch
):
    monkeypatch.setattr(connections, "HALF_CLOSE", 60)
    engine, connection, wait_for = post_while_loading(stream=stream)
    connection.sock.shutdown(socket.SHUT_WR)
    wait_for(2)
    with monkeypatch.context() as patch:
        patch.setattr(connections, "PATIENCE", 0.1)
        wait_for(5)
    engine.loaded.set()
    assert connection.getresponse().read().endswith(b"[DONE]\n\n" if stream else b"}")


def test_wrong_body_is_refused_before_the_model_is_loaded(post_while_loading):
    _, connection, _ = post_while_loading(stream=True, temperature=-1)
    assert connection.getresponse().status == 400


@pytest.mark.parametrize("stream", [False, True])
def test_request_that_waits_for_the_model_is_told_that_it_cannot_be_loaded(
    stream, post_while_loading
):
    engine, connection, wait_for = post_while_loading(stream=stream)
    wait_for(2)
    engine.inbox.close("the model cannot be loaded")
    response = connection.getresponse()
    assert response.status == (200 if stream else 503)
    error = json.loads(response.read().rpartition(b"data: ")[2])["error"]
    assert error["message"] == "the model cannot be loaded"
    engine.loaded.set()


def test_request_that_waits_for_the_model_ends_after_its_time(post_while_loading):
    _, connection, _ = post_while_loading("--request-timeout", "0.2")
    response = connection.getresponse()
    assert response.status == 503
    assert "--request-timeout" in json.load(response)["error"]["message"]


def chat(**fields):
    return json.dumps({"messages": HELLO, "max_tokens": 2, **fields}).encode()


def message(**fields):
    return chat(messages=[fields])


def called(call):
    return message(role="assistant", tool_calls=[call])


# Body, and the field that the error must name.
BAD_BODIES = [
    (b"not json", None),
    (b"\xff\xfe", None),
    (b"", None),
    (b"[" * 100000, None),
    (b"[1, 2]", None),
    (b'"text"', None),
    (b"{}", "messages"),
    (chat(messages=[]), "messages"),
    (chat(messages="hello"), "messages"),
    (chat(messages=["hello"]), "messages[0]"),
    (message(content="x"), "messages[0].role"),
    (message(role=7, content="x"), "messages[0].role"),
    (message(role="", content="x"), "messages[0].role"),
    (message(role="x" * 65, content="x"), "messages[0].role"),
    (
        message(role="user", content=[{"type": "image_url", "image_url": "data:,"}]),
        "messages",
    ),
    (
        message(role="user", content=[{"type": "video", "video": "x"}]),
        "messages[0].content[0].type",
    ),
    (called("f"), "messages[0].tool_calls[0]"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=10**400), "max_tokens"),
    (chat(max_tokens=1.5), "max_tokens"),
    (chat(max_tokens="2"), "max_tokens"),
    (chat(max_tokens=True), "max_tokens"),
    (chat(max_completion_tokens=0), "max_completion_tokens"),
    (chat(stream="yes"), "stream"),
    (chat(stream_options=True), "stream_options"),
    (chat(stream_options={"include_usage": "x"}), "stream_options.include_usage"),
    (chat(stream_options={"include_usage": 0}), "stream_options.include_usage"),
    (chat(model=7), "model"),
    (chat(model="nobody/nothing"), "model"),
    (chat(adapters="nowhere"), "adapters"),
    (chat(temperature=-1), "temperature"),
    (chat(temperature="hot"), "temperature"),
    (chat(temperature=float("nan")), "temperature"),
    (chat(temperature=float("inf")), "temperature"),
    (chat(top_p=1.1), "top_p"),
    (chat(top_k=-2), "top_k"),
    (chat(min_p=2), "min_p"),
    (chat(xtc_probability=2), "xtc_probability"),
    (chat(xtc_threshold=0.6), "xtc_threshold"),
    (chat(repetition_penalty=-1), "repetition_penalty"),
    (chat(presence_penalty="x"), "presence_penalty"),
    (chat(seed="x"), "seed"),
    (chat(seed=2**64), "seed"),
    (chat(stop=7), "stop"),
    (chat(stop=["x", 7]), "stop"),
    (chat(stop=["x", "y" * 1001]), "stop"),
    (chat(logit_bias=[1]), "logit_bias"),
    (chat(logit_bias={"x": 1}), "logit_bias"),
    (chat(logit_bias={"1": "x"}), "logit_bias"),
    (chat(logit_bias={"100000": 1}), "logit_bias"),
    (chat(logit_bias={"-1": 1}), "logit_bias"),
    (chat(logprobs="x"), "logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(tools={}), "tools"),
    (chat(parallel_tool_calls="no"), "parallel_tool_calls"),
    (chat(tools=["x"]), "tools[0]"),
    (chat(tools=[{"type": "function"}]), "tools[0].function"),
    (chat(tools=[{"function": {}}]), "tools[0].function.name"),
    (chat(tools=[{"function": {"name": 5}}]), "tools[0].function.name"),
    (chat(tools=[{"function": {"name": ""}}]), "tools[0].function.name"),
    (
        chat(tools=[{"function": {"name": "f", "parameters": []}}]),
        "tools[0].function.parameters",
    ),
    (chat(tool_choice="required"), "tool_choice"),
    (chat(n=129), "n"),
    (chat(functions=[{"name": "f"}]), "functions"),
    (chat(modalities=["audio"]), "modalities"),
    (chat(n=0), "n"),
    (chat(response_format={"type": "xml"}), "response_format.type"),
    (chat(chat_template_kwargs=[]), "chat_template_kwargs"),
    *(
        (chat(chat_template_kwargs={name: value}), f"chat_template_kwargs.{name}")
        for name, value in {
            "chat_template": "{{ 9 ** (9 ** 9) }}",
            "padding": "max_length",
            "max_length": 200_000_000,
            "truncation": True,
            "tokenize": False,
            "tokenizer_kwargs": {"stride": 1},
            "tools": [],
            "documents": [],
            "conversation": [],
            "messages": [],
            "add_special_tokens": True,
            "bos_token": "x",
            "self": 1,
            "__class__": 1,
        }.items()
    ),
    (chat(role_mapping={"user": ["x"]}), "role_mapping.user"),
    (chat(role_mapping={"user": "x" * 1001}), "role_mapping.user"),
    (chat(messages=[{"role": "user", "content": "x"}] * 10_001), "messages"),
    (
        message(role="user", content=[{"type": "text", "text": "x"}] * 20_001),
        "messages",
    ),
    (chat(tools=[{"type": "function", "function": {}}] * 1025), "tools"),
    (chat(stop=["x"] * 129), "stop"),
    (chat(echo=True), "echo"),
    (chat(user="x" * 4097), "user"),
    (chat(cache_salt="x" * 4097), "cache_salt"),
    (chat(model="x" * 4097), "model"),
    (chat(model="x\0"), "model"),
    (chat(model="x\ud800"), "model"),
    (chat(logit_bias={"1": 10**400}), "logit_bias"),
    (chat(logit_bias={"1" * 5000: 1}), "logit_bias"),
    (chat(logit_bias={str(2**61 - 1): 1}), "logit_bias"),
    (chat(logit_bias={"1_0": 1}), "logit_bias"),
    (b'{"messages": [], "max_tokens": ' + b"1" * 5000 + b"}", None),
    (b'{"messages": [' + b"[]," * 500_000 + b"[]]}", None),
    (
        chat(chat_template_kwargs={"return_tensors": "np"}),
        "chat_template_kwargs.return_tensors",
    ),
]

BAD_PROMPTS = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": ["a", 7]}, "prompt"),
    ({"prompt": [[1], [2.5]]}, "prompt"),
    ({"prompt": [1, "b"]}, "prompt"),
    ({"prompt": [1, 100000]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**400]}, "prompt"),
    ({"prompt": "x" * 5000}, "prompt"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "n": 3, "best_of": 2}, "best_of"),
]


def assert_is_error(answer, param):
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_bad_input_names_its_field_and_the_next_request_is_served(start_server):
    _, port = start_server()
    bodies = [(CHAT, raw, param) for raw, param in BAD_BODIES] + [
        ("/v1/completions", json.dumps(body).encode(), param)
        for body, param in BAD_PROMPTS
    ]
    for path, raw, param in bodies:
        status, answer = call(port, "POST", path, raw)
        assert status in (400, 404), raw[:80]
        assert_is_error(answer, param)
        assert (status == 404) == (answer["error"]["code"] == "model_not_found")
    assert complete(port, "hello", max_tokens=2)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("POST", "/v1/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", CHAT, 405),
        ("POST", "/health", 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_unknown_route_is_an_error_object(method, path, status, start_server):
    _, port = start_server()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, chat() if method != "GET" else None, JSON)
    response = connection.getresponse()
    assert response.status == status
    assert_is_error(json.loads(response.read()), None)
    allowed = {405: "POST, OPTIONS" if path == CHAT else "GET, HEAD, OPTIONS"}
    assert response.getheader("Allow") == allowed.get(status)
    connection.close()


def wait_until(condition):
    """Evaluate a condition again and again until it is true."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end


def post(headers, raw, version="1.1"):
    """The bytes of a request."""
    head = f"POST {CHAT} HTTP/{version}\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\n{headers}\r\n\r\n"
    return head.encode() + raw


def post_whole(body, version="1.1"):
    return post(f"Content-Length: {len(body)}", body, version)


def send_raw(port, raw, shut=True):
    """Send bytes, end the sending side, and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(raw)
        if shut:
            s.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: s.recv(65536), b""))


@pytest.mark.parametrize(
    "headers, body, status",
    [
        ("Content-Length: 100", b"{}", 400),
        ("Content-Length: x", b"{}", 400),
        ("Content-Length: -5", b"{}", 400),
        ("X-Nothing: 1", b"", 411),
        ("Content-Length: " + "9" * 5000, b"{}", 413),
        (f"Content-Length: {10**12}", b"{}", 413),
    ],
)
def test_broken_body_is_an_error_and_the_next_request_is_served(
    headers, body, status, start_server
):
    _, port = start_server()
    answer = send_raw(port, post(headers, body))
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert_is_error(json.loads(content), None)
    assert complete(port, "hello", max_tokens=2)


CHUNKED = "Transfer-Encoding: chunked"


class Endless(BatchSampler):
    """Chooses the same token for ever."""

    name = "endless"

    def __call__(self, logprobs):
        return mx.full(logprobs.shape[0], 65)


@pytest.fixture
def observe(start_server):
    """Starts a server whose plugin observes requests and has two samplers: "always", which
    answers "_`abcdefgh...", and "endless". Gives the engine, the port, and the queue of
    the observed statistics."""

    def start(*argv):
        seen = queue.SimpleQueue()
        observer = plugin(
            mlx_lm_register_samplers=lambda: [Always, Endless],
            mlx_lm_request_finished=lambda stats: seen.put(stats),
        )
        return *start_server("llama", *argv, plugin=observer), seen

    return start


def ask(port, streamed, **body):
    """The last part of an answer, which has its usage."""
    body["messages"] = HELLO
    if streamed:
        return stream(port, CHAT, stream_options={"include_usage": True}, **body)[-1]
    return call(port, "POST", CHAT, body)[1]


def assert_counts(stats, usage):
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert stats.prompt_tokens == usage["prompt_tokens"] > 0
    assert stats.cached_tokens == cached
    assert stats.completion_tokens == usage["completion_tokens"]


@pytest.mark.parametrize("streamed", [False, True])
def test_observer_gets_the_counts_of_usage_of_an_answer_that_a_stop_word_ends(
    streamed, observe
):
    _, port, seen = observe("--use-prompt-cache")
    for body, n in (({}, 10), ({"stop": "bc"}, 5)):
        answer = ask(port, streamed, sampler="always", max_tokens=10, **body)
        stats = seen.get(timeout=60)
        assert_counts(stats, answer["usage"])
        assert stats.completion_tokens == n
        assert stats.finish_reason == ("stop" if body else "length")
    assert stats.cached_tokens > 0


class CallingTokenizer:
    """The tokenizer of a model whose tool calls are between "a" and "d"."""

    has_thinking, has_tool_calling = False, True
    tool_call_start, tool_call_end = "a", "d"
    structural_markers, response_transitions = (), {}

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    @staticmethod
    def tool_parser(text, tools):
        return {"name": text, "arguments": {}}


@pytest.mark.parametrize("streamed", [False, True])
def test_observer_gets_the_counts_of_usage_of_an_answer_that_a_tool_call_ends(
    streamed, observe
):
    engine, port, seen = observe()
    (model,) = engine.model_provider._served.values()
    calling = replace(model, tokenizer=CallingTokenizer(model.tokenizer))
    engine.model_provider._served[model.key] = calling
    body = {"tools": [{"function": {"name": "bc"}}], "parallel_tool_calls": False}
    answer = ask(port, streamed, sampler="always", max_tokens=10, **body)
    stats = seen.get(timeout=60)
    assert_counts(stats, answer["usage"])
    assert stats.completion_tokens == len("_`abcd")
    assert stats.finish_reason == "tool_calls"


def test_observer_of_a_stream_whose_client_has_left_gets_the_tokens_so_far(observe):
    _, port, seen = observe()
    raw = chat(max_tokens=4000, stream=True, sampler="endless", logprobs=True)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(post_whole(raw))
        answer = b""
        while answer.count(b'"token"') < 3:
            answer += s.recv(1000)
    stats = seen.get(timeout=60)
    assert stats.finish_reason == "cancelled"
    assert stats.prompt_tokens > 0
    # There is a log probability for each token.
    assert answer.count(b'"token"') <= stats.completion_tokens < 4000


@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_is_too_large_is_answered_before_it_is_read(chunked, start_server):
    _, port = start_server("llama", "--max-body-bytes", "1000")
    raw = chat(messages=[{"role": "user", "content": "x" * 900}])
    assert len(raw) < 1000
    assert call(port, "POST", CHAT, raw)[0] == 200
    # More than the buffers of a connection hold: the rest of it is read and dropped.
    raw = chat(messages=[{"role": "user", "content": "x" * 10_000_000}])
    headers = {"Transfer-Encoding": "chunked"} if chunked else {}
    raw = b"%X\r\n%b\r\n0\r\n\r\n" % (len(raw), raw) if chunked else raw
    status, answer = call(port, "POST", CHAT, raw, **headers)
    assert status == 413
    assert "1000" in answer["error"]["message"]


def test_images_do_not_count_in_the_size_of_a_body():
    image = b'{"type": "image_url", "image_url": {"url": "data:image/png;base64,%b"}}'
    raw = b'{"x": [' + image % (b"A" * 1000) + b", " + image % (b"A" * 1000) + b"]}"
    check_size(raw, 200)
    with pytest.raises(RequestError) as error:
        check_size(raw + b" " * 200, 200)
    assert error.value.status == 413
    with pytest.raises(RequestError):
        check_size(b'{"x": "data:' + b"A" * 1000, 200)


def test_biases_are_bounded():
    biases = {str(i): 1 for i in range(10_000)}
    assert len(parse_logit_bias({"logit_bias": biases})) == 10_000
    with pytest.raises(RequestError, match="10000 at most"):
        parse_logit_bias({"logit_bias": biases | {"x": 1}})


def test_extensions_of_chunks_count_as_part_of_the_body(start_server):
    _, port = start_server("llama", "--max-body-bytes", "10000")
    chunks = b"1;" + b"x" * 4000 + b"\r\n{\r\n"
    answer = send_raw(port, post(CHUNKED, chunks * 4), shut=False)
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "headers, first",
    [
        (f"Content-Length: {len(chat())}", b"HTTP/1.1 100 "),
        (f"Content-Length: {10**10}", b"HTTP/1.1 413 "),
        ("Content-Length: 5\r\nOrigin: http://evil.example", b"HTTP/1.1 403 "),
    ],
)
def test_client_is_told_to_continue_only_if_its_body_will_be_read(
    headers, first, start_server
):
    _, port = start_server()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(post(f"Expect: 100-continue\r\n{headers}", b""))
        answer = s.recv(1000)
        assert answer.startswith(first)
        if first.endswith(b"100 "):
            s.sendall(chat())
            assert s.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_bodies_of_all_connections_are_bounded(start_server, monkeypatch):
    monkeypatch.setattr(http_server, "MAX_BODIES", 100_000)
    monkeypatch.setattr(http_server, "SMALL_BODY", 1000)
    _, port = start_server()
    small = {"prompt": "x" * 100, "max_tokens": 1}
    large = json.dumps(small).encode() + b" " * 80_000
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        # Only bytes that have arrived take room.
        s.sendall(post("Expect: 100-continue\r\nContent-Length: 90000", b""))
        assert s.recv(1000).startswith(b"HTTP/1.1 100 ")
        assert call(port, "POST", "/v1/completions", large)[0] == 200
        s.sendall(b" " * 89_000)
        wait_until(lambda: call(port, "POST", "/v1/completions", large)[0] == 503)
        assert call(port, "POST", "/v1/completions", small)[0] == 200
        s.sendall(b" " * 1000)
        assert s.recv(1000).startswith(b"HTTP/1.1 400 ")
    # The room of a request is free again after its answer.
    for _ in range(10):
        wait_until(lambda: call(port, "POST", "/v1/completions", large)[0] == 200)


def test_connections_are_bounded_and_the_log_says_so_once(start_server, caplog):
    _, port = start_server("llama", "--max-connections", "2")
    address = ("127.0.0.1", port)
    connect = partial(socket.create_connection, address, timeout=60)
    with connect(), connect():
        for _ in range(2):
            with connect() as third:
                assert third.recv(1) == b""
    (line,) = [r.message for r in caplog.records if "connections" in r.message]
    assert "2 connections are open" in line


def test_client_that_sends_more_and_leaves_is_gone(start_server):
    engine, port = start_server(make_engine=WatchedEngine)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(post_whole(chat(max_tokens=4000)))
        assert engine.came.wait(60)
        s.sendall(b"G")
    assert engine.left.wait(60)


def test_continue_that_a_request_without_body_expects_is_not_sent_to_the_next(
    start_server,
):
    _, port = start_server()
    get = b"GET /health HTTP/1.1\r\nExpect: 100-continue\r\n\r\n"
    last = post(f"Connection: close\r\nContent-Length: {len(BODY)}", BODY)
    answer = send_raw(port, get + last, shut=False)
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b"HTTP/1.1 100 " not in answer


class Socket:
    """A connection that receives one byte at a time."""

    def __init__(self, connection):
        self.connection = connection

    def fileno(self):
        return self.connection.fileno()

    def recv_into(self, buffer):
        return self.connection.recv_into(buffer, 1)

    def settimeout(self, seconds):
        self.connection.settimeout(seconds)


@pytest.mark.parametrize("seconds, n", [(0.0, 1), (60.0, 7)])
def test_request_that_arrives_too_slowly_runs_out_of_time(seconds, n, monkeypatch):
    monkeypatch.setattr(bodies, "ARRIVAL_SECONDS", seconds)
    monkeypatch.setattr(bodies, "BYTES_A_SECOND", 1e12)
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"a line\n and more")
        incoming = Incoming(Socket(here), 60, header_timeout=60)
        incoming.in_headers = False
        assert incoming.read(1) == b"a"
        if seconds:
            assert incoming.readline() == b" line\n"
        else:
            with pytest.raises(TimeoutError):
                incoming.readline()
        assert incoming.n == n
        # The time of the next request starts anew.
        incoming.begin()
        assert len(incoming.read(1)) == 1


def test_headers_that_arrive_too_slowly_run_out_of_time():
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"GET / HTTP/1.1\r\nHost")
        incoming = Incoming(Socket(here), 60, header_timeout=0.0)
        assert incoming.read(1) == b"G"
        with pytest.raises(TimeoutError):
            incoming.read(1)
        incoming.in_headers = False
        assert incoming.read(1) == b"E"


def test_body_that_arrives_too_slowly_is_a_408(start_server, monkeypatch):
    monkeypatch.setattr(bodies, "ARRIVAL_SECONDS", 0.2)
    _, port = start_server()
    answer = send_raw(port, post("Content-Length: 100", b"{"), shut=False)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert_is_error(json.loads(content), None)


def test_connection_that_does_not_end_delays_the_end_of_the_server_for_a_limited_time(
    start_server, monkeypatch, caplog
):
    monkeypatch.setattr(http_server, "CLOSE_TIMEOUT", 0.1)
    entered, leave = threading.Event(), threading.Event()

    def get(self):
        entered.set()
        assert leave.wait(60)

    monkeypatch.setattr(BatchAPIHandler, "get", get)
    httpd = BatchHTTPServer(("127.0.0.1", 0), partial(BatchAPIHandler, None))
    threading.Thread(target=httpd.serve_forever).start()
    with socket.create_connection(httpd.server_address, timeout=60) as s:
        s.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert entered.wait(60)
        httpd.shutdown()
        httpd.server_close()
        assert "1 connections did not end" in caplog.text
        leave.set()


@pytest.mark.parametrize("argv", [[], ["--cache-salt-required"]])
def test_salt_of_a_proxy_wins_over_that_of_the_body(argv, start_server):
    _, port = start_server("llama", "--use-prompt-cache", *argv)

    def n_cached(salt=None, header=None):
        body = {"prompt": "the same text for all", "max_tokens": 1}
        body |= {} if salt is None else {"cache_salt": salt}
        headers = {} if header is None else {"X-Cache-Salt": header}
        status, answer = call(port, "POST", "/v1/completions", body, **headers)
        if status != 200:
            assert_is_error(answer, "cache_salt")
            return None
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert n_cached(salt="mine") == 0
    assert n_cached(salt="mine") > 0
    assert n_cached(salt="mine", header="theirs") == 0
    assert n_cached(header="theirs") > 0
    assert n_cached(header="mine", salt="theirs") > 0
    if argv:
        assert n_cached() is n_cached(salt="", header="") is n_cached("x", "") is None


def test_salt_that_is_sent_twice_is_refused(start_server):
    _, port = start_server()
    twice = "X-Cache-Salt: a\r\nX-Cache-Salt: b\r\nConnection: close"
    answer = send_raw(
        port, post(f"{twice}\r\nContent-Length: {len(BODY)}", BODY), False
    )
    assert answer.startswith(b"HTTP/1.1 400 ")


BODY = chat()
CHUNK = b"%X\r\n%b\r\n" % (len(BODY), BODY)


def test_body_may_come_in_chunks(start_server):
    _, port = start_server()
    chunks = b"5;name=value\r\n%b\r\n%X\r\n%b\r\n0\r\nX-Trailer: 1\r\n\r\n"
    chunks %= BODY[:5], len(BODY) - 5, BODY[5:]
    requests = post(CHUNKED, chunks) + post(f"{CHUNKED}\r\nConnection: close", chunks)
    answers = send_raw(port, requests, shut=False)
    assert answers.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize(
    "raw",
    [
        post(CHUNKED, CHUNK),
        post(CHUNKED, CHUNK[:-3]),
        post(CHUNKED, CHUNK.replace(b"\r\n", b"\n") + b"0\n\n"),
        post(CHUNKED, CHUNK[:-2] + b"\r\r\n0\r\n\r\n"),
        post(CHUNKED, CHUNK[:-2] + b"{}\r\n0\r\n\r\n"),
        post(CHUNKED, b"0x" + CHUNK + b"0\r\n\r\n"),
        post(CHUNKED, b" " + CHUNK + b"0\r\n\r\n"),
        post(CHUNKED, CHUNK.replace(b"\r\n", b";a\rb\r\n", 1) + b"0\r\n\r\n"),
        post(CHUNKED, CHUNK + b"0;" + b"x" * 65536 + b"\r\n\r\n"),
        post(CHUNKED, CHUNK + b"0\r\n \r\n"),
        post(CHUNKED, CHUNK + b"0\r\n" + b"x" * 65536 + b"\r\n\r\n"),
        post(CHUNKED, CHUNK + b"0\r\n" + b"a: b\r\n" * 200 + b"\r\n"),
        post("Transfer-Encoding: gzip, chunked", CHUNK + b"0\r\n\r\n"),
        post(f"{CHUNKED}\r\nContent-Length: 9", CHUNK + b"0\r\n\r\n"),
        post(f"{CHUNKED}\r\nConnection: keep-alive", CHUNK + b"0\r\n\r\n", "1.0"),
        post(f"Name : x\r\nContent-Length: {len(BODY)}", BODY),
    ],
)
def test_body_of_which_the_end_is_in_doubt_is_refused(raw, start_server):
    _, port = start_server()
    head, _, content = send_raw(port, raw).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    message = json.loads(content)["error"]["message"]
    assert any(word in message for word in ("chunk", "body", "headers"))
    assert complete(port, "hello", max_tokens=2)


def test_body_of_a_get_is_not_taken_for_a_request(start_server):
    _, port = start_server()
    hidden = b"GET /nothing HTTP/1.1\r\n\r\n"
    head = f"GET /health HTTP/1.1\r\nContent-Length: {len(hidden)}\r\n\r\n"
    answer = send_raw(port, head.encode() + hidden, shut=False)
    assert answer.count(b"HTTP/1.1 ") == 1


def test_what_is_not_http_is_an_error_object(start_server):
    _, port = start_server()
    assert b"invalid_request_error" in send_raw(port, b"hello there you\r\n\r\n")
    assert complete(port, "hello", max_tokens=2)


def test_connection_is_kept_for_the_next_request(start_server):
    _, port = start_server()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    bodies = [chat(), chat(stream=True), b"{}", chat()]
    statuses, sockets = [], set()
    for body in bodies:
        connection.request("POST", CHAT, body, JSON)
        sockets.add(connection.sock)
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
    connection.close()
    assert statuses == [200, 200, 400, 200]
    assert len(sockets) == 1


def test_client_of_http_1_0_gets_a_stream_without_chunks(start_server):
    _, port = start_server()
    answer = send_raw(port, post_whole(chat(stream=True), "1.0"), shut=False)
    assert b"Transfer-Encoding" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


def test_stream_without_a_new_token_has_keep_alive_comments(start_server, monkeypatch):
    monkeypatch.setattr(api, "HEARTBEAT", 0.01)
    goes_on = threading.Event()

    def wait():
        assert goes_on.wait(60)

    _, port = start_server(plugin=plugin(mlx_lm_make_logits_processors=wait))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", CHAT, chat(stream=True), JSON)
    response = connection.getresponse()
    for _ in range(3):
        assert response.readline() == b": keepalive\n"
        assert response.readline() == b"\n"
    goes_on.set()
    events = [e for e in response.read().split(b"\n\n") if e and e[:1] != b":"]
    assert all(event.startswith(b"data: ") for event in events)
    assert events[-1] == b"data: [DONE]"
    connection.close()


def test_events_are_not_held_back_by_the_system(start_server, monkeypatch):
    def get(self):
        value = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        self.send_json(200, {"value": value})

    monkeypatch.setattr(BatchAPIHandler, "get", get)
    _, port = start_server()
    assert call(port, "GET", "/health")[1]["value"]


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_server_may_listen_on_ipv6(start_engine):
    engine = start_engine()
    make = partial(BatchAPIHandler, engine.client, system_fingerprint="")
    httpd = BatchHTTPServer(("::1", 0), make)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        port = httpd.server_address[1]
        connection = http.client.HTTPConnection("::1", port, timeout=60)
        connection.request("POST", CHAT, chat(), JSON)
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        httpd.shutdown()
        join(thread)
        httpd.server_close()


def test_connection_that_sends_nothing_is_closed(start_server):
    _, port = start_server("llama", "--idle-timeout", "0.1")
    assert send_raw(port, b"", shut=False) == b""
    assert send_raw(port, b"GET /hea", shut=False) == b""


class WatchedEngine(Engine):
    """Sets ``came`` when a request has come, and ``left`` when the row of one is free."""

    def __init__(self, *args):
        self.came, self.left = threading.Event(), threading.Event()
        super().__init__(*args)

    def take_new(self, block):
        super().take_new(block)
        if self.waiting:
            self.came.set()

    def drop_unwanted(self):
        before = len(self.running)
        super().drop_unwanted()
        if len(self.running) < before:
            self.left.set()


@pytest.mark.parametrize("streamed", [False, True])
def test_client_that_goes_away_frees_its_row(streamed, start_server, caplog):
    engine, port = start_server(make_engine=WatchedEngine)
    body = chat(max_tokens=4000, stream=streamed)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(post_whole(body))
        assert engine.came.wait(60)
        if streamed:
            s.recv(1000)
    assert engine.left.wait(60)
    assert complete(port, "hello", max_tokens=2)
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


def test_client_that_takes_nothing_frees_its_row(start_server, caplog):
    class Handler(BatchAPIHandler):
        def setup(self):
            # Too small for the events of the answer.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            super().setup()

    argv = ["llama", "--idle-timeout", "0.1"]
    engine, port = start_server(*argv, make_engine=WatchedEngine, handler=Handler)
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.settimeout(60)
        s.connect(("127.0.0.1", port))
        s.sendall(post_whole(chat(max_tokens=4000, stream=True)))
        assert engine.left.wait(60)
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


def test_row_is_free_one_step_after_its_client_was_seen_to_be_gone(start_server):
    events = []

    class RecordingEngine(WatchedEngine):
        def __init__(self, *args):
            super().__init__(*args)
            cancel = self.inbox.cancel

            def recorded_cancel(request):
                events.append(("cancelled", self.batch.n_steps))
                cancel(request)

            self.inbox.cancel = recorded_cancel

        def drop_unwanted(self):
            super().drop_unwanted()
            if self.left.is_set():
                events.append(("left", self.batch.n_steps))

    engine, port = start_server(make_engine=RecordingEngine)
    body = chat(max_tokens=4000, stream=True)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(post_whole(body))
        s.recv(1000)
    assert engine.left.wait(60)
    complete(port, "after", max_tokens=1)
    (first, cancelled), (second, left), *_ = events
    assert (first, second) == ("cancelled", "left")
    assert left - cancelled <= 1


def test_stream_that_cannot_start_frees_its_row(start_server, monkeypatch):
    def start_events(self):
        raise BrokenPipeError

    monkeypatch.setattr(BatchAPIHandler, "start_events", start_events)
    engine, port = start_server(make_engine=WatchedEngine)
    body = chat(max_tokens=4000, stream=True)
    assert send_raw(port, post_whole(body), shut=False) == b""
    complete(port, "after", max_tokens=1)
    assert not engine.running


@pytest.mark.logs_errors
def test_failure_before_the_first_token_has_a_status_streamed_or_not(start_server):
    class FailingPlugin:
        @hookimpl
        def mlx_lm_make_logits_processors(self):
            raise ArithmeticError("a secret of the server")

    _, port = start_server(plugin=FailingPlugin())
    status, answer = call(port, "POST", CHAT, chat())
    assert status == 500
    assert answer["error"]["type"] == "server_error"
    assert "secret" not in answer["error"]["message"]
    # Nothing of the stream was sent.
    raw = send_raw(port, post_whole(chat(stream=True), "1.0"), shut=False)
    assert raw.startswith(b"HTTP/1.1 500 ")


@pytest.mark.logs_errors
def test_failure_in_the_middle_of_a_stream_is_an_event(start_server):
    calls = iter([lambda tokens, logits: logits] * 3)

    def processors(request):
        return [lambda tokens, logits: next(calls)(tokens, logits)]

    _, port = start_server(plugin=plugin(mlx_lm_make_logits_processors=processors))
    raw = send_raw(port, post_whole(chat(stream=True, max_tokens=9), "1.0"), shut=False)
    assert raw.startswith(b"HTTP/1.1 200 ")
    event = json.loads(raw.split(b"data: ")[-1])
    assert event["error"]["type"] == "server_error"
    assert b"[DONE]" not in raw


def test_browser_origin_gets_cors_headers(start_server):
    _, port = start_server("llama", "--allowed-origins", "http://a.test,http://b.test")
    for origin, allowed in (
        ("http://b.test", "http://b.test"),
        ("http://c.test", None),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health", headers={"Origin": origin})
        response = connection.getresponse()
        assert response.getheader("Access-Control-Allow-Origin") == allowed
        connection.close()


def test_browser_may_send_the_key_that_clients_send(start_server):
    _, port = start_server()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    origin = "http://localhost:3000"
    connection.request("OPTIONS", CHAT, headers={"Origin": origin})
    response = connection.getresponse()
    assert response.status == 204
    assert response.getheader("Access-Control-Allow-Origin") == origin
    assert response.getheader("Access-Control-Allow-Headers") == "*, Authorization"
    connection.close()
